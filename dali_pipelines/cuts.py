"""Views of a picture for evaluation: boxes of it, or the whole picture turned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.numba_ops.layout import CUT_HEIGHT, CUT_MAP, CUT_WIDTH


@dataclass(frozen=True)
class Cut:
    """A view of a picture for evaluation: a box (left, top, right, bottom) of its pixels, or the whole picture turned.

    A box may leave the picture and shows black there; ``box`` None is the whole picture. ``angle``: degrees
    counter-clockwise, on a canvas that holds all of the picture, black elsewhere; with a box it must be 0.
    """

    box: tuple[int, int, int, int] | None = None
    angle: float = 0.0

    def __post_init__(self) -> None:
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(
                f"Cut.box must be (left, top, right, bottom) with left < right, top < bottom, got {self.box}"
            )
        if self.box is not None and self.angle:
            raise ValueError(f"Cut.angle must be 0 where a box is given, got {self.angle!r} and {self.box}")

    def row(self, height: int, width: int) -> NDArray[np.float64]:
        """[8]: the view's size in pixels, and the affine map of its points to the picture's.

        Places as in :mod:`dali_pipelines.numba_ops.layout`. Turned as ``PIL.Image.rotate(angle, expand=True)`` does it.
        """
        if self.box is not None:
            left, top, right, bottom = self.box
            return _row(right - left, bottom - top, (1.0, 0.0, left), (0.0, 1.0, top))
        # 15 digits, as Pillow: a quarter turn's cosine is 0 then, and whole pixels land on whole pixels.
        cos, sin = (round(f(math.radians(-self.angle)), 15) for f in (math.cos, math.sin))
        x, y = width / 2, height / 2
        forth = np.array([[cos, sin], [-sin, cos]])
        corners = forth @ [[-x, x, x, -x], [-y, -y, y, y]] + [[x], [y]]
        canvas = np.ceil(corners.max(axis=1)) - np.floor(corners.min(axis=1))
        if self.angle % 90 == 0:
            canvas = np.abs(forth) @ (width, height)
        shift = (x, y) - forth @ canvas / 2
        return _row(canvas[0], canvas[1], (cos, sin, shift[0]), (-sin, cos, shift[1]))

    def geometry(self, height: int, width: int) -> tuple[tuple[int, int], NDArray[np.float64]]:
        """(width and height of the view of a picture of this size, the affine map [3, 3] of its points (x, y) to the
        picture's)."""
        row = self.row(height, width)
        to_picture = np.vstack([row[CUT_MAP:].reshape(2, 3), (0.0, 0.0, 1.0)])
        return (int(row[CUT_WIDTH]), int(row[CUT_HEIGHT])), to_picture


#: The views of a picture of (width, height) pixels.
Cuts = Callable[[int, int], Sequence[Cut]]


def _row(width: float, height: float, *to_picture: tuple[float, float, float]) -> NDArray[np.float64]:
    row = np.empty(CUT_MAP + 6)
    row[CUT_WIDTH], row[CUT_HEIGHT] = width, height
    row[CUT_MAP:].reshape(2, 3)[:] = to_picture
    return row
