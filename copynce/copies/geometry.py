"""The projective map of one picture onto another, from the affinity of their patches.

Both pictures are unit squares here, as a model sees them; a map takes points of the query to points of the reference.
Every map is judged by all patches at once: a query patch whose centre falls at x in the reference speaks by

    e_i(x) = log(1 - s + s L p_i(x)),      p_i = softmax_j(cos_ij / tau) as in equation 6,

the log of how much likelier its affinity is if the map is right (a share s of the patches really are copied) than if
the copy lies anywhere; a patch that falls outside says nothing. Reference patches speak likewise about the query. The
maps that are tried come from all pairs (and triples) of the strongest matches, so nothing is drawn by chance, and the
best are improved by moving the images of the corners.

Shapes: Lq = gq * gq and Lr = gr * gr patches in row-major order, K maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.compiled_cache import njit

Array = NDArray[np.float64]

_COPIED = 0.9  # s: the share of patches within a copied region that show it; the rest is covered
_PAIRS, _TRIPLES = 24, 9  # strongest matches of which all pairs, and all triples, give maps
_CONSIDERED, _KEPT = 400, 6  # the best maps, and how many of them, all different, are improved
_NEAR = 0.06  # maps are different which send a point of `_POINTS` further apart
_ROUNDS, _STEPS = 24, (0.06, 0.001)  # of improving: rounds at most, the first step and the last
_SCALES = 0.12, 8.0  # how many times larger the map may draw a side
_SHEAR = 4.0  # ratio of the longest to the shortest stretch
_HORIZON = 1e-6  # depth from which on a point is seen
_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
_POINTS = np.array([[0.2, 0.2], [0.8, 0.2], [0.8, 0.8], [0.2, 0.8]])  # by whose images a map is moved


@dataclass(frozen=True)
class Evidence:
    """What each patch says about where it lies in the other picture, in nats. query: [Lq, gr, gr], the query's patches
    at the places of the reference; reference: [Lr, gq, gq]."""

    query: Array
    reference: Array

    @classmethod
    def of(cls, cosines: Array, temperature: float) -> Evidence:
        """From cosines [Lq, Lr] of patch tokens."""
        gq, gr = (round(length**0.5) for length in cosines.shape)
        forth, back = _softmax(cosines / temperature), _softmax(cosines.T / temperature)
        spoken = [np.log(1 - _COPIED + _COPIED * p.shape[1] * p) for p in (forth, back)]
        return cls(spoken[0].reshape(-1, gr, gr), spoken[1].reshape(-1, gq, gq))

    @property
    def grids(self) -> tuple[int, int]:
        return self.reference.shape[1], self.query.shape[1]

    def heard(self, maps: Array) -> tuple[Array, Array, Array, Array]:
        """Under maps [K, 3, 3]: where the query's patches fall [K, Lq, 2] and what they say [K, Lq], 0 outside; where
        the reference's come from [K, Lr, 2] and what they say [K, Lr]."""
        gq, gr = self.grids
        forth = transformed(maps, centres(gq))
        back = transformed(np.linalg.inv(maps), centres(gr))
        return forth, _looked_up(self.query, forth), back, _looked_up(self.reference, back)

    def total(self, maps: Array) -> Array:
        """All that is said for each of the maps, [K]: the sums of `heard`, without its arrays."""
        return np.asarray(_totals(self.query, self.reference, np.ascontiguousarray(maps), *self.centres))

    @property
    def centres(self) -> tuple[Array, Array]:
        """Of the query's patches [Lq, 2] and the reference's [Lr, 2]."""
        gq, gr = self.grids
        return centres(gq), centres(gr)


@lru_cache(maxsize=16)
def centres(grid: int) -> Array:
    """The centres of grid * grid patches, [L, 2], read-only."""
    at = (np.arange(grid) + 0.5) / grid
    found = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2)
    found.flags.writeable = False
    return found


def transformed(maps: NDArray[Any], points: Array) -> Array:
    """Points [n, 2] under maps [K, 3, 3], [K, n, 2]; those on or beyond the horizon are nan."""
    out = np.column_stack([points, np.ones(len(points))]) @ np.swapaxes(maps, 1, 2)
    depth = np.where(out[..., 2:] > _HORIZON, out[..., 2:], np.nan)
    result: Array = out[..., :2] / depth
    return result


def matches(cosines: Array, temperature: float, grids: tuple[int, int]) -> tuple[Array, Array, NDArray[np.bool_]]:
    """(query points [M, 2], reference points [M, 2], whether each is mutual [M]), the strongest first.

    A match is a patch and its nearest of the other picture, either way round. Its points are means over the patches
    beside, weighted by affinity, so they lie between the centres of patches where a copy does.
    """
    forth, back = _softmax(cosines / temperature), _softmax(cosines.T / temperature)
    nearest, nearest_back = forth.argmax(1), back.argmax(1)
    rows = np.concatenate([np.arange(len(nearest)), nearest_back])
    columns = np.concatenate([nearest, np.arange(len(nearest_back))])
    pairs = np.unique(np.stack([rows, columns], 1), axis=0)
    strength = forth[pairs[:, 0], pairs[:, 1]] * back[pairs[:, 1], pairs[:, 0]]
    pairs = pairs[np.argsort(-strength, kind="stable")]
    mutual = (nearest[pairs[:, 0]] == pairs[:, 1]) & (nearest_back[pairs[:, 1]] == pairs[:, 0])
    query = _between(back[pairs[:, 1]], pairs[:, 0], grids[0])
    reference = _between(forth[pairs[:, 0]], pairs[:, 1], grids[1])
    return query, reference, mutual


def fit(evidence: Evidence, query: Array, reference: Array, shapes: tuple[float, float]) -> Array:
    """The map of highest evidence, [3, 3]. query, reference: points [M, 2] of matches, the strongest first; shapes:
    width by height of both pictures."""
    maps = np.concatenate([np.eye(3)[None], *_proposed(query, reference, shapes)])
    maps = maps[_sane(maps)]
    if not len(maps):
        return np.eye(3)
    score = evidence.total(maps)
    order = np.argsort(-score, kind="stable")[:_CONSIDERED]
    best = maps[order[_distinct(maps[order], _KEPT)]]
    affine, score = _improved(evidence, best, _AFFINE)
    order = np.argsort(-score, kind="stable")[:3]
    bent, bent_score = _improved(evidence, affine[order], _PROJECTIVE)
    # Two more numbers than an affine map has must be worth it.
    if bent_score.max() > score.max() + 4.0:
        chosen: Array = bent[int(bent_score.argmax())]
    else:
        chosen = affine[int(score.argmax())]
    return chosen / chosen[2, 2]


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    normal: Array = shifted / shifted.sum(1, keepdims=True)
    return normal


def _looked_up(spoken: Array, places: Array) -> Array:
    """What each patch says about its place, between the centres of patches bilinearly: [K, n] of places [K, n, 2]."""
    grid = spoken.shape[1]
    x, y = places[..., 0], places[..., 1]
    inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)  # not of nan
    x, y = (np.clip(np.where(inside, edge, 0.5) * grid - 0.5, 0, grid - 1.000001) for edge in (x, y))
    column, row = x.astype(np.int64), y.astype(np.int64)
    px, py = x - column, y - row
    corner = np.arange(len(spoken)) * grid * grid + row * grid + column
    flat = spoken.ravel()
    upper = (1 - px) * flat[corner] + px * flat[corner + 1]
    lower = (1 - px) * flat[corner + grid] + px * flat[corner + grid + 1]
    found = (1 - py) * upper + py * lower
    return np.where(inside, found, 0.0)


@njit(cache=True, nogil=True)
def _said(spoken: np.ndarray, m: np.ndarray, points: np.ndarray) -> float:
    """`_looked_up` of `transformed` points, summed over them, under one map [3, 3]."""
    grid, total = spoken.shape[1], 0.0
    for i in range(len(points)):
        u, v = points[i]
        depth = m[2, 0] * u + m[2, 1] * v + m[2, 2]
        if not depth > _HORIZON:
            continue
        x, y = (m[0, 0] * u + m[0, 1] * v + m[0, 2]) / depth, (m[1, 0] * u + m[1, 1] * v + m[1, 2]) / depth
        if not (x >= 0 and x <= 1 and y >= 0 and y <= 1):
            continue
        x, y = min(max(x * grid - 0.5, 0.0), grid - 1.000001), min(max(y * grid - 0.5, 0.0), grid - 1.000001)
        column, row = int(x), int(y)
        px, py = x - column, y - row
        upper = (1 - px) * spoken[i, row, column] + px * spoken[i, row, column + 1]
        lower = (1 - px) * spoken[i, row + 1, column] + px * spoken[i, row + 1, column + 1]
        total += (1 - py) * upper + py * lower
    return total


@njit(cache=True, nogil=True)
def _total(query: np.ndarray, reference: np.ndarray, m: np.ndarray, here: np.ndarray, there: np.ndarray) -> float:
    """`Evidence.total` of one map; here, there: the centres of the query's and the reference's patches."""
    back = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            a, b, c, d = (i + 1) % 3, (i + 2) % 3, (j + 1) % 3, (j + 2) % 3
            back[j, i] = m[a, c] * m[b, d] - m[a, d] * m[b, c]
    back /= m[0, 0] * back[0, 0] + m[0, 1] * back[1, 0] + m[0, 2] * back[2, 0]
    return _said(query, m, here) + _said(reference, back, there)


@njit(cache=True, nogil=True)
def _totals(query: np.ndarray, reference: np.ndarray, maps: np.ndarray, here: np.ndarray, there: np.ndarray) -> Any:
    out = np.empty(len(maps))
    for k in range(len(maps)):
        out[k] = _total(query, reference, maps[k], here, there)
    return out


def _between(affinities: Array, chosen: NDArray[np.int64], grid: int) -> Array:
    """The mean place of the 3 x 3 patches about the chosen ones [M], weighted by affinities [M, L]."""
    at = centres(grid)
    near = (np.abs(at[None] - at[chosen][:, None]) < 1.5 / grid).all(-1)
    weight = np.where(near, affinities, 0.0) + 1e-12 * near
    mean: Array = (weight[..., None] * at).sum(1) / weight.sum(1)[:, None]
    return mean


def _proposed(query: Array, reference: Array, shapes: tuple[float, float]) -> list[Array]:
    """Maps through two matches: turned and scaled, or the sides stretched each by itself, both also mirrored and by
    quarter turns; and affine ones through three."""
    count = min(len(query), _PAIRS)
    found = []
    if count >= 2:
        i, j = np.triu_indices(count, 1)
        found += _similar(query[i], query[j], reference[i], reference[j], shapes)
        found += _stretched(query[i], query[j], reference[i], reference[j])
    triples = np.array(list(combinations(range(min(len(query), _TRIPLES)), 3)), np.int64)
    if len(triples):
        ones = np.ones((*triples.shape, 1))
        left = np.concatenate([query[triples], ones], -1)
        good = np.abs(np.linalg.det(left)) > 1e-3
        right = np.concatenate([reference[triples], ones], -1)
        found.append(np.swapaxes(np.linalg.solve(left[good], right[good]), 1, 2))
    return found


def _similar(q0: Array, q1: Array, r0: Array, r1: Array, shapes: tuple[float, float]) -> list[Array]:
    """Similarities of the pictures in their own shapes, as the numbers of the plane multiply, and mirrored ones."""
    wide_q, wide_r = (np.array([shape, 1.0]) for shape in shapes)
    (a0, a1), (b0, b1) = ((p * wide_q for p in (q0, q1)), (p * wide_r for p in (r0, r1)))
    found = []
    for mirror in (np.array([1.0, 1.0]), np.array([-1.0, 1.0])):
        da, db = ((a1 - a0) * mirror) @ [1, 1j], (b1 - b0) @ [1, 1j]
        good = np.abs(da) > 1e-2
        turn = db[good] / da[good]
        matrix = np.zeros((len(turn), 3, 3))
        matrix[:, 0, 0] = matrix[:, 1, 1] = turn.real
        matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 2, 2] = -turn.imag, turn.imag, 1
        matrix = matrix @ np.diag([*mirror, 1.0])
        matrix[:, :2, 2] = b0[good] - np.einsum("kab,kb->ka", matrix[:, :2, :2], a0[good])
        found.append(np.diag([1 / shapes[1], 1.0, 1.0]) @ matrix @ np.diag([shapes[0], 1.0, 1.0]))
    return found


def _stretched(q0: Array, q1: Array, r0: Array, r1: Array) -> list[Array]:
    """Maps that keep upright sides upright, or turn them by a quarter."""
    found = []
    for swapped in (False, True):
        a0, a1 = (q0[:, ::-1], q1[:, ::-1]) if swapped else (q0, q1)
        step = a1 - a0
        good = (np.abs(step) > 0.05).all(1)
        scale = (r1 - r0)[good] / step[good]
        matrix = np.zeros((len(scale), 3, 3))
        matrix[:, 0, int(swapped)], matrix[:, 1, 1 - int(swapped)] = scale[:, 0], scale[:, 1]
        matrix[:, :2, 2], matrix[:, 2, 2] = r0[good] - scale * a0[good], 1
        found.append(matrix)
    return found


@njit(cache=True, nogil=True)
def _image(m: np.ndarray, points: np.ndarray) -> np.ndarray:
    """`transformed` points of one map, [n, 2]."""
    out = np.empty((len(points), 2))
    for i in range(len(points)):
        u, v = points[i]
        depth = m[2, 0] * u + m[2, 1] * v + m[2, 2]
        if not depth > _HORIZON:
            depth = np.nan
        out[i, 0] = (m[0, 0] * u + m[0, 1] * v + m[0, 2]) / depth
        out[i, 1] = (m[1, 0] * u + m[1, 1] * v + m[1, 2]) / depth
    return out


@njit(cache=True, nogil=True)
def _is_sane(m: np.ndarray) -> bool:
    """Whether an edit may make a map: no side drawn beyond measure, none squeezed into a line, no corner at infinity,
    none turned inwards."""
    corners = _image(m, _CORNERS)
    if not np.isfinite(corners).all():
        return False
    turned = 0
    for i in range(4):
        (x0, y0), (x1, y1), (x2, y2) = corners[i], corners[(i + 1) % 4], corners[(i + 2) % 4]
        turn = (x1 - x0) * (y2 - y1) - (y1 - y0) * (x2 - x1)
        turned += 1 if turn > 0 else -1 if turn < 0 else 0
    if abs(turned) < 4:
        return False
    # The singular values of the 2 x 2 matrix of two sides.
    (ax, ay), (bx, by) = corners[1] - corners[0], corners[2] - corners[1]
    squares, product = ax * ax + ay * ay + bx * bx + by * by, abs(ax * by - ay * bx)
    plus, minus = np.sqrt(squares + 2 * product), np.sqrt(max(squares - 2 * product, 0.0))
    largest, least = (plus + minus) / 2, (plus - minus) / 2
    return bool(least >= _SCALES[0] and largest <= _SCALES[1] and largest <= _SHEAR * least)


@njit(cache=True, nogil=True)
def _sane(maps: np.ndarray) -> np.ndarray:
    """`_is_sane` of each, bool [K]."""
    out = np.empty(len(maps), np.bool_)
    for k in range(len(maps)):
        out[k] = _is_sane(maps[k])
    return out


@njit(cache=True, nogil=True)
def _distinct(maps: np.ndarray, most: int) -> np.ndarray:
    """The numbers of at most so many maps, none of which sends `_POINTS` about where one before does."""
    chosen, images = np.empty(most, np.int64), np.empty((most, 4, 2))
    count = 0
    for k in range(len(maps)):
        image = _image(maps[k], _POINTS)
        new = True
        for other in range(count):
            new = new and np.abs(image - images[other]).max() > _NEAR
        if new:
            chosen[count], images[count] = k, image
            count += 1
            if count == most:
                break
    return chosen[:count]


def _improved(evidence: Evidence, maps: Array, moves: Array) -> tuple[Array, Array]:
    """Each map moved uphill, (maps [K, 3, 3], their evidence [K]): the images of `_POINTS` go by moves [n, 4, 2] times
    a step that shrinks."""
    found, score = _climbed(evidence.query, evidence.reference, np.ascontiguousarray(maps), moves, *evidence.centres)
    return found, score


@njit(cache=True, nogil=True)
def _climbed(
    query: np.ndarray, reference: np.ndarray, maps: np.ndarray, moves: np.ndarray, here: np.ndarray, there: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    found, scores = maps.copy(), np.empty(len(maps))
    for k in range(len(maps)):
        score, step = _total(query, reference, found[k], here, there), _STEPS[0]
        image = _image(found[k], _POINTS)
        for _ in range(_ROUNDS):
            best, chosen = score + 1e-6, -1
            for n in range(len(moves)):
                tried = _through(image + step * moves[n])
                if _is_sane(tried):
                    value = _total(query, reference, tried, here, there)
                    if value > best:
                        best, chosen = value, n
            if chosen >= 0:
                image += step * moves[chosen]
                found[k], score = _through(image), best
            else:
                step /= 2
                if step < _STEPS[1]:
                    break
        scores[k] = score
    return found, scores


@njit(cache=True, nogil=True)
def _through(images: np.ndarray) -> np.ndarray:
    """The projective map [3, 3] of `_POINTS` to images [4, 2]; of nan, where the last three lie on a line.

    Of the unit square it is known in closed form (Heckbert 1989, "Fundamentals of Texture Mapping and Image Warping");
    the points are a smaller square.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = images[0], images[1], images[2], images[3]
    ax, bx, cx = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    ay, by, cy = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    out, area = np.full((3, 3), np.nan), ax * by - bx * ay
    if area == 0:
        return out
    g, h = (cx * by - bx * cy) / area, (ax * cy - cx * ay) / area
    scale, offset = 1 / (_POINTS[2, 0] - _POINTS[0, 0]), _POINTS[0, 0]
    out[0, 0], out[0, 1], out[0, 2] = (x1 - x0 + g * x1) * scale, (x3 - x0 + h * x3) * scale, x0
    out[1, 0], out[1, 1], out[1, 2] = (y1 - y0 + g * y1) * scale, (y3 - y0 + h * y3) * scale, y0
    out[2, 0], out[2, 1], out[2, 2] = g * scale, h * scale, 1.0
    for row in range(3):
        out[row, 2] -= offset * (out[row, 0] + out[row, 1])
    if out[2, 2] == 0:
        out[:] = np.nan
        return out
    return out / out[2, 2]


def _steps(projective: bool) -> Array:
    """Moves [n, 4, 2] of the images of `_POINTS`."""
    moves: NDArray[Any] = np.eye(8).reshape(8, 4, 2)
    if not projective:
        u, v, one = _POINTS[:, :1] - 0.5, _POINTS[:, 1:] - 0.5, np.ones((4, 1))
        basis = [one, u * 2, v * 2]
        moves = np.array([np.hstack([b, 0 * b]) for b in basis] + [np.hstack([0 * b, b]) for b in basis])
        # Growing, turning: the steps that an edit takes.
        moves = np.concatenate([moves, [np.hstack([u, v]) * 2, np.hstack([-v, u]) * 2]])
    return np.concatenate([moves, -moves])


_AFFINE, _PROJECTIVE = _steps(projective=False), _steps(projective=True)
