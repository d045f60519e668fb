from __future__ import annotations

import numpy as np
import pytest

from copynce.inspect import draw_affinity, draw_entropy, draw_loss_curves, draw_traced_pixels
from copynce.inspect.drawing import PANEL_PX

WHITE = (255, 255, 255)


def picture(height: int, width: int, colour: tuple[int, int, int] = (200, 40, 40)) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def shifted(side: int, by: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables of a square picture moved right by some pixels."""
    query = np.full((side, side), -1, np.int32)
    index = np.arange(side * side, dtype=np.int32).reshape(side, side)
    query[:, by:] = index[:, : side - by]
    reference = np.full((side, side), -1, np.int32)
    reference[:, : side - by] = index[:, by:]
    return query, reference


def test_copied_pixels_keep_their_colour_and_the_rest_is_grey() -> None:
    q2r, r2q = shifted(40, 20)
    board = np.asarray(draw_traced_pixels(picture(40, 40), picture(40, 40), q2r, r2q, dots=3, lines=0)).astype(int)
    top = board.shape[0] - PANEL_PX
    y = top + 20  # above the first row of dots
    left_half, right_half = PANEL_PX // 4, 3 * PANEL_PX // 4
    origin = board.shape[1] - PANEL_PX  # left edge of the reference
    assert np.ptp(board[y, left_half]) == 0
    assert tuple(board[y, right_half]) == (200, 40, 40)
    assert tuple(board[y, origin + left_half]) == (200, 40, 40)
    assert np.ptp(board[y, origin + right_half]) == 0


def test_pictures_of_different_sizes_and_no_copy() -> None:
    nothing = np.full((30, 40), -1, np.int32)
    board = draw_traced_pixels(picture(30, 40), picture(50, 25), nothing, np.full((50, 25), -1, np.int32))
    assert board.mode == "RGB"
    assert board.height > PANEL_PX


def test_tables_that_do_not_fit() -> None:
    q2r, r2q = shifted(40, 20)
    with pytest.raises(
        ValueError, match=r"query_to_reference must have its picture's shape \[40, 30\], got \[40, 40\]"
    ):
        draw_traced_pixels(picture(40, 30), picture(40, 40), q2r, r2q)
    with pytest.raises(ValueError, match=r"query_to_reference must lie below 400, .* got 1579"):
        draw_traced_pixels(picture(40, 40), picture(20, 20), q2r, np.full((20, 20), -1, np.int32))


def test_affinity_shows_heat_where_it_is() -> None:
    row = np.zeros(16)
    row[10] = 1.0
    target = np.zeros(16)
    target[5] = 1.0
    black = picture(64, 64, (0, 0, 0))
    board = np.asarray(draw_affinity(black, black, 0, {"before": np.full(16, 1 / 16), "after": row}, target, grid=4))
    step = PANEL_PX // 4
    top = board.shape[0] - PANEL_PX
    origin = 2 * (PANEL_PX + 28)  # the third panel
    hot = board[top + 2 * step + step // 2, origin + 2 * step + step // 2].astype(int)
    cold = board[top + step // 2, origin + step // 2].astype(int)
    assert hot.sum() > 400
    assert cold.sum() < 20
    edge = board[top + step + step // 2, origin + step]  # left edge of the target, row 1, column 1
    assert edge[2] > 200
    assert edge[2] > edge[0]


def test_affinity_inputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"after must have 16 values, .* got 9"):
        draw_affinity(picture(8, 8), picture(8, 8), 0, {"after": np.zeros(9)}, np.zeros(16), grid=4)
    with pytest.raises(ValueError, match=r"patch must lie in \[0, 16\), got 16"):
        draw_affinity(picture(8, 8), picture(8, 8), 16, {}, np.zeros(16), grid=4)
    with pytest.raises(ValueError, match="copied must have 16 values"):
        draw_entropy(picture(8, 8), {"after": np.zeros(16)}, np.zeros(3), grid=4)


def test_affinity_of_zeros_and_constant_entropy() -> None:
    draw_affinity(picture(8, 8), picture(8, 8), 0, {"a": np.zeros(4)}, np.zeros(4), grid=2)
    draw_entropy(picture(8, 8), {"a": np.ones(4)}, np.zeros(4), grid=2)


def test_loss_curves() -> None:
    records = [{"step": step, "loss": 5.0 / (step + 1), "copynce": 1.0, "lr": 0.1} for step in range(30)]
    two, one = draw_loss_curves(records), draw_loss_curves(records[:1], {"lr": "learning rate"})
    assert two.width == 2 * one.width
    assert np.asarray(one).std() > 5
    with pytest.raises(ValueError, match="at least one of loss, copynce, info_nce, koleo, bce, got 0 lines"):
        draw_loss_curves([])
