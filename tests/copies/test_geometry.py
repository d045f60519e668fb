"""The map of one picture onto another: what is compiled, against the plain way with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from copynce.copies import geometry
from copynce.copies.geometry import Evidence, transformed

Array = NDArray[np.float64]

POINTS = np.array([[0.2, 0.2], [0.8, 0.2], [0.8, 0.8], [0.2, 0.8]])


def maps_of(rng: np.random.Generator, count: int, spread: float = 0.6) -> Array:
    """Maps of all kinds, also such as no edit makes."""
    maps = np.eye(3) + rng.normal(0, spread, (count, 3, 3))
    maps[:, 2, :2] /= 3
    maps[::2, 2, :2] = 0
    maps[:, 2, 2] = 1
    return maps


def evidence_of(seed: int, grids: tuple[int, int] = (8, 8)) -> Evidence:
    """Of tokens of which those of the query show a part of the reference."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(grids[1], grids[1], 24))
    at = np.linspace(0.15, 0.7, grids[0]) * (grids[1] - 1)
    low, part = at.astype(int), (at % 1)[:, None]
    rows = reference[low] * (1 - part[..., None]) + reference[low + 1] * part[..., None]
    query = rows[:, low] * (1 - part[None]) + rows[:, low + 1] * part[None]
    query += rng.normal(0, 0.3, query.shape)
    sides = [side.reshape(-1, 24) for side in (query, reference)]
    one, other = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    return Evidence.of(one @ other.T, 1 / 16)


def sane(maps: Array) -> NDArray[np.bool_]:
    corners = transformed(maps, np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]]))
    found = []
    for four in corners:
        if not np.isfinite(four).all():
            found.append(False)
            continue
        sides = np.roll(four, -1, 0) - four
        turns = np.array([np.linalg.det(np.stack([sides[i], sides[(i + 1) % 4]])) for i in range(4)])
        if not ((turns > 0).all() or (turns < 0).all()):
            found.append(False)
            continue
        largest, least = np.linalg.svd(sides[:2], compute_uv=False)
        found.append(bool(least >= 0.12 and largest <= 8 and largest <= 4 * least))
    return np.array(found)


@pytest.mark.parametrize("spread", [0.4, 0.6, 2.0])
def test_maps_that_an_edit_may_make(spread: float) -> None:
    maps = maps_of(np.random.default_rng(3), 400, spread)
    expected = sane(maps)
    assert 0 < expected.sum() < 400
    assert np.array_equal(geometry._sane(maps), expected)
    assert not geometry._sane(np.full((1, 3, 3), np.nan)).any()
    assert not geometry._sane(np.zeros((1, 3, 3))).any()


def through(images: Array) -> Array:
    """The map of POINTS to their images [4, 2], by its eight equations."""
    rows, wanted = [], []
    for (x, y), (u, v) in zip(POINTS, images, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -x * u, -y * u], [0, 0, 0, x, y, 1, -x * v, -y * v]]
        wanted += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(wanted)), 1).reshape(3, 3)


def test_the_map_through_four_points() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        images = POINTS + rng.normal(0, 0.1, (4, 2))
        np.testing.assert_allclose(geometry._through(images), through(images), atol=1e-9)
    np.testing.assert_allclose(geometry._through(POINTS[::-1].copy()), through(POINTS[::-1]), atol=1e-12)
    on_a_line = np.array([[0.0, 0], [1, 1], [2, 2], [3, 3]])
    assert np.isnan(geometry._through(on_a_line)).all()
    assert not geometry._sane(geometry._through(on_a_line)[None]).any()


def test_maps_that_are_too_near_to_a_better_one_are_left_out() -> None:
    maps = maps_of(np.random.default_rng(1), 60, 0.05)
    images = transformed(maps, POINTS)
    chosen: list[int] = []
    for k in range(60):
        if all(np.abs(images[k] - images[other]).max() > 0.06 for other in chosen):
            chosen.append(k)
    assert 6 < len(chosen) < 60
    assert geometry._distinct(maps, 60).tolist() == chosen
    assert geometry._distinct(maps, 6).tolist() == chosen[:6]


@pytest.mark.parametrize("grids", [(8, 8), (5, 7), (2, 2)])
@pytest.mark.parametrize("moves", ["affine", "projective"])
def test_maps_are_improved_as_step_by_step(moves: str, grids: tuple[int, int]) -> None:
    evidence = evidence_of(grids[0], grids)
    steps = {"affine": geometry._AFFINE, "projective": geometry._PROJECTIVE}[moves]
    begun = np.array([[0.5, 0, 0.2], [0, 0.6, 0.1], [0, 0, 1.0]]) + np.zeros((3, 1, 1))
    begun[1, 0, 2], begun[2, 1, 1] = 0.3, 0.45
    maps, scores = geometry._improved(evidence, begun, steps)
    for k in range(3):
        best, image = evidence.total(begun[k : k + 1])[0], transformed(begun[k : k + 1], POINTS)[0]
        at, step = begun[k], 0.06
        for _ in range(24):
            tried = np.array([through(image + step * move) for move in steps])
            value = np.where(sane(tried), evidence.total(tried), -np.inf)
            n = int(value.argmax())
            if value[n] > best + 1e-6:
                image, at, best = image + step * steps[n], tried[n], value[n]
            else:
                step /= 2
                if step < 0.001:
                    break
        np.testing.assert_allclose(maps[k], at, atol=1e-7)
        assert scores[k] == pytest.approx(best, abs=1e-6)
        assert scores[k] == pytest.approx(evidence.total(maps[k : k + 1])[0], abs=1e-6)
    assert (scores >= evidence.total(begun)).all()
