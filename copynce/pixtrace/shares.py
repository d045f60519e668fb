"""Size-free edits: fractions of a picture whose size is not known yet, which is what programs are sampled in.

Each one's ``at(height, width, grid)`` gives the concrete edits of :mod:`copynce.pixtrace.edits` for a picture of that
size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

import copynce.pixtrace.matrices as matrices
from copynce.pixtrace.bitmaps import Bits
from copynce.pixtrace.edits import (
    BELOW_ONE,
    Affine,
    Crop,
    Edit,
    Erase,
    Matte,
    Overlay,
    Pad,
    PasteOnto,
    Perspective,
    Remap,
    Resize,
    Rows,
    Size,
    Stamp,
    checked_bits,
    fail,
    require_color,
    require_range,
)
from copynce.pixtrace.matrices import Flat


@dataclass(frozen=True)
class SizeFree(Edit):
    """An edit in fractions of the picture; :meth:`Edit.at` makes it concrete."""


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
        require_range(self, 0.0, 1.0, "x", "y")

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
        return _trusted(Crop, top, left, h, w), _trusted(Resize, *grid)


@dataclass(frozen=True)
class Rotation(SizeFree):
    """Rotate by ``angle`` degrees (clockwise as seen) after shearing x by ``shear`` degrees, about the centre."""

    angle: float
    shear: float = 0.0

    def __post_init__(self) -> None:
        require_range(self, -720.0, 720.0, "angle")
        require_range(self, -89.0, 89.0, "shear")

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
        return (_trusted(Affine, rows),)


@dataclass(frozen=True)
class Stretch(SizeFree):
    """Scale by the factors ``x`` and ``y`` (equal: a zoom) about the centre; the canvas keeps its size."""

    x: float
    y: float

    def __post_init__(self) -> None:
        require_range(self, 1e-3, 1e3, "x", "y")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = (1.0 - self.x) * width / 2, (1.0 - self.y) * height / 2
        return (_trusted(Affine, ((self.x, 0.0, x), (0.0, self.y, y), (0.0, 0.0, 1.0))),)


@dataclass(frozen=True)
class Shift(SizeFree):
    """Move by shares of the picture's width and height; the canvas keeps its size."""

    x: float
    y: float

    def __post_init__(self) -> None:
        require_range(self, -1.0, 1.0, "x", "y")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        return (_trusted(Affine, ((1.0, 0.0, self.x * width), (0.0, 1.0, self.y * height), (0.0, 0.0, 1.0))),)


@dataclass(frozen=True)
class Tilt(SizeFree):
    """Perspective: each corner moves inwards by a share in [0, 1] of half the side, ``(x, y)`` per corner.

    Corners in the order top left, top right, bottom right, bottom left (torchvision's ``RandomPerspective``).
    """

    corners: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.corners) != 4 or not all(0.0 <= v < 1.0 for corner in self.corners for v in corner):
            raise fail(self, "corners", "four (x, y) shares in [0, 1)")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = width / 2, height / 2
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = self.corners
        end = ((ax * x, ay * y), (width - bx * x, by * y), (width - cx * x, height - cy * y), (dx * x, height - dy * y))
        matrix = matrices.multiply(_square_to(end), matrices.scaling(1.0 / width, 1.0 / height))
        return (_trusted(Perspective, matrices.rows(matrix)),)


@dataclass(frozen=True)
class PadShare(SizeFree):
    """Pad by shares of the picture's width (left, right) and height (top, bottom)."""

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        require_range(self, 0.0, 10.0, "left", "top", "right", "bottom")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = width, height
        return (
            _trusted(Pad, round(self.left * x), round(self.top * y), round(self.right * x), round(self.bottom * y)),
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
        require_range(self, 0.0, 1.0, "x", "y", "opacity", "picture")

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
        require_range(self, 0.0, 1.0, "x", "y", "opacity", "picture")

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
        require_range(self, 0.0, 1.0, "x", "y")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        fitted = _first_fitting(self.shapes, *grid)
        if fitted is None:  # torchvision's RandomErasing gives up after ten attempts, too
            return (Resize(*grid),)
        h, w = fitted
        top, left = round(self.y * (grid[0] - h)), round(self.x * (grid[1] - w))
        return Resize(*grid), Erase(top, left, h, w, self.noise)


@dataclass(frozen=True)
class StampShare(SizeFree):
    """Paint a bitmap, ``size`` of the shorter side high, at (x, y) of the room left; bits as in :class:`Stamp`.

    A bitmap that would be wider than the picture is made as wide as the picture.
    """

    bits: Bits
    size: float
    x: float
    y: float
    color: tuple[float, float, float] = (0.0, 0.0, 0.0)
    opacity: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", checked_bits(self, "bits", self.bits))
        require_range(self, 0.0, 1.0, "size", "x", "y", "opacity")
        require_color(self, self.color)

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        h = max(1, round(self.size * min(height, width)))
        w = round(h * len(self.bits[0]) / len(self.bits))
        if w > width:
            h, w = max(1, round(h * width / w)), width
        top, left = round(self.y * (height - h)), round(self.x * (width - max(1, w)))
        return (_trusted(Stamp, self.bits, top, left, h, max(1, w), self.color, self.opacity),)


@dataclass(frozen=True)
class MatteShare(SizeFree):
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
    picture: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", checked_bits(self, "mask", self.mask))
        require_range(self, 1e-3, 1e3, "scale")
        require_range(self, -720.0, 720.0, "angle")
        require_range(self, 0.0, 1.0, "x", "y", "opacity")
        require_range(self, 0.0, BELOW_ONE, "picture")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
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
        return Resize(*grid), _trusted(Matte, mask, matrix, *grid, self.opacity, self.picture)


@dataclass(frozen=True)
class Swirl(SizeFree):
    """Resize to the grid and twist about (x, y): ``turns`` at the centre, none from ``radius`` (of the side) on."""

    turns: float
    radius: float = 0.5
    x: float = 0.5
    y: float = 0.5

    def __post_init__(self) -> None:
        require_range(self, -10.0, 10.0, "turns")
        require_range(self, 1e-3, 10.0, "radius")
        require_range(self, 0.0, 1.0, "x", "y")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = _centres(grid)
        dx, dy = x / grid[1] - self.x, y / grid[0] - self.y
        angle = 2 * np.pi * self.turns * np.clip(1.0 - np.hypot(dx, dy) / self.radius, 0.0, 1.0) ** 2
        sx, sy = dx * np.cos(angle) - dy * np.sin(angle), dx * np.sin(angle) + dy * np.cos(angle)
        return Resize(*grid), _remap((self.x + sx) * grid[1], (self.y + sy) * grid[0])


@dataclass(frozen=True)
class Wave(SizeFree):
    """Resize to the grid and shift rows and columns by sines of so many shares of the side, ``waves`` along a side."""

    x: float
    y: float
    waves: float = 3.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        require_range(self, -1.0, 1.0, "x", "y")
        require_range(self, 0.0, 100.0, "waves")
        require_range(self, -1.0, 1.0, "phase")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = _centres(grid)
        turn = 2 * np.pi
        moved_x = x + self.x * grid[1] * np.sin(turn * (self.waves * y / grid[0] + self.phase))
        moved_y = y + self.y * grid[0] * np.sin(turn * (self.waves * x / grid[1] + self.phase))
        return Resize(*grid), _remap(moved_x, moved_y)


@dataclass(frozen=True)
class Lens(SizeFree):
    """Resize to the grid and bend along the radius: ``strength`` above 0 pushes the corners outwards, below pulls
    in."""

    strength: float

    def __post_init__(self) -> None:
        require_range(self, -0.9, 10.0, "strength")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = _centres(grid)
        dx, dy = 2 * x / grid[1] - 1, 2 * y / grid[0] - 1
        scale = (1.0 + self.strength * (dx * dx + dy * dy) / 2) / (1.0 + max(0.0, self.strength))
        return Resize(*grid), _remap((1 + dx * scale) * grid[1] / 2, (1 + dy * scale) * grid[0] / 2)


@dataclass(frozen=True)
class Mesh(SizeFree):
    """Resize to the grid and pull it along a mesh: ``moves`` are rows of (x, y) shares of the side, bilinear between.

    The corners of the mesh lie on the corners of the picture; a move says how far from its place a point is fetched.
    """

    moves: tuple[tuple[tuple[float, float], ...], ...]

    def __post_init__(self) -> None:
        moves = np.array(self.moves, dtype=np.float64)
        if moves.ndim != 3 or moves.shape[2] != 2 or min(moves.shape[:2]) < 2 or not (np.abs(moves) <= 1.0).all():
            raise fail(self, "moves", "at least 2 x 2 pairs (x, y) of numbers in [-1, 1]")

    def at(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = _centres(grid)
        moves = np.array(self.moves, dtype=np.float64)
        at_x, at_y = x / grid[1] * (moves.shape[1] - 1), y / grid[0] * (moves.shape[0] - 1)
        moved = bilinear(moves, at_x, at_y)
        return Resize(*grid), _remap(x + moved[..., 0] * grid[1], y + moved[..., 1] * grid[0])


# --------------------------------------------------------------------------------------------- helpers


def homography(start: tuple[tuple[float, float], ...], end: tuple[tuple[float, float], ...]) -> Rows:
    """The 3x3 matrix that sends four points to four points.

    Both quadrilaterals are images of the unit square under closed-form maps (Heckbert 1989); the answer is the one
    map after the inverse of the other. Raises ``ValueError`` if three of the points of a quadrilateral lie on one line.
    """
    matrix = matrices.multiply(_square_to(end), matrices.inverse(_square_to(start)))
    scale = 1.0 / matrix[8]
    return matrices.rows(tuple(scale * value for value in matrix))  # type: ignore[arg-type]


def _square_to(corners: tuple[tuple[float, float], ...]) -> Flat:
    """The map of the unit square's corners (0, 0), (1, 0), (1, 1), (0, 1) to four points."""
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = corners
    ax, ay, bx, by = x1 - x2, y1 - y2, x3 - x2, y3 - y2
    sx, sy = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    area = ax * by - bx * ay
    if abs(area) < 1e-12 * (abs(ax) + abs(bx)) * (abs(ay) + abs(by)) or area == 0.0:
        raise ValueError(f"a quadrilateral needs corners of which no three lie on one line, got {corners!r}")
    g, h = (sx * by - bx * sy) / area, (ax * sy - sx * ay) / area
    return (x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h, 1.0)


def bilinear(values: NDArray, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """``values`` [H, W, C] at fractional *array* positions (column x, row y), held at the border."""
    height, width = values.shape[:2]
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    j, i = np.minimum(x.astype(np.int64), max(width - 2, 0)), np.minimum(y.astype(np.int64), max(height - 2, 0))
    right, below = np.minimum(j + 1, width - 1), np.minimum(i + 1, height - 1)
    fx, fy = (x - j)[..., None], (y - i)[..., None]
    upper = values[i, j] * (1 - fx) + values[i, right] * fx
    lower = values[below, j] * (1 - fx) + values[below, right] * fx
    return upper * (1 - fy) + lower * fy


def _centres(size: Size) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y, each [H, W], of the pixel centres."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    return x, y


def _remap(x: NDArray[np.float64], y: NDArray[np.float64]) -> Remap:
    return Remap(np.stack([x, y], axis=-1).astype(np.float32))


def _first_fitting(shapes: tuple[tuple[float, float], ...], height: int, width: int) -> Size | None:
    """The first (area share, aspect ratio width/height) as whole pixels (h, w) that fit into height x width."""
    for area, aspect in shapes:
        w = round(math.sqrt(area * height * width * aspect))
        h = round(math.sqrt(area * height * width / aspect))
        if 0 < w <= width and 0 < h <= height:
            return h, w
    return None


_Kind = TypeVar("_Kind", bound=Edit)


def _trusted(kind: type[_Kind], *values: object) -> _Kind:
    """A concrete edit of numbers that were checked when its size-free edit was made; checking again costs the time."""
    edit = object.__new__(kind)
    edit.__dict__.update(zip(kind.__match_args__, values, strict=True))
    return edit
