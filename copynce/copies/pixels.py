"""Whether the pixels of two pictures agree where a geometry lays one on the other: what tells copies from look-alikes.

Patch tokens say what is seen, so two shots of one scene may match patch by patch, as a copy does. Their pixels do not:

    warped(x) = the finer picture at geometry(x), averaged over the pixels of the coarser one
    blocks of 16 x 16 px that lie in the region and have structure in the coarser picture
    c = max over moves by up to r px of the correlation of a block with warped
    geometry <- geometry o (map that fits the moves of the blocks best), for one r after the other
    correlation = mean of c over the blocks, for r = 1

from squares of 56 px, where 6 px are a tenth of a picture, to those of 224 (`LEVELS`). A correlation does not change
with brightness and contrast, as many edits change them; of pictures that were framed or drawn upon most blocks still
correlate; of blurred ones those of 112 px do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from copynce.compiled_cache import njit
from copynce.copies.geometry import transformed
from copynce.copies.polygons import Points, mapped
from copynce.copies.regions import CopiedRegion

SIDE = 224
"""Pixels a side of the squares that are compared, and of their halves and quarters."""


class Level(NamedTuple):
    """A side in pixels, pixels from block to block, and the reaches of the moves that are fitted there, one by one."""

    side: int
    stride: int
    reaches: tuple[int, ...]


LEVELS = Level(SIDE // 4, 4, (6, 4, 3)), Level(SIDE // 2, 8, (3, 2)), Level(SIDE, 16, (2,))

_BLOCK = 16  # a multiple of every stride
_MIDDLE = 128.0  # of grey
_COVERED = 0.9  # share of a block that must lie in the region and in both pictures
_STRUCTURE = 6.0  # standard deviation of a block, of 255 grey levels, from which it tells anything
_NOISE = 2.0  # the least that a standard deviation counts for
_FEWEST, _FEWEST_BENT = 3, 8  # blocks, to fit an affine map to their moves, and a projective one
_DOUBT = 0.3  # a correlation that pulls at the geometry no more
_STIFF = np.array([1e-3, 1e-3, 1e-9, 1e-3, 1e-3, 1e-9, 1e-2, 1e-2])  # as if so many of the blocks had not moved
_EPS = 1e-9
_FINEST = 8  # samples a side for a pixel
_SURE = 0.6  # a coarse correlation from which on the pixels' geometry is better than the patches'

_FAST = {"reassoc", "contract", "nsz"}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PixelAgreement:
    """coarse, fine: the mean correlation of blocks of 16 px, of squares of `SIDE` / 2 and of `SIDE` px, in [-1, 1]; 0
    where there is no block. blocks: how many there are of the fine ones. geometry: float64 [3, 3] of unit squares,
    query to reference, as the pixels say it."""

    coarse: float
    fine: float
    blocks: int
    geometry: Array


def pixel_agreement(query: ArrayLike, reference: ArrayLike, geometry: ArrayLike, region: Points) -> PixelAgreement:
    """Whether the pixels agree; see the module's text.

    query, reference: grey [`SIDE`, `SIDE`], 0 to 255, as a model sees them: squashed to a square. geometry: [3, 3],
    points of the query's unit square to those of the reference's. region: convex polygon [n, 2] in the query's unit
    square. Raises ValueError where shapes do not fit.
    """
    sides = [np.asarray(side, np.float32) for side in (query, reference)]
    if any(side.shape != (SIDE, SIDE) for side in sides):
        shapes = " and ".join(str(list(side.shape)) for side in sides)
        raise ValueError(f"query and reference must be [{SIDE}, {SIDE}], got {shapes}")
    found, there = np.array(geometry, np.float64), np.asarray(region, np.float64)
    nothing = PixelAgreement(0.0, 0.0, 0, found)
    if len(there) < 3:
        return nothing
    scale = _scale(found, there.mean(0))
    if not 0 < scale < np.inf:
        return nothing
    turned = scale < 1
    if turned:  # the coarser picture keeps its pixels
        there, found, scale = mapped(found, there), _inverse(found), 1 / scale
        sides.reverse()
    if not np.isfinite(there).all():
        return nothing
    samples = int(min(np.ceil(scale - 0.05), _FINEST))
    halves = [_halved(side) for side in sides]
    correlations = []
    for level, (coarse, fine) in zip(LEVELS, ([_halved(half) for half in halves], halves, sides), strict=True):
        inside = _inside(there, level.side)
        for reach in (*level.reaches, 1):
            warped, seen = _warped(fine, found, samples, *_window(there, level.side, reach))
            blocks = _compared(coarse, warped, inside & seen, reach, level.stride)
            if reach > 1 and len(blocks) >= _FEWEST:
                bent = level.side > LEVELS[0].side and len(blocks) >= _FEWEST_BENT
                found = found @ _move(blocks, there.mean(0), level.side, 8 if bent else 6)
                found /= found[2, 2]
        correlations.append(blocks[:, 4])
    _, coarsely, finely = (float(each.mean()) if len(each) else 0.0 for each in correlations)
    return PixelAgreement(coarsely, finely, len(correlations[-1]), _inverse(found) if turned else found)


def agreeing(
    query: ArrayLike,
    reference: ArrayLike,
    region: CopiedRegion,
    query_size: tuple[int, int],
    reference_size: tuple[int, int],
) -> tuple[PixelAgreement, CopiedRegion]:
    """How the pixels agree in a region, and the region, by their geometry where they do.

    query, reference: as of `pixel_agreement`; sizes: (width, height) of the files, in whose pixels the region is.
    """
    to_query, to_reference = np.diag([*query_size, 1.0]), np.diag([*reference_size, 1.0])
    geometry = _inverse(to_reference) @ region.geometry @ to_query
    pixels = pixel_agreement(query, reference, geometry, region.query / query_size)
    if pixels.coarse >= _SURE:
        region = region.moved(to_reference @ pixels.geometry @ _inverse(to_query), reference_size)
    return pixels, region


def _inverse(geometry: Array) -> Array:
    return np.asarray(np.linalg.inv(geometry), np.float64)


def _halved(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of 2 x 2 pixels."""
    upper, lower = picture[::2], picture[1::2]
    return np.ascontiguousarray((upper[:, ::2] + upper[:, 1::2] + lower[:, ::2] + lower[:, 1::2]) / 4)


def _scale(geometry: Array, at: Array) -> float:
    """How many times longer a step of the query is in the reference, about a point."""
    step = 1e-3
    places = transformed(geometry[None], at + step * np.array([[0, 0], [1, 0], [0, 1]]))[0]
    with np.errstate(invalid="ignore"):  # of points beyond the horizon
        return float(np.sqrt(abs(np.linalg.det(places[1:] - places[0]))) / step)


def _window(region: Points, side: int, reach: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right): the pixels of which the blocks in a region ask, or more."""
    (left, top), (right, bottom) = region.min(0) * side, region.max(0) * side
    beside = _BLOCK + reach
    low, high = np.clip([top - beside, left - beside], 0, side), np.clip([bottom + beside, right + beside], 0, side)
    return int(low[0]), int(np.ceil(high[0])), int(low[1]), int(np.ceil(high[1]))


@njit(cache=True, nogil=True)
def _move(blocks: np.ndarray, middle: np.ndarray, side: int, used: int) -> np.ndarray:
    """The map [3, 3] of the unit square, with 6 numbers (affine) or 8 (projective), that moves blocks as they moved,
    the surer ones first: by least squares, five times over, where blocks that are far off count less.

    blocks: rows (x, y, dx, dy, correlation) in pixels.
    """
    n = len(blocks)
    columns, wanted = np.zeros((2 * n, used)), np.empty(2 * n)
    sure = np.empty(n)
    for i in range(n):
        x, y = blocks[i, 0] / side - middle[0], blocks[i, 1] / side - middle[1]
        dx, dy = blocks[i, 2] / side, blocks[i, 3] / side
        # (1 + h0) x + h1 y + h2 = (x + dx) (1 + h6 x + h7 y), and so on
        columns[2 * i, 0], columns[2 * i, 1], columns[2 * i, 2] = x, y, 1
        columns[2 * i + 1, 3], columns[2 * i + 1, 4], columns[2 * i + 1, 5] = x, y, 1
        if used == 8:
            columns[2 * i, 6], columns[2 * i, 7] = -x * (x + dx), -y * (x + dx)
            columns[2 * i + 1, 6], columns[2 * i + 1, 7] = -x * (y + dy), -y * (y + dy)
        wanted[2 * i], wanted[2 * i + 1] = dx, dy
        sure[i] = max(blocks[i, 4] - _DOUBT, 0.0) ** 2 + 1e-6
    weight, h = sure.copy(), np.zeros(8)
    for _ in range(5):
        products, right = np.zeros((used, used)), np.zeros(used)
        for k in range(used):
            products[k, k] = _STIFF[k] * weight.sum()
        for row in range(2 * n):
            for k in range(used):
                pulled = columns[row, k] * weight[row // 2]
                right[k] += pulled * wanted[row]
                for j in range(k + 1):
                    products[k, j] += pulled * columns[row, j]
        h[:used] = _solved(products, right)
        for i in range(n):
            off = 0.0
            for row in range(2 * i, 2 * i + 2):
                there = 0.0
                for k in range(used):
                    there += columns[row, k] * h[k]
                off = max(off, abs(there - wanted[row]) * side)
            weight[i] = sure[i] / max(off, 1.0)
    moved = np.array([[1 + h[0], h[1], h[2]], [h[3], 1 + h[4], h[5]], [h[6], h[7], 1.0]])
    x, y = middle  # from the middle, and back to it
    for row in range(3):
        moved[row, 2] -= moved[row, 0] * x + moved[row, 1] * y
    for column in range(3):
        moved[0, column] += x * moved[2, column]
        moved[1, column] += y * moved[2, column]
    return moved


@njit(cache=True, nogil=True)
def _solved(products: np.ndarray, right: np.ndarray) -> np.ndarray:
    """x of A x = b, A [n, n] positive definite, of which the lower triangle is read, and overwritten (Cholesky)."""
    n, x = len(right), right.copy()
    for i in range(n):
        for j in range(i):
            for k in range(j):
                products[i, j] -= products[i, k] * products[j, k]
            products[i, j] /= products[j, j]
            products[i, i] -= products[i, j] ** 2
        products[i, i] = np.sqrt(products[i, i])
        for j in range(i):
            x[i] -= products[i, j] * x[j]
        x[i] /= products[i, i]
    for i in range(n - 1, -1, -1):
        for j in range(i + 1, n):
            x[i] -= products[j, i] * x[j]
        x[i] /= products[i, i]
    return x


@njit(cache=True, nogil=True)
def _inside(polygon: np.ndarray, side: int) -> np.ndarray:
    """Which pixels of a unit square have their centre in a convex polygon, bool [side, side]; `polygons.contains` for
    so many points."""
    out = np.empty((side, side), np.bool_)
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) / side, (row + 0.5) / side
            left = right = True
            for k in range(len(polygon)):
                x0, y0 = polygon[k]
                x1, y1 = polygon[(k + 1) % len(polygon)]
                turn = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)
                left, right = left and turn >= -_EPS, right and turn <= _EPS
            out[row, column] = left or right
    return out


@njit(cache=True, nogil=True)
def _warped(
    picture: np.ndarray, geometry: np.ndarray, samples: int, top: int, bottom: int, left: int, right: int
) -> tuple[np.ndarray, np.ndarray]:
    """(the picture under the map, float32 [S, S]; which pixels have their centre in it, bool [S, S]), within a window,
    beyond which it is 0 and none.

    A pixel is the mean of samples x samples places in it, each between pixels bilinearly, at the border the nearest.
    """
    side = picture.shape[0]
    out = np.zeros((side, side), np.float32)
    seen = np.zeros((side, side), np.bool_)
    for row in range(top, bottom):
        for column in range(left, right):
            u, v = (column + 0.5) / side, (row + 0.5) / side
            depth = geometry[2, 0] * u + geometry[2, 1] * v + geometry[2, 2]
            if depth <= 1e-6:
                continue
            x = (geometry[0, 0] * u + geometry[0, 1] * v + geometry[0, 2]) / depth
            y = (geometry[1, 0] * u + geometry[1, 1] * v + geometry[1, 2]) / depth
            if x < 0 or x > 1 or y < 0 or y > 1:
                continue
            seen[row, column] = True
            total = 0.0
            for i in range(samples):
                for j in range(samples):
                    u, v = (column + (j + 0.5) / samples) / side, (row + (i + 0.5) / samples) / side
                    depth = max(geometry[2, 0] * u + geometry[2, 1] * v + geometry[2, 2], 1e-6)
                    x = (geometry[0, 0] * u + geometry[0, 1] * v + geometry[0, 2]) / depth * side - 0.5
                    y = (geometry[1, 0] * u + geometry[1, 1] * v + geometry[1, 2]) / depth * side - 0.5
                    x, y = min(max(x, 0.0), side - 1.0), min(max(y, 0.0), side - 1.0)
                    i0, j0 = min(int(y), side - 2), min(int(x), side - 2)
                    px, py = x - j0, y - i0
                    upper = (1 - px) * picture[i0, j0] + px * picture[i0, j0 + 1]
                    lower = (1 - px) * picture[i0 + 1, j0] + px * picture[i0 + 1, j0 + 1]
                    total += (1 - py) * upper + py * lower
            out[row, column] = total / (samples * samples)
    return out, seen


@njit(cache=True, nogil=True, fastmath=_FAST)
def _compared(coarse: np.ndarray, warped: np.ndarray, usable: np.ndarray, reach: int, stride: int) -> np.ndarray:
    """Rows (x, y of the block's middle, dx, dy, correlation), float64 [n, 5], of the blocks that tell anything, at the
    move that correlates best; beyond its border `warped` goes on as at the border.

    Blocks overlap, so products are summed once over cells of stride x stride pixels, of which a block has several.
    """
    side, pixels = coarse.shape[0], _BLOCK * _BLOCK
    across, cells = (side - _BLOCK) // stride + 1, _BLOCK // stride
    here = coarse - np.float32(_MIDDLE)  # so that sums lose fewer digits
    padded = np.empty((side + 2 * reach, side + 2 * reach), np.float32)
    for row in range(side + 2 * reach):
        for column in range(side + 2 * reach):
            beside = warped[min(max(row - reach, 0), side - 1), min(max(column - reach, 0), side - 1)]
            padded[row, column] = beside - np.float32(_MIDDLE)
    out, count = np.empty((across * across, 5)), 0
    means, deviations = np.empty(across * across), np.empty(across * across)
    ones = np.ones((side, side), np.float32)
    sums, squares = _summed(_products(here, ones, 0, 0, stride)), _summed(_products(here, here, 0, 0, stride))
    covered = _summed(_products(usable.astype(np.float32), ones, 0, 0, stride))
    for row in range(across):
        for column in range(across):
            if _within(covered, row, column, cells) < _COVERED * pixels:
                continue
            mean = _within(sums, row, column, cells) / pixels
            deviation = np.sqrt(max(_within(squares, row, column, cells) / pixels - mean * mean, 0.0))
            if deviation > _STRUCTURE:
                out[count, 0], out[count, 1] = column * stride + _BLOCK / 2, row * stride + _BLOCK / 2
                out[count, 4] = -2.0
                means[count], deviations[count] = mean, deviation
                count += 1
    sums, squares = _summed(padded), _summed(padded * padded)
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            products = _summed(_products(here, padded, dy, dx, stride))
            for n in range(count):
                top, left = int(out[n, 1]) - _BLOCK // 2, int(out[n, 0]) - _BLOCK // 2
                mean = _within(sums, top + dy, left + dx, _BLOCK) / pixels
                variance = _within(squares, top + dy, left + dx, _BLOCK) / pixels - mean * mean
                product = _within(products, top // stride, left // stride, cells) / pixels - means[n] * mean
                value = product / (deviations[n] * max(np.sqrt(max(variance, 0.0)), _NOISE))
                if value > out[n, 4]:
                    out[n, 2], out[n, 3], out[n, 4] = dx - reach, dy - reach, value
    return out[:count]


@njit(cache=True, nogil=True, fastmath=_FAST)
def _products(one: np.ndarray, other: np.ndarray, dy: int, dx: int, stride: int) -> np.ndarray:
    """The sums, over cells of stride x stride pixels of `one` [S, S], of its products with the pixels of `other` that
    are (dx, dy) further, float32 [S // stride, S // stride]."""
    side, bands = len(one), len(one) // stride
    line, out = np.empty(side, np.float32), np.empty((bands, bands), np.float32)
    for band in range(bands):
        line[:] = 0
        for row in range(band * stride, (band + 1) * stride):
            here, there = one[row], other[row + dy][dx : dx + side]
            for column in range(side):
                line[column] += here[column] * there[column]
        for cell in range(bands):
            total = np.float32(0)
            for column in range(cell * stride, (cell + 1) * stride):
                total += line[column]
            out[band, cell] = total
    return out


@njit(cache=True, nogil=True)
def _summed(picture: np.ndarray) -> np.ndarray:
    """The sums of all that is above and left of each corner, float64 [H + 1, W + 1] of [H, W]."""
    height, width = picture.shape
    sums = np.zeros((height + 1, width + 1))
    for row in range(height):
        total = 0.0
        for column in range(width):
            total += picture[row, column]
            sums[row + 1, column + 1] = sums[row, column + 1] + total
    return sums


@njit(cache=True, nogil=True)
def _within(sums: np.ndarray, top: int, left: int, side: int) -> float:
    """The sum of a square, of what `_summed` returns."""
    low, right = top + side, left + side
    return sums[low, right] - sums[top, right] - sums[low, left] + sums[top, left]
