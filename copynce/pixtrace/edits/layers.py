"""Edits that lay something on the picture, or the picture on something, and their relative forms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import copynce.pixtrace.matrices as matrices
from copynce.pixtrace.bitmaps import Bits
from copynce.pixtrace.edits.base import (
    BELOW_ONE,
    Color,
    Cover,
    Edit,
    Layered,
    Relative,
    Rows,
    Size,
    box_of,
    checked_bits,
    checked_matrix,
    first_fitting,
    placed,
    require_box_inside,
    require_color,
    require_integers,
    require_range,
    require_seed,
    trusted,
)
from copynce.pixtrace.edits.geometry import Resize, seen_from_the_front
from copynce.pixtrace.matrices import Flat

# ------------------------------------------------------------------------------------------ onto another picture


@dataclass(frozen=True)
class PasteOnto(Layered):
    """Lay the picture, with its top left corner at (``left``, ``top``), on another one of the given canvas size.

    ``opacity`` in [0, 1] is that of the picture; ``picture_choice`` in [0, 1) says which other picture the canvas
    shows: number ``floor(picture_choice * n)`` of ``n``.
    """

    canvas_height: int
    canvas_width: int
    top: int
    left: int
    opacity: float = 1.0
    picture_choice: float = 0.0

    def __post_init__(self) -> None:
        require_integers(self, 1, "canvas_height", "canvas_width")
        require_integers(self, 0, "top", "left")
        require_range(self, 0.0, 1.0, "opacity")
        require_range(self, 0.0, BELOW_ONE, "picture_choice")

    def output_size(self, height: int, width: int) -> Size:
        if (
            self.top < 0
            or self.left < 0
            or self.top + height > self.canvas_height
            or self.left + width > self.canvas_width
        ):
            raise ValueError(
                f"PasteOnto must keep the {height}x{width} picture inside of its canvas of "
                f"{self.canvas_height}x{self.canvas_width}, got top={self.top}, left={self.left}"
            )
        return self.canvas_height, self.canvas_width

    def forward(self, height: int, width: int) -> Flat:
        return matrices.translation(self.left, self.top)

    def cover(self, height: int, width: int) -> Cover:
        # The whole rectangle of the picture covers the canvas, its black parts too.
        return Cover((0, 0, width, height), self.opacity, self.picture_choice, beneath=True)


@dataclass(frozen=True)
class RelativePasteOnto(Relative):
    """Resize to the first fitting (fraction of the area, aspect ratio) of a grid-sized canvas and lay it there at
    (x, y)."""

    shapes: tuple[tuple[float, float], ...]
    x: float
    y: float
    opacity: float
    picture_choice: float

    def __post_init__(self) -> None:
        require_range(self, 0.0, 1.0, "x", "y", "opacity", "picture_choice")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        h, w = first_fitting(self.shapes, *grid) or (max(1, grid[0] // 2), max(1, grid[1] // 2))
        top, left = placed(h, w, *grid, self.x, self.y)
        return Resize(h, w), PasteOnto(*grid, top, left, self.opacity, self.picture_choice)


@dataclass(frozen=True)
class Matte(Layered):
    """Cut the object out by ``mask``, warp it by the forward ``matrix`` and lay it on another picture.

    ``mask``: rows of 0 and 1 (or a 2-D array of them) of exactly the picture's size. ``matrix`` (3x3, affine or
    projective) maps the picture's points to the canvas of ``canvas_height`` x ``canvas_width`` pixels; what falls
    outside is cut off. ``opacity`` and ``picture_choice`` as in :class:`PasteOnto`.
    """

    mask: Bits
    matrix: Rows
    canvas_height: int
    canvas_width: int
    opacity: float = 1.0
    picture_choice: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", checked_bits(self, "mask", self.mask))
        object.__setattr__(self, "matrix", checked_matrix(self, self.matrix))
        require_integers(self, 1, "canvas_height", "canvas_width")
        require_range(self, 0.0, 1.0, "opacity")
        require_range(self, 0.0, BELOW_ONE, "picture_choice")

    def output_size(self, height: int, width: int) -> Size:
        if (len(self.mask), len(self.mask[0])) != (height, width):
            raise ValueError(
                f"Matte.mask must have the size of the picture, {height}x{width}, "
                f"got {len(self.mask)}x{len(self.mask[0])}"
            )
        return self.canvas_height, self.canvas_width

    def forward(self, height: int, width: int) -> Flat:
        return seen_from_the_front(self, self.matrix, height, width)

    def cover(self, height: int, width: int) -> Cover:
        return Cover((0, 0, width, height), self.opacity, self.picture_choice, bits=self.mask, beneath=True)


@dataclass(frozen=True)
class RelativeMatte(Relative):
    """Resize to the grid, cut out by the mask (stretched over it), turn, scale and lay at (x, y) of a grid-sized
    canvas.

    ``scale`` is that of the object, ``angle`` in degrees clockwise; (x, y) in [0, 1] is where the picture's centre
    goes.
    """

    mask: Bits
    scale: float
    angle: float
    x: float
    y: float
    opacity: float = 1.0
    picture_choice: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", checked_bits(self, "mask", self.mask))
        require_range(self, 1e-3, 1e3, "scale")
        require_range(self, -720.0, 720.0, "angle")
        require_range(self, 0.0, 1.0, "x", "y", "opacity")
        require_range(self, 0.0, BELOW_ONE, "picture_choice")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        # The bit on which the centre of each pixel falls, in whole numbers: 2j + 1 halves of a pixel.
        columns = [(2 * j + 1) * len(self.mask[0]) // (2 * grid[1]) for j in range(grid[1])]
        wide = ["".join([row[j] for j in columns]) for row in self.mask]
        mask = tuple([wide[(2 * i + 1) * len(wide) // (2 * grid[0])] for i in range(grid[0])])
        a, b = self.scale * math.cos(math.radians(self.angle)), self.scale * math.sin(math.radians(self.angle))
        cx, cy = grid[1] / 2, grid[0] / 2
        matrix = (
            (a, -b, self.x * grid[1] - a * cx + b * cy),
            (b, a, self.y * grid[0] - b * cx - a * cy),
            (0.0, 0.0, 1.0),
        )
        return Resize(*grid), trusted(Matte, mask, matrix, *grid, self.opacity, self.picture_choice)


# ------------------------------------------------------------------------------------------ onto the picture


@dataclass(frozen=True)
class Overlay(Layered):
    """Lay another picture, resized to ``height`` x ``width``, on the box at (``left``, ``top``), with ``opacity``.

    ``picture_choice`` as in :class:`PasteOnto`.
    """

    top: int
    left: int
    height: int
    width: int
    opacity: float = 1.0
    picture_choice: float = 0.0

    def __post_init__(self) -> None:
        require_integers(self, 0, "top", "left")
        require_integers(self, 1, "height", "width")
        require_range(self, 0.0, 1.0, "opacity")
        require_range(self, 0.0, BELOW_ONE, "picture_choice")

    def output_size(self, height: int, width: int) -> Size:
        require_box_inside(self, height, width)
        return height, width

    def cover(self, height: int, width: int) -> Cover:
        return Cover(box_of(self), 1.0 - self.opacity, self.picture_choice)


@dataclass(frozen=True)
class RelativeOverlay(Relative):
    """Lay another picture on the first fitting (fraction of the area, aspect ratio) box of this one, at (x, y)."""

    shapes: tuple[tuple[float, float], ...]
    x: float
    y: float
    opacity: float
    picture_choice: float

    def __post_init__(self) -> None:
        require_range(self, 0.0, 1.0, "x", "y", "opacity", "picture_choice")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        h, w = first_fitting(self.shapes, height, width) or (max(1, height // 2), max(1, width // 2))
        top, left = placed(h, w, height, width, self.x, self.y)
        return (Overlay(top, left, h, w, self.opacity, self.picture_choice),)


@dataclass(frozen=True)
class Stamp(Layered):
    """Paint the 1-bits of a bitmap, stretched over the box, in one colour: text, an emoji or a stroke of a brush.

    ``bits``: rows of 0 and 1 (see :func:`text_bits`, :func:`stroke_bits`); a pixel is painted if its centre falls on
    a 1. ``color``: red, green and blue in [0, 1].
    """

    bits: Bits
    top: int
    left: int
    height: int
    width: int
    color: Color = (0.0, 0.0, 0.0)
    opacity: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", checked_bits(self, "bits", self.bits))
        require_integers(self, 0, "top", "left")
        require_integers(self, 1, "height", "width")
        require_range(self, 0.0, 1.0, "opacity")
        require_color(self, self.color)

    def output_size(self, height: int, width: int) -> Size:
        require_box_inside(self, height, width)
        return height, width

    def cover(self, height: int, width: int) -> Cover:
        return Cover(box_of(self), 1.0 - self.opacity, 0.0, self.color, None, self.bits)


@dataclass(frozen=True)
class RelativeStamp(Relative):
    """Paint a bitmap, ``size`` of the shorter side high, at (x, y) of the room left; bits as in :class:`Stamp`.

    A bitmap that would be wider than the picture is made as wide as the picture.
    """

    bits: Bits
    size: float
    x: float
    y: float
    color: Color = (0.0, 0.0, 0.0)
    opacity: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", checked_bits(self, "bits", self.bits))
        require_range(self, 0.0, 1.0, "size", "x", "y", "opacity")
        require_color(self, self.color)

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        h = max(1, round(self.size * min(height, width)))
        w = round(h * len(self.bits[0]) / len(self.bits))
        if w > width:
            h, w = max(1, round(h * width / w)), width
        w = max(1, w)
        top, left = placed(h, w, height, width, self.x, self.y)
        return (trusted(Stamp, self.bits, top, left, h, w, self.color, self.opacity),)


@dataclass(frozen=True)
class Erase(Layered):
    """Fill the box with N(0, 1) noise on the [0, 1] colour scale, before normalisation; ``noise_seed`` says which."""

    top: int
    left: int
    height: int
    width: int
    noise_seed: int = 0

    def __post_init__(self) -> None:
        require_integers(self, 0, "top", "left")
        require_integers(self, 1, "height", "width")
        require_seed(self)

    def output_size(self, height: int, width: int) -> Size:
        require_box_inside(self, height, width)
        return height, width

    def cover(self, height: int, width: int) -> Cover:
        return Cover(box_of(self), 0.0, noise_seed=self.noise_seed)


@dataclass(frozen=True)
class RelativeErase(Relative):
    """Resize to the grid and erase the first fitting (fraction of the area, aspect ratio) box, at (x, y).

    If no shape fits, nothing is erased: torchvision's ``RandomErasing`` gives up after ten attempts, too.
    """

    shapes: tuple[tuple[float, float], ...]
    x: float
    y: float
    noise_seed: int

    def __post_init__(self) -> None:
        require_range(self, 0.0, 1.0, "x", "y")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        fitted = first_fitting(self.shapes, *grid)
        if fitted is None:
            return (Resize(*grid),)
        h, w = fitted
        top, left = placed(h, w, *grid, self.x, self.y)
        return Resize(*grid), Erase(top, left, h, w, self.noise_seed)
