"""The edits of a copy, as frozen dataclasses that hold plain numbers.

Conventions (DESIGN.md): continuous coordinates put pixel (row i, column j) on the square [j, j+1) x [i, i+1);
a matrix maps *input* to *output* points ``(x, y, 1)``. Three families, told apart by their base class:

* :class:`Geometry`: moves pixels by one projective map; knows its output size and matrix.
* :class:`Layered`: brings in another picture or covers a box; :class:`PasteOnto` also moves pixels.
* :class:`Photometric`: changes colours, leaves coordinates alone.

A fourth, :class:`SizeFree`, is what programs are sampled in: fractions of a picture whose size is not known yet.
``edit.at(height, width, grid)`` turns any edit into concrete ones of the first three families.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Size = tuple[int, int]


def _fail(edit: Edit, parameter: str, expected: str) -> ValueError:
    return ValueError(f"{type(edit).__name__}.{parameter} must be {expected}, got {getattr(edit, parameter)!r}")


def _require_positive(edit: Edit, *parameters: str) -> None:
    for name in parameters:
        value = getattr(edit, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise _fail(edit, name, "an integer of at least 1 pixel")


def _require_range(edit: Edit, low: float, high: float, *parameters: str) -> None:
    for name in parameters:
        value = getattr(edit, name)
        # ``not (a <= v <= b)`` also catches NaN.
        if not isinstance(value, (int, float, np.integer, np.floating)) or not low <= value <= high:
            raise _fail(edit, name, f"a number in [{low:g}, {high:g}]")


def _translation(x: float, y: float) -> Matrix:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Edit:
    """One step of an edit program."""

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        """The concrete edits that this one is for a picture of ``height`` x ``width`` pixels.

        ``grid`` is the model's input size ``(height, width)``, where edits of the released policies resize to it.
        """
        return (self,)

    def output_size(self, height: int, width: int) -> Size:
        """Size of the picture after the edit; raises ``ValueError`` if the edit does not fit the picture."""
        return height, width


@dataclass(frozen=True)
class Geometry(Edit):
    """An edit that is one projective map of the picture."""

    #: True if pixels from outside of the picture can show after the edit (they are black and have no source).
    exposes = False

    def matrix_for(self, height: int, width: int) -> Matrix:
        """Forward 3x3 matrix, input to output points, for an input of ``height`` x ``width`` pixels."""
        raise NotImplementedError


@dataclass(frozen=True)
class Layered(Edit):
    """An edit that blends a second surface with the picture."""


@dataclass(frozen=True)
class Photometric(Edit):
    """An edit of colours only."""


@dataclass(frozen=True)
class SizeFree(Edit):
    """An edit in fractions of the picture; :meth:`Edit.at` makes it concrete."""


# --------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Crop(Geometry):
    """Keep the box of ``height`` x ``width`` pixels whose top left corner is at (``left``, ``top``)."""

    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        _require_positive(self, "height", "width")

    def output_size(self, height: int, width: int) -> Size:
        _require_box_inside(self, height, width)
        return self.height, self.width

    def matrix_for(self, height: int, width: int) -> Matrix:
        return _translation(-self.left, -self.top)


@dataclass(frozen=True)
class Resize(Geometry):
    """Scale the whole picture to ``height`` x ``width`` pixels, ignoring the aspect ratio."""

    height: int
    width: int

    def __post_init__(self) -> None:
        _require_positive(self, "height", "width")

    def output_size(self, height: int, width: int) -> Size:
        return self.height, self.width

    def matrix_for(self, height: int, width: int) -> Matrix:
        return np.diag([self.width / width, self.height / height, 1.0])


@dataclass(frozen=True)
class HorizontalFlip(Geometry):
    """Mirror left and right."""

    def matrix_for(self, height: int, width: int) -> Matrix:
        return np.array([[-1.0, 0.0, width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class VerticalFlip(Geometry):
    """Mirror top and bottom."""

    def matrix_for(self, height: int, width: int) -> Matrix:
        return np.array([[1.0, 0.0, 0.0], [0.0, -1.0, height], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Affine(Geometry):
    """Map points by the forward ``matrix`` (3x3, last row 0 0 1); the canvas keeps its size, black outside."""

    matrix: tuple[tuple[float, float, float], ...]
    exposes = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", _checked_matrix(self, self.matrix))
        if self.matrix[2] != (0.0, 0.0, 1.0):
            raise _fail(self, "matrix", "affine, with last row (0, 0, 1)")

    def matrix_for(self, height: int, width: int) -> Matrix:
        return np.array(self.matrix)


@dataclass(frozen=True)
class Perspective(Geometry):
    """Map points by the forward homography ``matrix`` (3x3); the canvas keeps its size, black outside.

    Points that the map sends behind the viewer are not shown. The matrix' sign is chosen so that the picture's centre
    lies in front of the viewer.
    """

    matrix: tuple[tuple[float, float, float], ...]
    exposes = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", _checked_matrix(self, self.matrix))

    def matrix_for(self, height: int, width: int) -> Matrix:
        matrix = np.array(self.matrix)
        depth = float(matrix[2] @ (width / 2, height / 2, 1.0))
        if abs(depth) < 1e-12:
            raise ValueError(
                f"Perspective.matrix must keep the centre of the {height}x{width} picture at a finite point, "
                f"got {self.matrix!r}, which sends it to infinity"
            )
        return matrix / depth


@dataclass(frozen=True)
class Pad(Geometry):
    """Add black borders of so many pixels."""

    left: int
    top: int
    right: int
    bottom: int
    exposes = True

    def __post_init__(self) -> None:
        _require_range(self, 0, 1e6, "left", "top", "right", "bottom")

    def output_size(self, height: int, width: int) -> Size:
        return height + self.top + self.bottom, width + self.left + self.right

    def matrix_for(self, height: int, width: int) -> Matrix:
        return _translation(self.left, self.top)


# --------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class PasteOnto(Layered):
    """Lay the picture, with its top left corner at (``left``, ``top``), on another one of the given canvas size.

    ``opacity`` in [0, 1] is that of the picture; ``picture`` in [0, 1) says which other picture the canvas shows:
    number ``floor(picture * n)`` of ``n``.
    """

    canvas_height: int
    canvas_width: int
    top: int
    left: int
    opacity: float = 1.0
    picture: float = 0.0

    def __post_init__(self) -> None:
        _require_positive(self, "canvas_height", "canvas_width")
        _require_range(self, 0.0, 1.0, "opacity")
        _require_range(self, 0.0, math.nextafter(1.0, 0.0), "picture")

    def output_size(self, height: int, width: int) -> Size:
        if self.top < 0 or self.left < 0 or self.top + height > self.canvas_height or self.left + width > self.canvas_width:
            raise ValueError(
                f"PasteOnto must keep the {height}x{width} picture inside of its canvas of "
                f"{self.canvas_height}x{self.canvas_width}, got top={self.top}, left={self.left}"
            )
        return self.canvas_height, self.canvas_width


@dataclass(frozen=True)
class Overlay(Layered):
    """Lay another picture, resized to ``height`` x ``width``, on the box at (``left``, ``top``), with ``opacity``."""

    top: int
    left: int
    height: int
    width: int
    opacity: float = 1.0
    picture: float = 0.0

    def __post_init__(self) -> None:
        _require_positive(self, "height", "width")
        _require_range(self, 0.0, 1.0, "opacity")
        _require_range(self, 0.0, math.nextafter(1.0, 0.0), "picture")

    def output_size(self, height: int, width: int) -> Size:
        _require_box_inside(self, height, width)
        return height, width


@dataclass(frozen=True)
class Erase(Layered):
    """Fill the box with N(0, 1) noise on the [0, 1] colour scale, before normalisation; ``noise`` chooses which."""

    top: int
    left: int
    height: int
    width: int
    noise: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "height", "width")
        _require_range(self, 0, 2**31 - 1, "noise")

    def output_size(self, height: int, width: int) -> Size:
        _require_box_inside(self, height, width)
        return height, width


# --------------------------------------------------------------------------------------------- photometric


@dataclass(frozen=True)
class ColorJitter(Photometric):
    """Brightness, contrast and saturation factors (1 = unchanged), then hue in turns of the colour circle."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        _require_range(self, 0.0, 10.0, "brightness", "contrast", "saturation")
        _require_range(self, -0.5, 0.5, "hue")


@dataclass(frozen=True)
class Grayscale(Photometric):
    """Luma (ITU-R 601) on all three channels."""


@dataclass(frozen=True)
class Blur(Photometric):
    """Gaussian blur; ``sigma`` in pixels of a 224-pixel output, scaled with the output's size."""

    sigma: float

    def __post_init__(self) -> None:
        _require_range(self, 0.0, 100.0, "sigma")


@dataclass(frozen=True)
class Jpeg(Photometric):
    """The artefacts of saving as JPEG with ``quality`` 1 to 100."""

    quality: int

    def __post_init__(self) -> None:
        _require_range(self, 1, 100, "quality")


# --------------------------------------------------------------------------------------------- size-free


@dataclass(frozen=True)
class ResizedCrop(SizeFree):
    """A random crop, resized to the grid: the first of the drawn (area share, aspect ratio) shapes that fits.

    ``x`` and ``y`` in [0, 1] place it in what room is left. If no shape fits, the central crop whose aspect ratio is
    the nearest within ``aspect_limits`` (torchvision's ``RandomResizedCrop``, its ten attempts drawn beforehand).
    """

    shapes: tuple[tuple[float, float], ...]
    x: float
    y: float
    aspect_limits: tuple[float, float] = (0.33, 3.0)

    def __post_init__(self) -> None:
        _require_range(self, 0.0, 1.0, "x", "y")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        fitted = _first_fitting(self.shapes, height, width)
        if fitted is not None:
            h, w = fitted
            top, left = round(self.y * (height - h)), round(self.x * (width - w))
        else:
            low, high = self.aspect_limits
            h = min(height, max(1, round(width / low)))
            w = min(width, max(1, round(height * high)))
            top, left = (height - h) // 2, (width - w) // 2
        return Crop(top, left, h, w), Resize(*grid)


@dataclass(frozen=True)
class Rotation(SizeFree):
    """Rotate by ``angle`` degrees (clockwise as seen) after shearing x by ``shear`` degrees, about the centre."""

    angle: float
    shear: float = 0.0

    def __post_init__(self) -> None:
        _require_range(self, -720.0, 720.0, "angle")
        _require_range(self, -89.0, 89.0, "shear")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
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
        return (Affine(rows),)


@dataclass(frozen=True)
class Tilt(SizeFree):
    """Perspective: each corner moves inwards by a share in [0, 1] of half the side, ``(x, y)`` per corner.

    Corners in the order top left, top right, bottom right, bottom left (torchvision's ``RandomPerspective``).
    """

    corners: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.corners) != 4 or not all(0.0 <= v < 1.0 for corner in self.corners for v in corner):
            raise _fail(self, "corners", "four (x, y) shares in [0, 1)")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        start = ((0.0, 0.0), (width, 0.0), (width, height), (0.0, height))
        end = []
        for (sx, sy), (dx, dy) in zip(start, self.corners, strict=True):
            end.append((abs(sx - dx * width / 2), abs(sy - dy * height / 2)))
        matrix = homography(start, end)
        return (Perspective(tuple(tuple(row) for row in matrix.tolist())),)


@dataclass(frozen=True)
class PadShare(SizeFree):
    """Pad by shares of the picture's width (left, right) and height (top, bottom)."""

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        _require_range(self, 0.0, 10.0, "left", "top", "right", "bottom")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        return (
            Pad(
                round(self.left * width), round(self.top * height), round(self.right * width), round(self.bottom * height)
            ),
        )


@dataclass(frozen=True)
class PasteShare(SizeFree):
    """Resize to the first fitting (area share, aspect ratio) of a grid-sized canvas and lay it there at (x, y)."""

    shapes: tuple[tuple[float, float], ...]
    x: float
    y: float
    opacity: float
    picture: float

    def __post_init__(self) -> None:
        _require_range(self, 0.0, 1.0, "x", "y", "opacity", "picture")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        h, w = _first_fitting(self.shapes, *grid) or (max(1, grid[0] // 2), max(1, grid[1] // 2))
        top, left = round(self.y * (grid[0] - h)), round(self.x * (grid[1] - w))
        return Resize(h, w), PasteOnto(*grid, top, left, self.opacity, self.picture)


@dataclass(frozen=True)
class OverlayShare(SizeFree):
    """Lay another picture on the first fitting (area share, aspect ratio) box of this one, at (x, y)."""

    shapes: tuple[tuple[float, float], ...]
    x: float
    y: float
    opacity: float
    picture: float

    def __post_init__(self) -> None:
        _require_range(self, 0.0, 1.0, "x", "y", "opacity", "picture")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        h, w = _first_fitting(self.shapes, height, width) or (max(1, height // 2), max(1, width // 2))
        top, left = round(self.y * (height - h)), round(self.x * (width - w))
        return (Overlay(top, left, h, w, self.opacity, self.picture),)


@dataclass(frozen=True)
class EraseShare(SizeFree):
    """Resize to the grid and erase the first fitting (area share, aspect ratio) box, at (x, y)."""

    shapes: tuple[tuple[float, float], ...]
    x: float
    y: float
    noise: int

    def __post_init__(self) -> None:
        _require_range(self, 0.0, 1.0, "x", "y")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        fitted = _first_fitting(self.shapes, *grid)
        if fitted is None:  # torchvision's RandomErasing gives up after ten attempts, too
            return (Resize(*grid),)
        h, w = fitted
        top, left = round(self.y * (grid[0] - h)), round(self.x * (grid[1] - w))
        return Resize(*grid), Erase(top, left, h, w, self.noise)


# --------------------------------------------------------------------------------------------- helpers


def homography(start: tuple[tuple[float, float], ...], end: list[tuple[float, float]]) -> Matrix:
    """The 3x3 matrix that sends four points to four points (direct linear transform, last entry 1)."""
    rows, values = [], []
    for (x, y), (u, v) in zip(start, end, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
        values += [u, v]
    try:
        solution = np.linalg.solve(np.array(rows, dtype=np.float64), np.array(values, dtype=np.float64))
    except np.linalg.LinAlgError as error:
        raise ValueError(f"no homography sends {start!r} to {end!r}: three of the points lie on one line") from error
    return np.append(solution, 1.0).reshape(3, 3)


def _first_fitting(shapes: tuple[tuple[float, float], ...], height: int, width: int) -> Size | None:
    """The first (area share, aspect ratio width/height) as whole pixels (h, w) that fit into height x width."""
    for area, aspect in shapes:
        w = round(math.sqrt(area * height * width * aspect))
        h = round(math.sqrt(area * height * width / aspect))
        if 0 < w <= width and 0 < h <= height:
            return h, w
    return None


def _checked_matrix(edit: Edit, matrix: object) -> tuple[tuple[float, float, float], ...]:
    array = np.asarray(matrix, dtype=np.float64)
    if array.shape != (3, 3):
        raise ValueError(f"{type(edit).__name__}.matrix must be 3x3, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{type(edit).__name__}.matrix must be finite, got {array.tolist()}")
    # Relative to the matrix' own scale, so that a map of tiny units is not called singular.
    if abs(np.linalg.det(array)) <= 1e-12 * max(1e-300, np.abs(array[:2, :2]).max() ** 2):
        raise ValueError(f"{type(edit).__name__}.matrix must be invertible, got the singular {array.tolist()}")
    (a, b, c), (d, e, f), (g, h, i) = array.tolist()
    return (a, b, c), (d, e, f), (g, h, i)


def _require_box_inside(edit: Crop | Overlay | Erase, height: int, width: int) -> None:
    if edit.top < 0 or edit.left < 0 or edit.top + edit.height > height or edit.left + edit.width > width:
        raise ValueError(
            f"{type(edit).__name__} must lie inside of the {height}x{width} picture, got top={edit.top}, "
            f"left={edit.left}, height={edit.height}, width={edit.width}"
        )
