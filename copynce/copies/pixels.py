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

_BLOCK = 16
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
    correlations = []
    for level in LEVELS:
        coarse, fine = (_smaller(side, SIDE // level.side) for side in sides)
        inside = _inside(there, level.side)
        for reach in (*level.reaches, 1):
            warped, seen = _warped(fine, found, samples)
            blocks = _compared(coarse, warped, inside & seen, reach, level.stride)
            if reach > 1 and len(blocks) >= _FEWEST:
                bent = level.side > LEVELS[0].side and len(blocks) >= _FEWEST_BENT
                found = found @ _move(blocks, there.mean(0), level.side, bent)
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


def _smaller(picture: NDArray[np.float32], by: int) -> NDArray[np.float32]:
    """Means of by x by pixels."""
    side = len(picture) // by
    return np.ascontiguousarray(picture.reshape(side, by, side, by).mean((1, 3)))


def _scale(geometry: Array, at: Array) -> float:
    """How many times longer a step of the query is in the reference, about a point."""
    step = 1e-3
    places = transformed(geometry[None], at + step * np.array([[0, 0], [1, 0], [0, 1]]))[0]
    with np.errstate(invalid="ignore"):  # of points beyond the horizon
        return float(np.sqrt(abs(np.linalg.det(places[1:] - places[0]))) / step)


def _move(blocks: Array, middle: Array, side: int, bent: bool) -> Array:
    """The map [3, 3] of the unit square, affine or `bent`, that moves blocks as they moved, the surer ones first.

    blocks: rows (x, y, dx, dy, correlation) in pixels.
    """
    places = blocks[:, :2] / side - middle
    moves, (x, y), one, zero = blocks[:, 2:4] / side, places.T, np.ones(len(places)), np.zeros(len(places))
    u, v = (places + moves).T  # (1 + h0) x + h1 y + h2 = u (1 + h6 x + h7 y), and so on
    rows = np.stack([[x, y, one, zero, zero, zero, -x * u, -y * u], [zero, zero, zero, x, y, one, -x * v, -y * v]])
    used = 8 if bent else 6
    columns, wanted = rows[:, :used].transpose(0, 2, 1), moves.T
    sure = np.maximum(blocks[:, 4] - _DOUBT, 0) ** 2 + 1e-6
    weight, h = sure, np.zeros(8)
    for _ in range(5):  # those that are far off count less
        pulled = columns * weight[:, None]
        stiff = np.diag(_STIFF[:used]) * weight.sum()
        h[:used] = np.linalg.solve(
            np.einsum("anh,ank->hk", pulled, columns) + stiff, np.einsum("anh,an->h", pulled, wanted)
        )
        off = np.abs(columns @ h[:used] - wanted).max(0) * side
        weight = sure / np.maximum(off, 1)
    moved = np.array([[1 + h[0], h[1], h[2]], [h[3], 1 + h[4], h[5]], [h[6], h[7], 1.0]])
    to_middle = np.eye(3)
    to_middle[:2, 2] = -middle
    found: Array = _inverse(to_middle) @ moved @ to_middle
    return found


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
def _warped(picture: np.ndarray, geometry: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(the picture under the map, float32 [S, S]; which pixels have their centre in it, bool [S, S]).

    A pixel is the mean of samples x samples places in it, each between pixels bilinearly, at the border the nearest.
    """
    side = picture.shape[0]
    out = np.zeros((side, side), np.float32)
    seen = np.zeros((side, side), np.bool_)
    for row in range(side):
        for column in range(side):
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
                    left, top = min(int(x), side - 2), min(int(y), side - 2)
                    px, py = x - left, y - top
                    upper = (1 - px) * picture[top, left] + px * picture[top, left + 1]
                    lower = (1 - px) * picture[top + 1, left] + px * picture[top + 1, left + 1]
                    total += (1 - py) * upper + py * lower
            out[row, column] = total / (samples * samples)
    return out, seen


@njit(cache=True, nogil=True, fastmath=_FAST)
def _compared(coarse: np.ndarray, warped: np.ndarray, usable: np.ndarray, reach: int, stride: int) -> np.ndarray:
    """Rows (x, y of the block's middle, dx, dy, correlation), float64 [n, 5], of the blocks that tell anything, at the
    move that correlates best; beyond its border `warped` goes on as at the border."""
    side, count = coarse.shape[0], 0
    across = (side - _BLOCK) // stride + 1
    out = np.empty((across * across, 5))
    padded = np.empty((side + 2 * reach, side + 2 * reach), np.float32)
    for row in range(side + 2 * reach):
        for column in range(side + 2 * reach):
            padded[row, column] = warped[min(max(row - reach, 0), side - 1), min(max(column - reach, 0), side - 1)]
    block = np.empty((_BLOCK, _BLOCK), np.float32)
    pixels = np.float32(_BLOCK * _BLOCK)
    for top in range(0, side - _BLOCK + 1, stride):
        for left in range(0, side - _BLOCK + 1, stride):
            covered, mean = 0, np.float32(0)
            for i in range(_BLOCK):
                for j in range(_BLOCK):
                    covered += usable[top + i, left + j]
                    mean += coarse[top + i, left + j]
            if covered < _COVERED * _BLOCK * _BLOCK:
                continue
            mean /= pixels
            square = np.float32(0)
            for i in range(_BLOCK):
                for j in range(_BLOCK):
                    block[i, j] = coarse[top + i, left + j] - mean
                    square += block[i, j] * block[i, j]
            deviation = np.sqrt(square / pixels)
            if deviation <= _STRUCTURE:
                continue
            best, best_x, best_y = -2.0, 0, 0
            for dy in range(2 * reach + 1):
                for dx in range(2 * reach + 1):
                    # About the grey at the block's middle, so that squares lose no digits.
                    about = padded[top + dy + _BLOCK // 2, left + dx + _BLOCK // 2]
                    total, squares, product = np.float32(0), np.float32(0), np.float32(0)
                    for i in range(_BLOCK):
                        for j in range(_BLOCK):
                            grey = padded[top + dy + i, left + dx + j] - about
                            total += grey
                            squares += grey * grey
                            product += grey * block[i, j]
                    spread = np.sqrt(max((squares - total * total / pixels) / pixels, np.float32(0)))
                    value = product / pixels / (deviation * max(spread, np.float32(_NOISE)))
                    if value > best:
                        best, best_x, best_y = value, dx - reach, dy - reach
            out[count, 0], out[count, 1] = left + _BLOCK / 2, top + _BLOCK / 2
            out[count, 2], out[count, 3], out[count, 4] = best_x, best_y, best
            count += 1
    return out[:count]
