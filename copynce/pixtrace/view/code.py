"""What the code of a composed view says (:mod:`copynce.pixtrace.compiled.slots`), as objects that plain NumPy reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copynce.pixtrace.compiled.maps import TIE
from copynce.pixtrace.compiled.slots import (
    BITMAP_ROWS,
    BITMAPS,
    BITS_HEIGHT,
    BITS_START,
    BITS_WIDTH,
    COVERS,
    FIRST_REGION,
    GROUND,
    KEPT,
    LAYER,
    MAP_ROWS,
    NO_GROUND,
    PLANES,
    REGION_ROWS,
)
from copynce.pixtrace.edits.base import Color, Matrix

Points = NDArray[np.floating]
Planes = NDArray[np.float64]  # [K, 3]; see copynce.pixtrace.compiled.slots


@dataclass(eq=False, slots=True)
class Layer:
    """Where one picture, or one colour, lies in a view.

    ``matrix`` [3, 3] float64: forward map of its unit square (x = column / width, y = row / height) to output
    pixels; for a picture of h x w pixels the map is ``matrix @ diag(1/w, 1/h, 1)``. ``picture_choice`` in [0, 1):
    which other picture (0 for the source itself). ``color``: the layer is no picture but one colour (red, green, blue
    in [0, 1]).
    """

    matrix: Matrix
    picture_choice: float = 0.0
    color: Color | None = None

    def extent(self) -> tuple[float, float]:
        """Output pixels (height, width) that the whole picture's height and width would span at its largest.

        The local scale of the map at five points of the unit square, the largest of each direction; it chooses the
        antialiased working size before a warp.
        """
        (a, b, c), (d, e, f), (g, h, i) = self.matrix.tolist()
        tall = wide = 0.0
        for x, y in ((0.5, 0.5), (0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9)):
            w = g * x + h * y + i
            if w <= 1e-6:  # behind the viewer, or so near to the horizon that the scale means nothing
                continue
            u, v = (a * x + b * y + c) / w, (d * x + e * y + f) / w
            wide = max(wide, ((a - u * g) ** 2 + (d - v * g) ** 2) ** 0.5 / w)
            tall = max(tall, ((b - u * h) ** 2 + (e - v * h) ** 2) ** 0.5 / w)
        return tall, wide


@dataclass(eq=False, slots=True)
class Bitmap:
    """A bitmap that cuts a region: a point of the view belongs to it if ``matrix`` sends it onto a 1 of ``bits``.

    ``matrix`` [3, 3] float64 maps output points to points of the bitmap, one unit per bit; ``bits`` uint8 [h, w].
    """

    matrix: Matrix
    bits: NDArray[np.uint8]

    def contains(self, x: Points, y: Points) -> NDArray[np.bool_]:
        """True where the points (x, y) of the view fall on a 1."""
        u, v, w = mapped(self.matrix, x, y)
        with np.errstate(divide="ignore", invalid="ignore"):
            column, row = np.floor(u / w + TIE), np.floor(v / w + TIE)
        inside = (w > 0) & (column >= 0) & (column < self.bits.shape[1]) & (row >= 0) & (row < self.bits.shape[0])
        hit = self.bits[np.where(inside, row, 0).astype(np.int64), np.where(inside, column, 0).astype(np.int64)]
        return inside & (hit != 0)


@dataclass(eq=False, slots=True)
class Region:
    """A part of the view: inside of all half-planes, on a 1 of all bitmaps."""

    planes: Planes
    bitmaps: tuple[Bitmap, ...] = ()

    def contains(self, x: Points, y: Points) -> NDArray[np.bool_]:
        """True where the points (x, y) of the view belong to the region."""
        inside = np.ones(x.shape, bool)
        for a, b, c in self.planes:
            inside &= a * x + b * y + c >= 0.0
        for bitmap in self.bitmaps:
            inside &= bitmap.contains(x, y)
        return inside


@dataclass(eq=False, slots=True)
class PlacedCover:
    """An edit's :class:`~copynce.pixtrace.edits.Cover` in the view: fade what lies below, then show ``layer`` there.

    ``keep`` in [0, 1] is how much of what lay below still shows inside of ``region``. ``layer`` numbers the pictures
    (0 the source), -1 is the erasing noise. ``ground`` is the region that a new bottom canvas fills, None unless the
    layer is such a canvas.
    """

    region: Region
    keep: float
    layer: int
    ground: Region | None = None


def visible_in(code: NDArray[np.float64], bits: NDArray[np.uint8]) -> Region:
    """The source's part of a view, before anything covers it."""
    return _region(code, bits, FIRST_REGION)


def covers_in(code: NDArray[np.float64], bits: NDArray[np.uint8]) -> tuple[PlacedCover, ...]:
    """The covers of a view, in the order in which they were laid."""
    heads = _heads(code)
    first_ground = 1 + int(code[COVERS])
    covers = []
    for head in heads[1:first_ground]:
        number = int(code[head + 1, GROUND])
        ground = None if number == NO_GROUND else _region(code, bits, heads[first_ground + number])
        keep = float(code[head, KEPT]) / 255.0
        covers.append(PlacedCover(_region(code, bits, head), keep, int(code[head + 1, LAYER]), ground))
    return tuple(covers)


def mapped(matrix: Points, x: Points, y: Points) -> tuple[Points, Points, Points]:
    """Homogeneous images of the points (x, y)."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return a * x + b * y + c, d * x + e * y + f, g * x + h * y + i


def _heads(code: NDArray[np.float64]) -> list[int]:
    """The first row of each region."""
    heads, row = [], FIRST_REGION
    while row < len(code):
        heads.append(row)
        row += REGION_ROWS + int(code[row, PLANES]) + BITMAP_ROWS * int(code[row, BITMAPS])
    return heads


def _region(code: NDArray[np.float64], bits: NDArray[np.uint8], head: int) -> Region:
    """The region whose first row is ``head``."""
    first = head + REGION_ROWS
    row = first + int(code[head, PLANES])
    planes = code[first:row]
    bitmaps = []
    for _ in range(int(code[head, BITMAPS])):
        own = code[row + MAP_ROWS].astype(int)
        start, height, width = own[BITS_START], own[BITS_HEIGHT], own[BITS_WIDTH]
        rows = bits[start : start + height * width].reshape(height, width)
        bitmaps.append(Bitmap(code[row : row + MAP_ROWS], rows))
        row += BITMAP_ROWS
    return Region(planes, tuple(bitmaps))
