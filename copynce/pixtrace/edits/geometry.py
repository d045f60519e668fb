"""Edits that move the picture by one projective map, and their relative forms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import copynce.pixtrace.matrices as matrices
from copynce.pixtrace.edits.base import (
    Edit,
    Geometry,
    Relative,
    Rows,
    Size,
    checked_matrix,
    first_fitting,
    placed,
    require_box_inside,
    require_integers,
    require_range,
    trusted,
    wrong,
)
from copynce.pixtrace.matrices import Flat

# ------------------------------------------------------------------------------------------ boxes and sizes


@dataclass(frozen=True)
class Crop(Geometry):
    """Keep the box of ``height`` x ``width`` pixels whose top left corner is at (``left``, ``top``)."""

    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        require_integers(self, 0, "top", "left")
        require_integers(self, 1, "height", "width")

    def output_size(self, height: int, width: int) -> Size:
        require_box_inside(self, height, width)
        return self.height, self.width

    def forward(self, height: int, width: int) -> Flat:
        return matrices.translation(-self.left, -self.top)


@dataclass(frozen=True)
class Resize(Geometry):
    """Scale the whole picture to ``height`` x ``width`` pixels, ignoring the aspect ratio."""

    height: int
    width: int
    only_scales = True

    def __post_init__(self) -> None:
        require_integers(self, 1, "height", "width")

    def output_size(self, height: int, width: int) -> Size:
        return self.height, self.width

    def forward(self, height: int, width: int) -> Flat:
        return matrices.scaling(self.width / width, self.height / height)


@dataclass(frozen=True)
class ResizedCrop(Relative):
    """A random crop, resized to the grid: the first of the drawn (fraction of the area, aspect ratio) shapes that fits.

    ``x`` and ``y`` in [0, 1] place it in what room is left. If no shape fits, the central crop whose aspect ratio is
    the nearest within ``aspect_limits`` (torchvision's ``RandomResizedCrop``, its ten attempts drawn beforehand).
    """

    shapes: tuple[tuple[float, float], ...]
    x: float
    y: float
    aspect_limits: tuple[float, float] = (0.33, 3.0)

    def __post_init__(self) -> None:
        require_range(self, 0.0, 1.0, "x", "y")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        fitted = first_fitting(self.shapes, height, width)
        if fitted is not None:
            h, w = fitted
            top, left = placed(h, w, height, width, self.x, self.y)
        else:
            low, high = self.aspect_limits
            h = min(height, max(1, round(width / low)))
            w = min(width, max(1, round(height * high)))
            top, left = (height - h) // 2, (width - w) // 2
        return trusted(Crop, top, left, h, w), trusted(Resize, *grid)


@dataclass(frozen=True)
class Pad(Geometry):
    """Add black borders of so many pixels."""

    left: int
    top: int
    right: int
    bottom: int
    exposes = True

    def __post_init__(self) -> None:
        require_integers(self, 0, "left", "top", "right", "bottom")

    def output_size(self, height: int, width: int) -> Size:
        return height + self.top + self.bottom, width + self.left + self.right

    def forward(self, height: int, width: int) -> Flat:
        return matrices.translation(self.left, self.top)


@dataclass(frozen=True)
class RelativePad(Relative):
    """Pad by fractions of the picture's width (left, right) and height (top, bottom)."""

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        require_range(self, 0.0, 10.0, "left", "top", "right", "bottom")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        left, right = round(self.left * width), round(self.right * width)
        top, bottom = round(self.top * height), round(self.bottom * height)
        return (trusted(Pad, left, top, right, bottom),)


# ------------------------------------------------------------------------------------------ mirrors


@dataclass(frozen=True)
class HorizontalFlip(Geometry):
    """Mirror left and right."""

    def forward(self, height: int, width: int) -> Flat:
        return (-1.0, 0.0, width, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class VerticalFlip(Geometry):
    """Mirror top and bottom."""

    def forward(self, height: int, width: int) -> Flat:
        return (1.0, 0.0, 0.0, 0.0, -1.0, height, 0.0, 0.0, 1.0)


# ------------------------------------------------------------------------------------------ affine maps


@dataclass(frozen=True)
class Affine(Geometry):
    """Map points by the forward ``matrix`` (3x3, last row 0 0 1); the canvas keeps its size, black outside.

    Rotation, shear, scale, stretch, translation and all products of them; :class:`Rotation`, :class:`Stretch` and
    :class:`Shift` write the common ones in fractions of the picture.
    """

    matrix: Rows
    exposes = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", checked_matrix(self, self.matrix))
        if self.matrix[2] != (0.0, 0.0, 1.0):
            raise wrong(self, "matrix", "affine, with last row (0, 0, 1)")

    def forward(self, height: int, width: int) -> Flat:
        return matrices.flat(self.matrix)


@dataclass(frozen=True)
class Rotation(Relative):
    """Rotate by ``angle`` degrees (clockwise as seen) after shearing x by ``shear`` degrees, about the centre."""

    angle: float
    shear: float = 0.0

    def __post_init__(self) -> None:
        require_range(self, -720.0, 720.0, "angle")
        require_range(self, -89.0, 89.0, "shear")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        # Multiples of 90 degrees must be exact, and cos(pi / 2) is not.
        quarter = self.angle / 90.0
        if quarter == round(quarter):
            cos, sin = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[round(quarter) % 4]
        else:
            cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        t = math.tan(math.radians(self.shear))
        cx, cy = width / 2, height / 2
        # rotation @ [[1, t], [0, 1]], then keep the centre in place.
        a, b, c, d = cos, cos * t - sin, sin, sin * t + cos
        rows = ((a, b, cx - a * cx - b * cy), (c, d, cy - c * cx - d * cy), (0.0, 0.0, 1.0))
        return (trusted(Affine, rows),)


@dataclass(frozen=True)
class Stretch(Relative):
    """Scale by the factors ``x`` and ``y`` (equal: a zoom) about the centre; the canvas keeps its size."""

    x: float
    y: float

    def __post_init__(self) -> None:
        require_range(self, 1e-3, 1e3, "x", "y")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = (1.0 - self.x) * width / 2, (1.0 - self.y) * height / 2
        return (trusted(Affine, ((self.x, 0.0, x), (0.0, self.y, y), (0.0, 0.0, 1.0))),)


@dataclass(frozen=True)
class Shift(Relative):
    """Move by fractions of the picture's width and height; the canvas keeps its size."""

    x: float
    y: float

    def __post_init__(self) -> None:
        require_range(self, -1.0, 1.0, "x", "y")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        return (trusted(Affine, ((1.0, 0.0, self.x * width), (0.0, 1.0, self.y * height), (0.0, 0.0, 1.0))),)


# ------------------------------------------------------------------------------------------ perspective


@dataclass(frozen=True)
class Perspective(Geometry):
    """Map points by the forward homography ``matrix`` (3x3); the canvas keeps its size, black outside.

    Points that the map sends behind the viewer are not shown. The matrix' sign is chosen so that the picture's centre
    lies in front of the viewer.
    """

    matrix: Rows
    exposes = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", checked_matrix(self, self.matrix))

    def forward(self, height: int, width: int) -> Flat:
        return seen_from_the_front(self, self.matrix, height, width)


@dataclass(frozen=True)
class Tilt(Relative):
    """Perspective: each corner moves inwards by a fraction in [0, 1) of half the side, ``(x, y)`` per corner.

    Corners in the order top left, top right, bottom right, bottom left (torchvision's ``RandomPerspective``).
    """

    corners: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.corners) != 4 or not all(0.0 <= v < 1.0 for corner in self.corners for v in corner):
            raise wrong(self, "corners", "four pairs (x, y) of fractions in [0, 1)")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = width / 2, height / 2
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = self.corners
        end = ((ax * x, ay * y), (width - bx * x, by * y), (width - cx * x, height - cy * y), (dx * x, height - dy * y))
        matrix = matrices.multiply(_square_to(end), matrices.scaling(1.0 / width, 1.0 / height))
        return (trusted(Perspective, matrices.rows(matrix)),)


def seen_from_the_front(edit: Edit, matrix: Rows, height: int, width: int) -> Flat:
    """The homography with the sign and scale that put the picture's centre at depth 1 before the viewer."""
    g, h, i = matrix[2]
    depth = g * width / 2 + h * height / 2 + i
    if abs(depth) <= 1e-9 * math.hypot(g * width / 2, h * height / 2, i):
        raise ValueError(
            f"{type(edit).__name__}.matrix must keep the centre of the {height}x{width} picture at a finite point, "
            f"got {matrix!r}, which sends it to infinity"
        )
    scale = 1.0 / depth
    a, b, c, d, e, f, g, h, i = matrices.flat(matrix)
    return (scale * a, scale * b, scale * c, scale * d, scale * e, scale * f, scale * g, scale * h, scale * i)


def _square_to(corners: tuple[tuple[float, float], ...]) -> Flat:
    """The map of the unit square's corners (0, 0), (1, 0), (1, 1), (0, 1) to four points (Heckbert 1989)."""
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = corners
    ax, ay, bx, by = x1 - x2, y1 - y2, x3 - x2, y3 - y2
    sx, sy = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    area = ax * by - bx * ay
    if abs(area) < 1e-12 * (abs(ax) + abs(bx)) * (abs(ay) + abs(by)) or area == 0.0:
        raise ValueError(f"a quadrilateral needs corners of which no three lie on one line, got {corners!r}")
    g, h = (sx * by - bx * sy) / area, (ax * sy - sx * ay) / area
    return (x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h, 1.0)
