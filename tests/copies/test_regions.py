from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from copynce.copies.geometry import Evidence, centres
from copynce.copies.polygons import clipped, mapped, overlap, rectangle
from copynce.copies.regions import TEMPERATURE, CopiedRegion, copied_region

Array = NDArray[np.float64]
QUERY, REFERENCE = (400, 300), (320, 640)


def field(points: Array, seed: int = 0) -> Array:
    """Tokens [n, 96] of a picture that looks alike only within about a patch of an 8 x 8 grid."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(scale=9.0, size=(2, 48))
    phases = points @ waves
    return np.concatenate([np.cos(phases), np.sin(phases)], 1)


def turned(degrees: float, scale: float = 1.0) -> Array:
    """About the middle of the square."""
    cos, sin = (scale * f(math.radians(degrees)) for f in (math.cos, math.sin))
    matrix = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    matrix[:2, 2] = 0.5 - matrix[:2, :2] @ [0.5, 0.5]
    return matrix


#: Maps of the query's unit square to the reference's.
GEOMETRIES = {
    "the same": np.eye(3),
    "mirrored": np.array([[-1, 0, 1.0], [0, 1, 0], [0, 0, 1]]),
    "a crop": np.array([[0.6, 0, 0.3], [0, 0.5, 0.1], [0, 0, 1]]),
    "pasted": np.array([[2, 0, -0.4], [0, 1.8, -0.5], [0, 0, 1]]),
    "upside down": turned(180.0),
    "turned and padded": turned(33.0, 1.3),
    "tilted": np.array([[1.1, 0.1, -0.1], [0.0, 1.2, -0.05], [0.25, 0.1, 1]]),
}


def pair(geometry: Array, grid: int, box: Array | None = None) -> tuple[Array, Array]:
    """Tokens of a query and its reference; beyond the reference's square, or `box` of it, the query shows another
    picture."""
    there = mapped(geometry, centres(grid))
    box = rectangle(1, 1) if box is None else box
    shown = ((there >= box.min(0)) & (there <= box.max(0))).all(1)
    return np.where(shown[:, None], field(there), field(centres(grid), seed=1)), field(centres(grid))


def found(geometry: Array, grid: int = 8, box: Array | None = None) -> CopiedRegion:
    return copied_region(*pair(geometry, grid, box), QUERY, REFERENCE)


def regions(geometry: Array, box: Array | None = None) -> tuple[Array, Array]:
    """The true polygons, in pixels."""
    unit = rectangle(1, 1)
    query = clipped(mapped(np.linalg.inv(geometry), unit if box is None else box), unit)
    return query * QUERY, mapped(geometry, query) * REFERENCE


@pytest.mark.parametrize("name", GEOMETRIES)
def test_region_of_an_edit(name: str) -> None:
    geometry = GEOMETRIES[name]
    region = found(geometry)
    query, reference = regions(geometry)
    assert region.verdict == "found"
    assert overlap(region.query, query) > 0.85
    assert overlap(region.reference, reference) > 0.85
    assert region.mirrored == (name == "mirrored")
    # The geometry takes the one region to the other, in pixels.
    assert overlap(mapped(region.geometry, region.query), region.reference) > 0.999
    assert region.query_share == pytest.approx(overlap(region.query, rectangle(*QUERY)))
    assert region.inliers >= 0.6 * region.matches


def test_a_cut_copy_on_another_picture_ends_at_the_cut() -> None:
    geometry, box = GEOMETRIES["pasted"], rectangle(0.9, 0.5, 0.05, 0.05)
    region = found(geometry, 16, box)
    query, reference = regions(geometry, box)
    assert overlap(region.query, query) > 0.8
    assert overlap(region.reference, reference) > 0.8


def test_a_pair_that_shares_nothing_has_no_region() -> None:
    region = copied_region(field(centres(8)), field(centres(8), seed=1), QUERY, REFERENCE)
    assert region.verdict == "place unknown"
    told = region.to_json()
    assert told["query_region"] is None
    assert told["query_share"] is None


@pytest.mark.parametrize("tokens", [np.ones((64, 8)), np.zeros((64, 8))], ids=["all alike", "all zero"])
def test_tokens_that_tell_nothing(tokens: Array) -> None:
    assert copied_region(tokens, tokens, QUERY, REFERENCE).verdict == "place unknown"


def test_the_same_twice() -> None:
    tokens = pair(GEOMETRIES["tilted"], 8)
    one, other = (copied_region(*tokens, QUERY, REFERENCE).to_json() for _ in range(2))
    assert one == other


def test_inputs_that_do_not_fit() -> None:
    tokens = np.ones((64, 8))
    with pytest.raises(ValueError, match=r"query_tokens must be \[L, C\].*got \[63, 8\]"):
        copied_region(tokens[1:], tokens, QUERY, REFERENCE)
    with pytest.raises(ValueError, match="same channels, got 8 and 7"):
        copied_region(tokens, tokens[:, 1:], QUERY, REFERENCE)
    with pytest.raises(ValueError, match=r"reference_size must be .*got \(0, 3\)"):
        copied_region(tokens, tokens, QUERY, (0, 3))


def test_examples() -> None:
    assert doctest.testmod(importlib.import_module("copynce.copies.polygons")).failed == 0


@pytest.mark.parametrize("grids", [(2, 2), (8, 8), (5, 9)])
def test_what_is_said_in_all_is_the_sum_of_what_each_patch_says(grids: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(grids))
    evidence = Evidence.of(rng.uniform(-1, 1, (grids[0] ** 2, grids[1] ** 2)), TEMPERATURE)
    maps = np.eye(3) + rng.normal(0, 0.4, (200, 3, 3))  # some squeeze, some fall outside, some have a horizon
    _, query, _, reference = evidence.heard(maps)
    said = evidence.total(maps)
    assert (said == 0).any()
    assert (said != 0).sum() > 100
    np.testing.assert_allclose(said, query.sum(1) + reference.sum(1), rtol=1e-9, atol=1e-9)
