"""The edits of a copy, as frozen dataclasses that hold plain numbers.

Conventions (DESIGN.md): continuous coordinates put pixel (row i, column j) on the square [j, j+1) x [i, i+1);
a matrix maps *input* to *output* points ``(x, y, 1)``. Three families, told apart by their base class:

* :class:`Geometry`: moves pixels by one projective map; knows its output size and matrix.
* :class:`Layered`: brings in another picture or covers a region; :class:`PasteOnto` and :class:`Matte` also move
  pixels.
* :class:`Photometric`: changes colours, leaves coordinates alone.

:class:`Remap` stands alone: any dense backward map, a step between composed runs. The last family, :class:`SizeFree`,
is what programs are sampled in: fractions of a picture whose size is not known yet. ``edit.at(height, width, grid)``
turns any edit into concrete ones of the other families.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import copynce.pixtrace.matrices as matrices
from copynce.pixtrace.bitmaps import Bits, bits_of
from copynce.pixtrace.matrices import Flat

Matrix = NDArray[np.float64]
Rows = tuple[tuple[float, float, float], ...]
Size = tuple[int, int]


def fail(edit: Edit, parameter: str, expected: str) -> ValueError:
    return ValueError(f"{type(edit).__name__}.{parameter} must be {expected}, got {getattr(edit, parameter)!r}")


def _require_integers(edit: Edit, least: int, *parameters: str) -> None:
    for name in parameters:
        value = getattr(edit, name)
        if type(value) is int and least <= value <= _LARGEST:
            continue
        if isinstance(value, np.integer) and least <= value <= _LARGEST:
            object.__setattr__(edit, name, int(value))
            continue
        raise fail(edit, name, f"a whole number of pixels in [{least}, {_LARGEST}]")


def require_range(edit: Edit, low: float, high: float, *parameters: str) -> None:
    for name in parameters:
        value = getattr(edit, name)
        # ``not (a <= v <= b)`` also catches NaN.
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not low <= value <= high:
            raise fail(edit, name, f"a number in [{low:g}, {high:g}]")


#: No side of a picture is longer, in pixels.
_LARGEST = 2**20
BELOW_ONE = math.nextafter(1.0, 0.0)


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
class Geometry(Edit, ABC):
    """An edit that is one projective map of the picture."""

    #: True if pixels from outside of the picture can show after the edit (they are black and have no source).
    exposes = False

    @abstractmethod
    def forward(self, height: int, width: int) -> Flat:
        """Forward 3x3 matrix (row by row), input to output points, for an input of ``height`` x ``width`` pixels."""


@dataclass(frozen=True)
class Layered(Edit):
    """An edit that blends a second surface with the picture."""


@dataclass(frozen=True)
class Photometric(Edit):
    """An edit of colours only."""


# --------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Crop(Geometry):
    """Keep the box of ``height`` x ``width`` pixels whose top left corner is at (``left``, ``top``)."""

    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        _require_integers(self, 0, "top", "left")
        _require_integers(self, 1, "height", "width")

    def output_size(self, height: int, width: int) -> Size:
        _require_box_inside(self, height, width)
        return self.height, self.width

    def forward(self, height: int, width: int) -> Flat:
        return matrices.translation(-self.left, -self.top)


@dataclass(frozen=True)
class Resize(Geometry):
    """Scale the whole picture to ``height`` x ``width`` pixels, ignoring the aspect ratio."""

    height: int
    width: int

    def __post_init__(self) -> None:
        _require_integers(self, 1, "height", "width")

    def output_size(self, height: int, width: int) -> Size:
        return self.height, self.width

    def forward(self, height: int, width: int) -> Flat:
        return matrices.scaling(self.width / width, self.height / height)


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


@dataclass(frozen=True)
class Affine(Geometry):
    """Map points by the forward ``matrix`` (3x3, last row 0 0 1); the canvas keeps its size, black outside.

    Rotation, shear, scale, stretch, translation and all products of them; :class:`Rotation`, :class:`Stretch` and
    :class:`Shift` write the common ones in fractions of the picture.
    """

    matrix: Rows
    exposes = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", _checked_matrix(self, self.matrix))
        if self.matrix[2] != (0.0, 0.0, 1.0):
            raise fail(self, "matrix", "affine, with last row (0, 0, 1)")

    def forward(self, height: int, width: int) -> Flat:
        return _flat(self.matrix)


@dataclass(frozen=True)
class Perspective(Geometry):
    """Map points by the forward homography ``matrix`` (3x3); the canvas keeps its size, black outside.

    Points that the map sends behind the viewer are not shown. The matrix' sign is chosen so that the picture's centre
    lies in front of the viewer.
    """

    matrix: Rows
    exposes = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", _checked_matrix(self, self.matrix))

    def forward(self, height: int, width: int) -> Flat:
        return _seen_from_the_front(self, self.matrix, height, width)


@dataclass(frozen=True)
class Pad(Geometry):
    """Add black borders of so many pixels."""

    left: int
    top: int
    right: int
    bottom: int
    exposes = True

    def __post_init__(self) -> None:
        _require_integers(self, 0, "left", "top", "right", "bottom")

    def output_size(self, height: int, width: int) -> Size:
        return height + self.top + self.bottom, width + self.left + self.right

    def forward(self, height: int, width: int) -> Flat:
        return matrices.translation(self.left, self.top)


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
        _require_integers(self, 1, "canvas_height", "canvas_width")
        _require_integers(self, 0, "top", "left")
        require_range(self, 0.0, 1.0, "opacity")
        require_range(self, 0.0, BELOW_ONE, "picture")

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
        _require_integers(self, 0, "top", "left")
        _require_integers(self, 1, "height", "width")
        require_range(self, 0.0, 1.0, "opacity")
        require_range(self, 0.0, BELOW_ONE, "picture")

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
        _require_integers(self, 0, "top", "left")
        _require_integers(self, 1, "height", "width")
        require_range(self, 0, 2**31 - 1, "noise")

    def output_size(self, height: int, width: int) -> Size:
        _require_box_inside(self, height, width)
        return height, width


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
    color: tuple[float, float, float] = (0.0, 0.0, 0.0)
    opacity: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", checked_bits(self, "bits", self.bits))
        _require_integers(self, 0, "top", "left")
        _require_integers(self, 1, "height", "width")
        require_range(self, 0.0, 1.0, "opacity")
        require_color(self, self.color)

    def output_size(self, height: int, width: int) -> Size:
        _require_box_inside(self, height, width)
        return height, width


@dataclass(frozen=True)
class Matte(Layered):
    """Cut the object out by ``mask``, warp it by the forward ``matrix`` and lay it on another picture.

    ``mask``: rows of 0 and 1 (or a 2-D array of them) of exactly the picture's size. ``matrix`` (3x3, affine or
    projective) maps the picture's points to the canvas of ``canvas_height`` x ``canvas_width`` pixels; what falls
    outside is cut off. ``opacity`` and ``picture`` as in :class:`PasteOnto`.
    """

    mask: Bits
    matrix: Rows
    canvas_height: int
    canvas_width: int
    opacity: float = 1.0
    picture: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", checked_bits(self, "mask", self.mask))
        object.__setattr__(self, "matrix", _checked_matrix(self, self.matrix))
        _require_integers(self, 1, "canvas_height", "canvas_width")
        require_range(self, 0.0, 1.0, "opacity")
        require_range(self, 0.0, BELOW_ONE, "picture")

    def output_size(self, height: int, width: int) -> Size:
        if (len(self.mask), len(self.mask[0])) != (height, width):
            raise ValueError(
                f"Matte.mask must have the size of the picture, {height}x{width}, "
                f"got {len(self.mask)}x{len(self.mask[0])}"
            )
        return self.canvas_height, self.canvas_width

    def forward(self, height: int, width: int) -> Flat:
        """Forward 3x3 matrix, picture to canvas points."""
        return _seen_from_the_front(self, self.matrix, height, width)


# --------------------------------------------------------------------------------------------- dense maps


@dataclass(frozen=True, eq=False)
class Remap(Edit):
    """Any dense backward map: swirl, wave, lens, mesh.

    ``field`` float32 [H, W, 2] (or nested tuples of that shape): the (x, y) point of the *input* that the centre of
    output pixel (i, j) shows, in the input's continuous pixel coordinates; the output has H x W pixels. Points
    outside of the input are black.
    """

    field: NDArray[np.float32]

    def __post_init__(self) -> None:
        field = np.array(self.field, dtype=np.float32)
        if field.ndim != 3 or field.shape[2] != 2 or field.size == 0:
            raise ValueError(f"Remap.field must have the shape [H, W, 2], H and W at least 1, got {list(field.shape)}")
        if not np.isfinite(field).all():
            wrong = tuple(int(k) for k in np.argwhere(~np.isfinite(field))[0])
            raise ValueError(f"Remap.field must be finite, got {field[wrong]} at {list(wrong)}")
        field.setflags(write=False)
        object.__setattr__(self, "field", field)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remap) and np.array_equal(self.field, other.field)

    def __hash__(self) -> int:
        return hash(self.field.tobytes())

    def output_size(self, height: int, width: int) -> Size:
        return self.field.shape[0], self.field.shape[1]


# --------------------------------------------------------------------------------------------- photometric


@dataclass(frozen=True)
class ColorJitter(Photometric):
    """Brightness, contrast and saturation factors (1 = unchanged) and hue in turns of the colour circle.

    ``order``: the four names in the order in which they are applied; colours are clipped after each.
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    order: tuple[str, ...] = ("brightness", "contrast", "saturation", "hue")

    def __post_init__(self) -> None:
        require_range(self, 0.0, 10.0, "brightness", "contrast", "saturation")
        require_range(self, -0.5, 0.5, "hue")
        names = ("brightness", "contrast", "saturation", "hue")
        if not isinstance(self.order, (tuple, list)) or sorted(map(str, self.order)) != sorted(names):
            raise fail(self, "order", f"a permutation of {names}")
        object.__setattr__(self, "order", tuple(self.order))


@dataclass(frozen=True)
class Grayscale(Photometric):
    """Luma (ITU-R 601) on all three channels."""


@dataclass(frozen=True)
class Blur(Photometric):
    """Gaussian blur; ``sigma`` in pixels of a 224-pixel output, scaled with the output's size."""

    sigma: float

    def __post_init__(self) -> None:
        require_range(self, 0.0, 100.0, "sigma")


@dataclass(frozen=True)
class Jpeg(Photometric):
    """The artefacts of saving as JPEG with ``quality`` 1 to 100."""

    quality: int

    def __post_init__(self) -> None:
        require_range(self, 1, 100, "quality")


@dataclass(frozen=True)
class ColorMatrix(Photometric):
    """Each of red, green and blue becomes ``row @ (red, green, blue, 1)``, colours in [0, 1], then clipped to it."""

    rows: tuple[tuple[float, float, float, float], ...]

    def __post_init__(self) -> None:
        if len(self.rows) != 3 or not all(
            len(row) == 4 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in row) for row in self.rows
        ):
            raise fail(self, "rows", "three rows of four finite numbers")


@dataclass(frozen=True)
class ToneCurve(Photometric):
    """Every channel through one curve: ``levels`` in [0, 1] at equidistant inputs from 0 to 1, linear in between.

    256 levels are a table of 8-bit values; two are a line.
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.levels) <= 256 or not all(
            isinstance(v, (int, float)) and 0.0 <= v <= 1.0 for v in self.levels
        ):
            raise fail(self, "levels", "2 to 256 numbers in [0, 1]")


@dataclass(frozen=True)
class Equalize(Photometric):
    """The histogram of each channel made flat."""


@dataclass(frozen=True)
class Clahe(Photometric):
    """The histogram of the lightness made flatter in each of 8 x 8 tiles, with a clip limit of 2.5."""


@dataclass(frozen=True)
class Convolve(Photometric):
    """Filter by a small ``kernel`` (odd sides up to 15), centred, at the view's resolution; then clipped.

    Sharpening, edge enhancement, motion blur. Kernels of a program are convolved into one.
    """

    kernel: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        sides = {len(self.kernel), *(len(row) for row in self.kernel)}
        if not sides <= {1, 3, 5, 7, 9, 11, 13, 15} or len({len(row) for row in self.kernel}) != 1:
            raise fail(self, "kernel", "rows of one length, all sides odd and at most 15")
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for row in self.kernel for v in row):
            raise fail(self, "kernel", "finite numbers")


@dataclass(frozen=True)
class Median(Photometric):
    """Each channel's median over ``window`` x ``window`` pixels (odd, 3 to 15) of the view, on 8-bit values."""

    window: int = 3

    def __post_init__(self) -> None:
        _require_integers(self, 3, "window")
        if self.window % 2 == 0 or self.window > 15:
            raise fail(self, "window", "odd and at most 15")


@dataclass(frozen=True)
class Pixelate(Photometric):
    """The view shrunk to ``ratio`` of its sides and enlarged by repeating pixels; nothing from a ratio of 1 on."""

    ratio: float

    def __post_init__(self) -> None:
        require_range(self, 1e-3, 10.0, "ratio")


@dataclass(frozen=True)
class ShufflePixels(Photometric):
    """A tenth of the view's pixels change places among themselves, which ones depends on the view's size only."""


@dataclass(frozen=True)
class Noise(Photometric):
    """Gaussian noise: ``luma`` the same on all channels, ``chroma`` on each; standard deviations on the [0, 1] scale.

    ``noise`` chooses which, as in :class:`Erase`.
    """

    luma: float = 0.0
    chroma: float = 0.0
    noise: int = 0

    def __post_init__(self) -> None:
        require_range(self, 0.0, 1.0, "luma", "chroma")
        require_range(self, 0, 2**31 - 1, "noise")


@dataclass(frozen=True)
class Rain(Photometric):
    """Light grey drops of 1 x 20 pixels of the view, a mean of 7 x 7 pixels, and 70 % of the brightness.

    ``slant``: how far right a drop ends of where it begins, in pixels; ``noise`` chooses the places, as in
    :class:`Erase`.
    """

    slant: int = 0
    noise: int = 0

    def __post_init__(self) -> None:
        require_range(self, -20, 20, "slant")
        require_range(self, 0, 2**31 - 1, "noise")


#: The order in which the pixel executor applies colour edits, each at most once but for Convolve.
PHOTOMETRIC_ORDER: tuple[type[Photometric], ...] = (
    ColorJitter,
    Grayscale,
    ColorMatrix,
    ToneCurve,
    Equalize,
    Clahe,
    Rain,
    Convolve,
    Median,
    Pixelate,
    ShufflePixels,
    Noise,
    Blur,
    Jpeg,
)


# --------------------------------------------------------------------------------------------- helpers


def _flat(matrix: Rows) -> Flat:
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return (a, b, c, d, e, f, g, h, i)


def _checked_matrix(edit: Edit, matrix: object) -> Rows:
    """The matrix as three rows of floats; raises ``ValueError`` if it is not 3x3, finite and invertible."""
    name = f"{type(edit).__name__}.matrix"
    try:
        (a, b, c), (d, e, f), (g, h, i) = [[float(value) for value in row] for row in matrix]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be 3x3 numbers, got {matrix!r}") from error
    rows = (a, b, c), (d, e, f), (g, h, i)
    if not all(map(math.isfinite, (a, b, c, d, e, f, g, h, i))):
        raise ValueError(f"{name} must be finite, got {rows}")
    determinant = a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g)
    # Against the product of the rows' lengths, so that neither tiny units nor far translations count as singular.
    lengths = math.hypot(a, b, c) * math.hypot(d, e, f) * math.hypot(g, h, i)
    if abs(determinant) <= 1e-14 * lengths or not math.isfinite(lengths):
        raise ValueError(f"{name} must be invertible, got the singular {rows}")
    return rows


def _seen_from_the_front(edit: Perspective | Matte, matrix: Rows, height: int, width: int) -> Flat:
    """The homography with the sign and scale that put the picture's centre at depth 1 before the viewer."""
    g, h, i = matrix[2]
    depth = g * width / 2 + h * height / 2 + i
    if abs(depth) <= 1e-9 * math.hypot(g * width / 2, h * height / 2, i):
        raise ValueError(
            f"{type(edit).__name__}.matrix must keep the centre of the {height}x{width} picture at a finite point, "
            f"got {matrix!r}, which sends it to infinity"
        )
    scale = 1.0 / depth
    a, b, c, d, e, f, g, h, i = _flat(matrix)
    return (scale * a, scale * b, scale * c, scale * d, scale * e, scale * f, scale * g, scale * h, scale * i)


def checked_bits(edit: Edit, parameter: str, bits: object) -> Bits:
    """``bits`` as rows of 0 and 1, from those or from a 2-D array; raises ``ValueError`` for anything else."""
    if isinstance(bits, np.ndarray):
        if bits.ndim != 2 or bits.size == 0:
            raise ValueError(
                f"{type(edit).__name__}.{parameter} must be 2-D with at least one pixel, got shape {list(bits.shape)}"
            )
        return bits_of(bits)
    # All rows at once: programs are sampled and checked by the thousand.
    if (
        not isinstance(bits, tuple)
        or not all(isinstance(row, str) for row in bits)
        or len(set(map(len, bits))) != 1
        or not bits[0]
        or "".join(bits).encode(errors="replace").translate(None, b"01")
    ):
        raise ValueError(
            f"{type(edit).__name__}.{parameter} must be rows of 0 and 1 of one length or a 2-D array, got {bits!r:.80}"
        )
    return bits


def require_color(edit: Edit, color: tuple[float, ...]) -> None:
    """Raise ``ValueError`` unless ``edit.color`` is three shares."""
    if len(color) != 3 or not all(isinstance(v, (int, float)) and 0.0 <= v <= 1.0 for v in color):
        raise fail(edit, "color", "red, green and blue in [0, 1]")


def _require_box_inside(edit: Crop | Overlay | Erase | Stamp, height: int, width: int) -> None:
    if edit.top < 0 or edit.left < 0 or edit.top + edit.height > height or edit.left + edit.width > width:
        raise ValueError(
            f"{type(edit).__name__} must lie inside of the {height}x{width} picture, got top={edit.top}, "
            f"left={edit.left}, height={edit.height}, width={edit.width}"
        )
