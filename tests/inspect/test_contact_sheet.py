"""The contact sheet: every edit is on it, and its lines run where the table says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from copynce.data.synthetic import make_pictures
from copynce.inspect.contact_sheet import COLOURS, MOVING, contact_sheet, draw_source_grid, draw_traced_grid
from copynce.pixtrace import CoordinateTable, HorizontalFlip, Photometric, trace
from copynce.pixtrace.edits import PHOTOMETRIC_ORDER


def test_the_sheet_has_a_cell_for_every_edit(tmp_path: Path) -> None:
    sheet = contact_sheet(make_pictures(tmp_path, 2, seed=1), size=32, columns=4)
    rows = -(-(len(MOVING) + len(COLOURS)) // 4)
    assert sheet.size == (4 * (3 * 36 - 4 + 12) + 12, rows * (20 + 32 + 12) + 12)
    assert {type(edit) for three in COLOURS.values() for edit in three} == set(PHOTOMETRIC_ORDER)
    moving = {type(c) for edits in MOVING.values() for edit in edits for c in edit.absolute(300, 300, (32, 32))}
    wanted = "Crop Resize HorizontalFlip VerticalFlip Affine Perspective Pad PasteOnto Matte Overlay Stamp Erase Remap"
    assert {kind.__name__ for kind in moving if not issubclass(kind, Photometric)} == set(wanted.split())


def test_lines_follow_the_table_and_hidden_pixels_are_grey() -> None:
    picture = np.full((64, 64, 3), 10, np.uint8)
    straight = draw_source_grid(picture)
    changed = (straight != 10).any(axis=2)
    assert np.flatnonzero(changed[1]).tolist() == list(range(7, 63, 8))
    mirrored = draw_traced_grid(picture, trace((HorizontalFlip(),), (64, 64), (64, 64)))
    # A line is drawn on the pixel left of it, which after mirroring is the other one.
    np.testing.assert_array_equal(mirrored[1, :-1], straight[1, :-1][::-1])
    nothing = draw_traced_grid(picture, CoordinateTable(np.full((64, 64), -1, np.int32), (64, 64)))
    assert (nothing == nothing[0, 0, 0]).all()
    assert nothing[0, 0, 0] > 100


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pictures must be at least two, got 1"):
        contact_sheet(make_pictures(tmp_path, 1))
