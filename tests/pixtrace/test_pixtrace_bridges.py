"""Tables reversed, bridged through a shared source, and counted into patch overlaps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copynce.pixtrace import (
    CoordinateTable,
    Crop,
    Edit,
    EditProgram,
    HorizontalFlip,
    Pad,
    PasteOnto,
    Resize,
    Rotation,
    Swirl,
    bridge,
    patch_counts,
    patch_overlap,
    trace,
)

property_test = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def grid_of(size: tuple[int, int]) -> np.ndarray:
    return np.arange(size[0] * size[1], dtype=np.int32).reshape(size)


@property_test
@given(seed=st.integers(0, 10**6))
def test_reverse_of_reverse(seed: int, chain_of: Callable[..., tuple[Edit, ...]]) -> None:
    """Projective: the same table on nearly all visible pixels. Scattered: a part of it, each grid pixel kept once."""
    edits = (*chain_of(np.random.default_rng(seed), 3, (300, 300), 200, layers=False), Resize(60, 60))
    table = trace(edits, (300, 300), (60, 60))
    twice = table.reverse().reverse()
    both = (table.index >= 0) & (twice.index >= 0)
    assert (table.index == twice.index)[both].all()
    scattered = CoordinateTable(table.index, (60, 60))
    again = scattered.reverse().reverse()
    kept = again.index >= 0
    assert (again.index == table.index)[kept].all()
    assert set(np.unique(again.index)) | {-1} == set(np.unique(table.index)) | {-1}


def test_reverse_through_the_forward_map_has_no_holes() -> None:
    """PROTOCOLS 7.4: a copy shrunk to 15 % of the area covers 15 % of the reverse table when scattered."""
    edits = (Resize(87, 87), PasteOnto(224, 224, 50, 40))
    table = trace(edits, (640, 480), (224, 224))
    assert (table.index >= 0).mean() == pytest.approx((87 / 224) ** 2)
    assert (table.reverse().index >= 0).all()
    assert (CoordinateTable(table.index, (224, 224)).reverse().index >= 0).mean() < 0.16


def test_scatter_keeps_the_last_in_raster_order() -> None:
    table = CoordinateTable(np.array([[2, 2, -1], [0, 2, 3]], np.int32), (2, 2))
    assert table.reverse().index.tolist() == [[3, -1], [4, 5]]


@property_test
@given(seed=st.integers(0, 10**6))
def test_bridge_of_a_view_with_itself_is_the_identity(seed: int, chain_of: Callable[..., tuple[Edit, ...]]) -> None:
    edits = chain_of(np.random.default_rng(seed), 4, (100, 120), 30)
    table = trace(edits, (100, 120), (50, 40))
    bridged = bridge(table, table)
    assert (bridged.index == np.where(table.index >= 0, grid_of(table.shape), -1)).all()


def test_bridge_of_two_edited_copies(agree: Callable[..., tuple[float, float]]) -> None:
    """Both edited: through the composed map, against looking the pixels up in fine tables."""
    query = (HorizontalFlip(), Crop(40, 50, 400, 500), Resize(224, 224))
    reference = (Rotation(20.0), Crop(60, 80, 380, 480), Resize(224, 224))
    q, r = trace(query, (480, 640), (224, 224)), trace(reference, (480, 640), (224, 224))
    fine = (1120, 1120)
    q_fine, r_fine = trace(query, (480, 640), fine), trace(reference, (480, 640), fine)
    looked_up = q_fine.then(CoordinateTable(r_fine.reverse().index, (224, 224)))
    visible, close = agree(bridge(q, r).index, looked_up.index, 224)
    assert visible > 0.98
    assert close > 0.999
    back = bridge(r, q)
    visible, close = agree(back.index, bridge(q, r).reverse().index, 224)
    assert visible > 0.98
    assert close > 0.999


def test_bridge_without_a_shared_pixel_is_empty() -> None:
    left = trace((Crop(0, 0, 40, 20), Resize(32, 32)), (40, 40), (32, 32))
    right = trace((Crop(0, 20, 40, 20), Resize(32, 32)), (40, 40), (32, 32))
    for table in (bridge(left, right), bridge(right, left), bridge(left, right).reverse()):
        assert (table.index == -1).all()
        assert patch_overlap(table).sum() == 0


def test_bridge_through_a_dense_map(agree: Callable[..., tuple[float, float]]) -> None:
    swirled = trace((Swirl(0.1, 0.5), Resize(224, 224)), (480, 640), (224, 224))
    plain = trace((Resize(224, 224),), (480, 640), (224, 224))
    assert (bridge(swirled, plain).index == swirled.index).all()
    _, close = agree(bridge(plain, swirled).index, swirled.reverse().index, 224)
    assert close == 1.0


def test_then_and_reverse_follow_the_composed_map() -> None:
    first, second = (Crop(4, 6, 20, 30), Resize(40, 60)), (HorizontalFlip(), Crop(0, 10, 40, 40))
    table = trace(second, (40, 60), (40, 60)).then(trace(first, (40, 60), (40, 60)))
    whole = trace((*first, *second), (40, 60), (40, 60))
    assert (table.index == whole.index).all()
    assert np.allclose(table.forward, whole.forward)
    identity = CoordinateTable.identity((40, 60))
    assert (whole.then(identity).index == whole.index).all()


# ------------------------------------------------------------------------------------------ patches


def brute_counts(table: CoordinateTable, patch: int) -> np.ndarray:
    y, x = table.coordinates()
    height, width = table.shape
    columns, grid_columns = width // patch, table.grid_shape[1] // patch
    counts = np.zeros(((height // patch) * columns, (table.grid_shape[0] // patch) * grid_columns), np.int64)
    for i in range(height):
        for j in range(width):
            if y[i, j] >= 0:
                counts[i // patch * columns + j // patch, y[i, j] // patch * grid_columns + x[i, j] // patch] += 1
    return counts


@pytest.mark.parametrize(
    ("view", "grid", "patch"),
    [
        ((32, 48), (48, 16), 16),
        ((28, 42), (56, 14), 14),
        ((10, 15), (20, 5), 5),
        ((6, 6), (9, 3), 3),
        ((4, 4), (4, 4), 1),
    ],
    ids=str,
)
def test_patch_counts_by_brute_force(view: tuple[int, int], grid: tuple[int, int], patch: int) -> None:
    rng = np.random.default_rng(patch)
    index = rng.integers(-1, grid[0] * grid[1], view).astype(np.int32)
    index[rng.random(view) < 0.3] = -1
    table = CoordinateTable(index, grid)
    expected = brute_counts(table, patch)
    assert (patch_counts(table, patch) == expected).all()
    assert patch_overlap(table, patch) == pytest.approx(expected / patch**2)
    assert patch_overlap(table, patch).dtype == np.float32


@pytest.mark.parametrize(("side", "patch"), [(224, 16), (224, 14), (336, 16), (336, 14)])
def test_patch_overlap_sums(side: int, patch: int) -> None:
    table = EditProgram((Rotation(30.0), Pad(20, 0, 10, 5))).trace((480, 640), (side, side))
    counts, overlap = patch_counts(table, patch), patch_overlap(table, patch)
    assert counts.shape == ((side // patch) ** 2,) * 2
    assert counts.sum() == (table.index >= 0).sum()
    assert overlap.sum(axis=1).max() <= 1.0 + 1e-6
    identity = CoordinateTable.identity((side, side))
    assert (patch_overlap(identity, patch) == np.eye((side // patch) ** 2, dtype=np.float32)).all()
    saturated = patch_counts(identity, patch, np.uint8)
    assert saturated.dtype == np.uint8
    assert saturated.max() == min(255, patch**2)
