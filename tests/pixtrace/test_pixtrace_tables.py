"""Coordinate tables: against hand-computed cases, a point-by-point oracle and the step-by-step twin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copynce.pixtrace import (
    Affine,
    ColorJitter,
    CoordinateTable,
    Crop,
    Edit,
    EditProgram,
    Erase,
    HorizontalFlip,
    Matte,
    Overlay,
    Pad,
    PasteOnto,
    Perspective,
    RelativeMatte,
    Remap,
    Resize,
    Rotation,
    Shift,
    Stamp,
    Stretch,
    Swirl,
    Tilt,
    VerticalFlip,
    Wave,
    bridge,
    patch_counts,
    patch_overlap,
    sample_program,
    trace,
    trace_view,
)
from copynce.pixtrace.view.pointwise import pull

property_test = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Twin = Callable[..., np.ndarray]


def grid_of(size: tuple[int, int]) -> np.ndarray:
    return np.arange(size[0] * size[1], dtype=np.int32).reshape(size)


# ------------------------------------------------------------------------------------------ cases by hand


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (63, 257), (336, 336)], ids=str)
def test_no_edit_is_the_identity(size: tuple[int, int]) -> None:
    assert (trace((), size, size).index == grid_of(size)).all()
    assert (EditProgram(()).trace((2 * size[0] + 1, 3 * size[1]), size).index == grid_of(size)).all()


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (63, 257)], ids=str)
def test_flips_are_exact(size: tuple[int, int]) -> None:
    assert (trace((HorizontalFlip(),), size, size).index == grid_of(size)[:, ::-1]).all()
    assert (trace((VerticalFlip(),), size, size).index == grid_of(size)[::-1]).all()


@pytest.mark.parametrize("side", [1, 2, 31, 32, 224])
@pytest.mark.parametrize("angle", [0, 90, 180, 270, 360, -90])
def test_quarter_turns_have_no_error(side: int, angle: int) -> None:
    # Clockwise as seen: numpy's rot90 turns the other way.
    expected = np.rot90(grid_of((side, side)), k=-angle // 90)
    assert (trace((Rotation(float(angle)),), (side, side), (side, side)).index == expected).all()
    assert (trace((Rotation(float(angle)),), (side, side), (side, side), fused=False).index == expected).all()


def test_quarter_turn_of_a_landscape_keeps_the_canvas_and_cuts() -> None:
    # 4 x 6 about (3, 2): column x of the turned view shows row 4 - (x - 1) - 1; the outer columns show nothing.
    turned = np.rot90(grid_of((4, 6)), k=-1)[1:5]
    expected = np.full((4, 6), -1)
    expected[:, 1:5] = turned
    assert (trace((Rotation(90.0),), (4, 6), (4, 6)).index == expected).all()


def test_crop_keeps_its_box() -> None:
    assert (trace((Crop(2, 3, 4, 5),), (10, 12), (10, 12)).index == grid_of((10, 12))[2:6, 3:8]).all()


def test_pad_surrounds_with_nothing() -> None:
    expected = np.pad(grid_of((3, 4)), ((2, 4), (1, 3)), constant_values=-1)
    assert (trace((Pad(1, 2, 3, 4),), (3, 4), (3, 4)).index == expected).all()


def test_paste_shows_the_picture_in_its_box_only() -> None:
    expected = np.full((8, 9), -1)
    expected[1:4, 5:9] = grid_of((3, 4))
    assert (trace((PasteOnto(8, 9, 1, 5),), (3, 4), (3, 4)).index == expected).all()
    assert (trace((PasteOnto(8, 9, 1, 5, opacity=0.2),), (3, 4), (3, 4)).index == -1).all()


@pytest.mark.parametrize(
    ("edit", "hides"),
    [
        (Overlay(1, 2, 3, 4), True),
        (Overlay(1, 2, 3, 4, 0.4), False),
        (Overlay(1, 2, 3, 4, 0.6), True),
        (Erase(1, 2, 3, 4), True),
    ],
    ids=["opaque", "thin", "thick", "erase"],
)
def test_covers_hide_by_their_opacity(edit: Edit, hides: bool) -> None:
    expected = grid_of((6, 9))
    if hides:
        expected[1:4, 2:6] = -1
    assert (trace((edit,), (6, 9), (6, 9)).index == expected).all()
    assert (trace((edit,), (6, 9), (6, 9), fused=False).index == expected).all()


def test_thin_covers_hide_together_where_they_overlap() -> None:
    edits = (Overlay(0, 0, 4, 4, 0.4), Overlay(2, 2, 4, 4, 0.4))  # 0.6 * 0.6 < 0.5
    expected = grid_of((6, 6))
    expected[2:4, 2:4] = -1
    assert (trace(edits, (6, 6), (6, 6)).index == expected).all()
    assert (trace(edits, (6, 6), (6, 6), fused=False).index == expected).all()


def test_cropped_parts_do_not_come_back() -> None:
    """What a crop or the edge of a canvas cut off stays away when a later edit makes room."""
    shift = ((1.0, 0.0, 2.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    back = ((1.0, 0.0, -2.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    moved = trace((Affine(shift), Affine(back)), (3, 5), (3, 5)).index
    expected = grid_of((3, 5))
    expected[:, 3:] = -1
    assert (moved == expected).all()
    padded = trace((Crop(0, 1, 3, 2), Pad(2, 0, 2, 0)), (3, 5), (3, 5)).index
    assert (padded[:, :2] == -1).all()
    assert (padded[:, 2:4] == grid_of((3, 5))[:, 1:3]).all()
    assert (padded[:, 4:] == -1).all()


def test_half_pixel_shift_has_no_source_left_of_the_edge() -> None:
    """PROTOCOLS 7.4: the released code keeps a source of -0.5 and maps it to 0."""
    shift = (Affine(((1.0, 0.0, 0.75), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))),)
    assert trace(shift, (2, 4), (2, 4)).index[0].tolist() == [-1, 0, 1, 2]
    assert trace(shift, (2, 4), (2, 4), "released").index[0].tolist() == [0, 0, 1, 2]


def test_ties_go_right_and_down() -> None:
    """Centres that fall on a border of the grid or of the visible part, where rounding must not decide."""
    assert trace((Resize(1, 3),), (2, 6), (2, 6)).index[0].tolist() == [7, 9, 11]
    edits = (Pad(1, 1, 1, 1), Resize(6, 6))  # centres at 1, 3, ..., 11 of the padded 12: first inside, last outside
    index = trace(edits, (10, 10), (10, 10)).index
    assert index[0].tolist() == [0, 2, 4, 6, 8, -1]
    assert index[:, 0].tolist() == [0, 20, 40, 60, 80, -1]
    assert (index == trace(edits, (10, 10), (10, 10), fused=False).index).all()


def test_one_pixel_source() -> None:
    program = EditProgram((Rotation(33.0), Tilt(((0.1, 0.2), (0.3, 0.1), (0.0, 0.2), (0.4, 0.0)))))
    index = program.trace((1, 1), (16, 16)).index
    assert (index >= 0).any()
    assert (index == -1).any()


def test_points_behind_the_viewer_show_nothing() -> None:
    # The line at infinity crosses the output: right of x = 20 the map would show the picture again, mirrored.
    edit = Perspective(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.05, 0.0, 1.0)))
    seen = trace((Stretch(0.5, 0.5), edit), (40, 40), (40, 40)).index
    twin = trace((Stretch(0.5, 0.5), edit), (40, 40), (40, 40), fused=False).index
    assert ((seen >= 0) == (twin >= 0)).mean() > 0.99
    _, columns = np.nonzero(seen >= 0)
    assert columns.max() < 20


def test_extreme_downscale_and_tiny_sources() -> None:
    index = trace((Crop(0, 0, 3000, 4000), Resize(7, 5), Resize(224, 224)), (3000, 4000), (224, 224)).index
    assert (index == grid_of((224, 224))).all()
    index = EditProgram((Pad(0, 3, 1, 2),)).trace((1, 1), (336, 336)).index
    assert (index >= 0).mean() == pytest.approx(1 / 12)


def test_photometric_edits_leave_coordinates_alone() -> None:
    assert (trace((ColorJitter(0.5, 1.2, 0.9, 0.1),), (9, 8), (9, 8)).index == grid_of((9, 8))).all()


# ------------------------------------------------------------------------------------------ twins


@property_test
@given(seed=st.integers(0, 10**6), length=st.integers(1, 6))
def test_composed_equals_the_points_pulled_back_edit_by_edit(
    seed: int,
    length: int,
    exact: Twin,
    agree: Callable[..., tuple[float, float]],
    chain_of: Callable[..., tuple[Edit, ...]],
) -> None:
    rng = np.random.default_rng(seed)
    source = (int(rng.integers(20, 300)), int(rng.integers(20, 300)))
    grid = (int(rng.integers(16, 100)), int(rng.integers(16, 100)))
    edits = chain_of(rng, length, source, 4)
    found, expected = trace(edits, source, grid).index, exact(edits, source, grid)
    visible, _ = agree(found, expected, grid[1])
    both = (found >= 0) & (expected >= 0)
    # Only centres on a border up to rounding may differ.
    assert visible > 0.999
    assert not both.any() or (found == expected)[both].mean() > 0.999


@property_test
@given(seed=st.integers(0, 10**6), length=st.integers(1, 6))
def test_composed_equals_step_by_step(
    seed: int, length: int, agree: Callable[..., tuple[float, float]], chain_of: Callable[..., tuple[Edit, ...]]
) -> None:
    """Within one pixel on 99.5 %.

    Each step of the twin rounds to the pixels of its stage, so the stages keep five pixels per grid pixel and more:
    what differs by more would be a fault of the composition and not the twin's own blur.
    """
    rng = np.random.default_rng(seed)
    edits = (*chain_of(rng, length, (400, 500), 300), Resize(60, 50))
    found, twin = trace(edits, (400, 500), (60, 50)).index, trace(edits, (400, 500), (60, 50), fused=False).index
    visible, close = agree(found, twin, 50)
    assert visible > 0.98
    assert close >= 0.995


@property_test
@given(seed=st.integers(0, 10**6), length=st.integers(1, 6))
def test_bounds_leave_nothing_out(seed: int, length: int, chain_of: Callable[..., tuple[Edit, ...]]) -> None:
    """What is passed over shows nothing: equal to the same tables that look everywhere."""

    def everywhere(table: CoordinateTable) -> CoordinateTable:
        twin = dataclasses.replace(table)
        object.__setattr__(twin, "bounds", np.tile(np.array([0, table.shape[1]], np.int64), (table.shape[0], 1)))
        return twin

    rng = np.random.default_rng(seed)
    source, grid = (90, 120), (60, 50)
    q, r = (trace((*chain_of(rng, length, source, 4), Resize(*grid)), source, grid) for _ in range(2))
    if q.forward is None or r.forward is None:
        return
    both = bridge(q, r)
    for table, twin in ((both, bridge(everywhere(q), everywhere(r))), (both.reverse(), everywhere(both).reverse())):
        assert (table.index == twin.index).all()
        assert table.bounds is not None
        x = np.arange(table.shape[1])
        outside = (x < table.bounds[:, :1]) | (x >= table.bounds[:, 1:])
        assert (table.index[outside] == -1).all()
        assert (patch_counts(table, 10) == patch_counts(everywhere(table), 10)).all()
    # A table that does not know its bounds finds them.
    assert (CoordinateTable(both.index, grid, both.forward).reverse().index == both.reverse().index).all()


@pytest.mark.parametrize("policy", ["descriptor", "matcher", "phase2"])
def test_sampled_programs_equal_the_oracle(policy: str, exact: Twin, agree: Callable[..., tuple[float, float]]) -> None:
    visible, same = [], []
    for k in range(60):
        program = sample_program(policy, seed=3, epoch=0, uuid=f"T{k:06d}")
        shape = ((333, 500), (480, 640), (64, 48), (500, 200))[k % 4]
        found = program.trace(shape, (112, 112)).index
        expected = exact((*program.edits, Resize(112, 112)), shape, (112, 112))
        visible.append(agree(found, expected, 112)[0])
        both = (found >= 0) & (expected >= 0)
        same.append((found == expected)[both].mean() if both.any() else 1.0)
    assert min(visible) > 0.998
    assert min(same) > 0.998


SPECIAL: dict[str, tuple[Edit, ...]] = {
    "swirl": (Swirl(0.3, 0.45),),
    "wave": (Rotation(10.0), Wave(0.03, 0.05, 2.0, 0.1), Crop(10, 20, 80, 70)),
    "matte": (RelativeMatte(("00110", "01111", "11110", "01100"), 0.7, 30.0, 0.4, 0.6), HorizontalFlip()),
    "stamp": (Rotation(20.0), Stamp(("101", "010"), 20, 30, 60, 90), Crop(10, 10, 150, 160)),
    "matte, then swirl, then stamp": (
        RelativeMatte(("0110", "1111", "0110"), 0.9, -20.0, 0.5, 0.5),
        Swirl(0.2, 0.6),
        Stamp(("1",), 5, 5, 20, 20),
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_edits_that_are_no_single_map_equal_the_twin(name: str, agree: Callable[..., tuple[float, float]]) -> None:
    # The relative edits resize to the grid, so the grid is the finest stage; the view is a quarter of it.
    edits = (*SPECIAL[name], Resize(56, 56))
    found = trace(edits, (300, 400), (224, 224))
    twin = trace(edits, (300, 400), (224, 224), fused=False)
    both = (found.index >= 0) & (twin.index >= 0)
    assert both.any()
    assert (found.index == -1).any() or name == "swirl"
    assert ((found.index >= 0) == (twin.index >= 0)).mean() > 0.97
    off = np.abs(found.coordinates() - twin.coordinates())[:, both].max(axis=0)
    assert (off <= 3).mean() > 0.97  # up to one pixel per nearest-neighbour step of the twin
    assert np.median(off) <= 1
    assert (found.forward is None) == any(isinstance(edit, (Swirl, Wave)) for edit in edits)


def test_pull_equals_the_kernel(chain_of: Callable[..., tuple[Edit, ...]]) -> None:
    """The point-by-point way through a view, which remapped views take, against the fused kernel."""
    rng = np.random.default_rng(5)
    for _ in range(10):
        view = EditProgram(chain_of(rng, 4, (90, 120), 20)).composed((90, 120), (48, 64))
        y, x = np.mgrid[:48, :64] + 0.5
        u, v, weight = pull(view, x, y)
        expected = np.where(weight >= 126.5, np.floor(v * 48 + 1e-7) * 64 + np.floor(u * 64 + 1e-7), -1)
        assert (trace_view(view, (48, 64)).index == expected).mean() > 0.998


def test_remap_by_a_crop_is_the_crop() -> None:
    y, x = np.mgrid[3:23, 5:35] + 0.5
    field = np.stack([x, y], axis=-1)
    table = trace((Remap(field),), (40, 50), (40, 50))
    assert (table.index == grid_of((40, 50))[3:23, 5:35]).all()
    assert (trace((Remap(field),), (40, 50), (40, 50), fused=False).index == table.index).all()
    outside = trace((Remap(field - 10.0),), (40, 50), (40, 50)).index
    assert (outside[:7] == -1).all()
    assert (outside[:, :5] == -1).all()
    assert (outside[7:, 5:] == grid_of((40, 50))[:13, :25]).all()


def test_matte_shows_the_object_only() -> None:
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 2:5] = 1
    double = ((2.0, 0.0, 1.0), (0.0, 2.0, 3.0), (0.0, 0.0, 1.0))
    table = trace((Matte(mask, double, 12, 14),), (4, 6), (4, 6))
    expected = np.full((12, 14), -1)
    expected[3:11, 1:13] = np.where(mask, grid_of((4, 6)), -1).repeat(2, axis=0).repeat(2, axis=1)
    assert (table.index == expected).all()
    assert (trace((Matte(mask, double, 12, 14),), (4, 6), (4, 6), fused=False).index == expected).all()
    reverse = table.reverse().index
    assert ((reverse >= 0) == (mask > 0)).all()  # no holes, nothing but the object


def test_stamp_hides_where_it_paints() -> None:
    expected = grid_of((6, 8))
    expected[1:3, 2:4] = -1
    expected[3:5, 4:6] = -1
    assert (trace((Stamp(("10", "01"), 1, 2, 4, 4),), (6, 8), (6, 8)).index == expected).all()
    assert (trace((Stamp(("10", "01"), 1, 2, 4, 4, opacity=0.3),), (6, 8), (6, 8)).index == grid_of((6, 8))).all()


# ------------------------------------------------------------------------------------------ Definition 1


@pytest.mark.parametrize("mode", ["exact", "released"])
def test_definition_1(mode: str) -> None:
    """T0, F(T), T[c] and T^-1 by hand, in both modes."""
    table = CoordinateTable.identity((4, 6), mode)  # type: ignore[arg-type]
    flipped = table.update(HorizontalFlip()).update(Crop(1, 2, 3, 3))
    assert (flipped.index == grid_of((4, 6))[1:4, ::-1][:, 2:5]).all()
    y, x = flipped.coordinates()
    assert y.tolist() == [[1] * 3, [2] * 3, [3] * 3]
    assert x.tolist() == [[3, 2, 1]] * 3
    reverse = flipped.reverse()
    assert reverse.shape == (4, 6)
    for i in range(3):
        for j in range(3):
            assert reverse.index[y[i, j], x[i, j]] == 3 * i + j
    assert (reverse.index >= 0).sum() == 9
    assert flipped.update(ColorJitter()) is flipped


def test_stepwise_is_update_after_update(chain_of: Callable[..., tuple[Edit, ...]]) -> None:
    edits = chain_of(np.random.default_rng(8), 5, (60, 70), 30, layers=False)
    table = CoordinateTable.identity((60, 70))
    for edit in edits:
        table = table.update(edit)
    assert (table.index == trace(edits, (60, 70), (60, 70), fused=False).index).all()
    assert np.allclose(table.forward, trace(edits, (60, 70), (60, 70)).forward)


def test_update_by_layers() -> None:
    table = CoordinateTable.identity((4, 6))
    assert (table.update(Erase(1, 1, 2, 2)).index == trace((Erase(1, 1, 2, 2),), (4, 6), (4, 6)).index).all()
    assert (table.update(PasteOnto(9, 9, 3, 2)).index == trace((PasteOnto(9, 9, 3, 2),), (4, 6), (4, 6)).index).all()
    assert (table.update(PasteOnto(9, 9, 3, 2, 0.1)).index == -1).all()


# ------------------------------------------------------------------------------------------ errors


EYE = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
FAR = ((1, 0, 0), (0, 1, 0), (0.2, 0, -0.5))  # sends the line x = 2.5 to infinity
SQUARE = CoordinateTable.identity((4, 4))
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: trace((), (0, 5)), r"source_shape must be .* got \(0, 5\)"),
    (lambda: trace((), (5, 5), (0, 3)), r"grid must be .* got \(0, 3\)"),
    (lambda: trace((), (5, 5), mode="nearest"), "mode must be 'exact' or 'released', got 'nearest'"),  # type: ignore[arg-type]
    (lambda: trace((Crop(3, 0, 3, 2),), (5, 5)), "Crop must lie inside of the 5x5 picture, got top=3"),
    (lambda: trace((Overlay(0, 4, 2, 2),), (5, 5)), "Overlay must lie inside of the 5x5 picture"),
    (lambda: trace((Erase(0, 4, 2, 2),), (5, 5)), "Erase must lie inside"),
    (lambda: trace((Stamp(("1",), 0, 4, 2, 2),), (5, 5)), "Stamp must lie inside"),
    (
        lambda: trace((PasteOnto(4, 9, 0, 0),), (5, 5)),
        "PasteOnto must keep the 5x5 picture inside of its canvas of 4x9",
    ),
    (lambda: trace((Matte(("11",), EYE, 5, 5),), (5, 5)), "Matte.mask must have the size of the picture, 5x5, got 1x2"),
    (lambda: trace((Perspective(FAR),), (5, 5)), "Perspective.matrix must keep the centre of the 5x5"),
    (lambda: trace((Swirl(0.1),), (5, 5), mode="released"), "mode='released' has no table for Remap"),
    (lambda: bridge(SQUARE, CoordinateTable.identity((4, 5))), "must lead to the same source grid"),
    (lambda: bridge(SQUARE, CoordinateTable.identity((4, 4), "released")), "must have one mode"),
    (lambda: SQUARE.then(CoordinateTable.identity((4, 5))), r"other must be a table of the \(4, 4\)"),
    (lambda: patch_overlap(CoordinateTable.identity((30, 32))), r"patch_size must divide the view \(30, 32\)"),
    (lambda: CoordinateTable(np.full((2, 2), 4, np.int32), (2, 2)), r"index must lie in \[-1, 4\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:25] for _, message in BAD])
def test_bad_input_names_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"index must be an int32 array \[H, W\], got int64"):
        CoordinateTable(np.zeros((2, 2), np.int64), (2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype must be numpy"):
        patch_counts(CoordinateTable.identity((32, 32)), 16, np.int32)


def test_shift_leaves_nothing_behind() -> None:
    assert (trace((Shift(1.0, 0.0),), (6, 6), (6, 6)).index == -1).all()
    assert (trace((Shift(0.5, 0.0),), (6, 6), (6, 6)).index[:, 3:] == grid_of((6, 6))[:, :3]).all()


def test_no_matrix_leads_out_of_the_grid() -> None:
    """Wild maps, horizons across the picture, tiny and huge scales: every index stays in its grid."""
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(400):
        matrix = rng.normal(size=(3, 3)) * 10.0 ** rng.integers(-6, 7, (3, 3))
        try:
            edit: Edit = Perspective(matrix.tolist())
            if rng.random() < 0.4:
                edit = Affine(((*matrix[0],), (*matrix[1],), (0.0, 0.0, 1.0)))
            view = trace((edit, Pad(1, 0, 2, 3)), (13, 17), (11, 9))
        except ValueError:
            continue  # as good as singular, or the centre went to infinity
        other = trace((Rotation(20.0),), (13, 17), (11, 9))
        for table in (view, view.reverse(), bridge(view, other), bridge(other, view)):
            CoordinateTable(table.index, table.grid_shape)  # checks the range
        checked += 1
    assert checked > 200
