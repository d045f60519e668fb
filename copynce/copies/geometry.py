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
_KEPT = 6  # maps that are improved
_SCALES = 0.12, 8.0  # how many times larger the map may draw a side
_SHEAR = 4.0  # ratio of the longest to the shortest stretch


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
        gq, gr = self.grids
        maps = np.ascontiguousarray(maps)
        total: Array = _said(self.query, maps, centres(gq)) + _said(self.reference, np.linalg.inv(maps), centres(gr))
        return total


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
    depth = np.where(out[..., 2:] > 1e-6, out[..., 2:], np.nan)
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
    best = maps[_distinct(maps, evidence.total(maps))]
    affine, score = _improved(evidence, best, projective=False)
    order = np.argsort(-score, kind="stable")[:3]
    bent, bent_score = _improved(evidence, affine[order], projective=True)
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
def _said(spoken: np.ndarray, maps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """`_looked_up` of `transformed` points, summed over them: [K] of maps [K, 3, 3]."""
    grid = spoken.shape[1]
    out = np.zeros(len(maps))
    for k in range(len(maps)):
        m = maps[k]
        for i in range(len(points)):
            u, v = points[i]
            depth = m[2, 0] * u + m[2, 1] * v + m[2, 2]
            if not depth > 1e-6:
                continue
            x, y = (m[0, 0] * u + m[0, 1] * v + m[0, 2]) / depth, (m[1, 0] * u + m[1, 1] * v + m[1, 2]) / depth
            if not (x >= 0 and x <= 1 and y >= 0 and y <= 1):
                continue
            x, y = min(max(x * grid - 0.5, 0.0), grid - 1.000001), min(max(y * grid - 0.5, 0.0), grid - 1.000001)
            column, row = int(x), int(y)
            px, py = x - column, y - row
            upper = (1 - px) * spoken[i, row, column] + px * spoken[i, row, column + 1]
            lower = (1 - px) * spoken[i, row + 1, column] + px * spoken[i, row + 1, column + 1]
            out[k] += (1 - py) * upper + py * lower
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


def _sane(maps: Array) -> NDArray[np.bool_]:
    """Maps that an edit may make: no side drawn beyond measure, none squeezed into a line, no corner at infinity."""
    corners = transformed(maps, np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]]))
    finite = np.isfinite(corners).all((1, 2))
    sides = np.roll(corners, -1, 1) - corners
    after = np.roll(sides, -1, 1)
    turns = sides[..., 0] * after[..., 1] - sides[..., 1] * after[..., 0]
    with np.errstate(invalid="ignore"):
        convex = (turns > 0).all(1) | (turns < 0).all(1)
        a, b = np.nan_to_num(sides[:, 0]), np.nan_to_num(sides[:, 1])
        # The singular values of the 2 x 2 matrix of two sides.
        squares, product = (a**2 + b**2).sum(1), np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])
        plus, minus = np.sqrt(squares + 2 * product), np.sqrt(np.maximum(squares - 2 * product, 0))
        largest, least = (plus + minus) / 2, (plus - minus) / 2
    good: NDArray[np.bool_] = finite & convex & (least >= _SCALES[0]) & (largest <= _SCALES[1])
    return good & (largest <= _SHEAR * least)


def _distinct(maps: Array, score: Array) -> NDArray[np.int64]:
    """The numbers of the best maps, none of which sends the picture's corners about where a better one does."""
    corners = transformed(maps, np.array([[0.2, 0.2], [0.8, 0.2], [0.8, 0.8], [0.2, 0.8]]))
    chosen: list[int] = []
    for k in np.argsort(-score, kind="stable")[:400]:
        if all(np.abs(corners[k] - corners[other]).max() > 0.06 for other in chosen):
            chosen.append(int(k))
            if len(chosen) == _KEPT:
                break
    return np.array(chosen, np.int64)


def _improved(evidence: Evidence, maps: Array, *, projective: bool) -> tuple[Array, Array]:
    """Each map moved uphill, (maps, their evidence): the images of four points of the query go by steps that shrink."""
    points = np.array([[0.2, 0.2], [0.8, 0.2], [0.8, 0.8], [0.2, 0.8]])
    moves: NDArray[Any] = np.eye(8).reshape(8, 4, 2)
    if not projective:
        u, v, one = points[:, :1] - 0.5, points[:, 1:] - 0.5, np.ones((4, 1))
        basis = [one, u * 2, v * 2]
        moves = np.array([np.hstack([b, 0 * b]) for b in basis] + [np.hstack([0 * b, b]) for b in basis])
        # Growing, turning: the steps that an edit takes.
        moves = np.concatenate([moves, [np.hstack([u, v]) * 2, np.hstack([-v, u]) * 2]])
    moves = np.concatenate([moves, -moves])
    score = evidence.total(maps)
    image = transformed(maps, points)
    step = np.full(len(maps), 0.06)
    for _ in range(24):
        tried = image[:, None] + step[:, None, None, None] * moves[None]
        candidates = _through(points, tried.reshape(-1, 4, 2))
        good = _sane(candidates)
        found = np.full(len(candidates), -np.inf)
        if good.any():
            found[good] = evidence.total(candidates[good])
        value = found.reshape(len(maps), -1)
        best = value.argmax(1)
        better = value.max(1) > score + 1e-6
        rows = np.arange(len(maps))
        maps = np.where(better[:, None, None], candidates.reshape(len(maps), -1, 3, 3)[rows, best], maps)
        image = np.where(better[:, None, None], tried[rows, best], image)
        score = np.maximum(score, value.max(1))
        step = np.where(better, step, step / 2)
        if (step < 0.004).all():
            break
    return maps, score


def _through(points: Array, images: Array) -> Array:
    """The projective maps [K, 3, 3] of four points [4, 2] to images [K, 4, 2]."""
    count = len(images)
    system = np.zeros((count, 8, 8))
    x, y = points.T
    u, v = images[..., 0], images[..., 1]
    for row, (start, value) in enumerate(((0, u), (3, v))):
        rows = slice(row * 4, row * 4 + 4)
        system[:, rows, start], system[:, rows, start + 1], system[:, rows, start + 2] = x, y, 1
        system[:, rows, 6], system[:, rows, 7] = -x * value, -y * value
    solved = np.linalg.solve(system, np.concatenate([u, v], 1)[..., None])[..., 0]
    return np.concatenate([solved, np.ones((count, 1))], 1).reshape(count, 3, 3)
