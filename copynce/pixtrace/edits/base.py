"""What every edit says of itself, and what its parameters must be.

Conventions (DESIGN.md): continuous coordinates put pixel (row i, column j) on the square [j, j+1) x [i, i+1);
a matrix maps *input* to *output* points ``(x, y, 1)``.

Both executors read edits through :class:`Edit` alone, so a new edit is one class (docs/edits.md, "To add an edit").
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from copynce.pixtrace.bitmaps import Bits, bits_of
from copynce.pixtrace.matrices import Flat

Matrix = NDArray[np.float64]
Rows = tuple[tuple[float, float, float], ...]
Size = tuple[int, int]
Color = tuple[float, float, float]

#: No side of a picture is longer, in pixels.
_LARGEST = 2**20
#: Choices of a picture lie below 1, so that ``floor(choice * n)`` is one of ``n``.
BELOW_ONE = math.nextafter(1.0, 0.0)


class Cover(NamedTuple):
    """What an edit lays on the picture, or under it: one blending step.

    Inside of ``box`` (left, top, right, bottom; pixels of the picture) what was there keeps ``keep`` in [0, 1] of its
    colour, and the rest comes from one of three: another picture (``picture_choice``), one ``color``, or noise
    (``noise_seed``). ``bits`` cuts the box to the 1s of a bitmap stretched over it. ``beneath``: what the cover shows
    is a new canvas that lies under the picture and surrounds it; the box is then the whole picture, and the edit's
    :meth:`Edit.forward` says where on the canvas it lies.
    """

    box: tuple[int, int, int, int]
    keep: float
    picture_choice: float = 0.0
    color: Color | None = None
    noise_seed: int | None = None
    bits: Bits | None = None
    beneath: bool = False


@dataclass(frozen=True)
class Edit:
    """One step of an edit program: absolute (in pixels) or relative (in fractions of a picture of unknown size).

    An absolute edit says here all that tables and pictures need: the picture's size after it, where its points go, and
    what covers it. The defaults are those of an edit that does nothing.
    """

    #: True if pixels from outside of the picture can show after the edit (they are black and have no source).
    exposes: ClassVar[bool] = False
    #: True if the edit scales the whole picture to the whole canvas and does nothing else.
    only_scales: ClassVar[bool] = False

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        """The absolute edits that this one is for a picture of ``height`` x ``width`` pixels.

        ``grid`` is the model's input size ``(height, width)``, where edits of the released policies resize to it.
        """
        return (self,)

    def output_size(self, height: int, width: int) -> Size:
        """Size of the picture after the edit; raises ``ValueError`` if the edit does not fit the picture."""
        return height, width

    def forward(self, height: int, width: int) -> Flat | None:
        """Forward 3x3 matrix (row by row), input to output points, for an input of ``height`` x ``width`` pixels.

        None if every point stays where it is, or if no matrix can say where it goes (:class:`Remap`).
        """
        return None

    def cover(self, height: int, width: int) -> Cover | None:
        """What the edit lays on a picture of ``height`` x ``width`` pixels, or under it; None if nothing."""
        return None


# The families. Executors ask for the two that are no map and no cover: Photometric and Remap.


@dataclass(frozen=True)
class Geometry(Edit, ABC):
    """An edit that is one projective map of the picture."""

    @abstractmethod
    def forward(self, height: int, width: int) -> Flat:
        """As :meth:`Edit.forward`, and always a matrix."""


@dataclass(frozen=True)
class Layered(Edit, ABC):
    """An edit that blends a second surface with the picture."""

    @abstractmethod
    def cover(self, height: int, width: int) -> Cover:
        """As :meth:`Edit.cover`, and never None."""


@dataclass(frozen=True)
class Photometric(Edit):
    """An edit of colours only."""


@dataclass(frozen=True)
class Relative(Edit, ABC):
    """An edit in fractions of the picture; :meth:`Edit.absolute` makes it absolute. Programs are sampled in these."""

    @abstractmethod
    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        """As :meth:`Edit.absolute`; what comes out fits any picture."""


# ------------------------------------------------------------------------------------------ checks of parameters


def wrong(edit: Edit, parameter: str, expected: str) -> ValueError:
    """The error that names a parameter, what was expected and what came."""
    return ValueError(f"{type(edit).__name__}.{parameter} must be {expected}, got {getattr(edit, parameter)!r}")


def require_integers(edit: Edit, least: int, *parameters: str) -> None:
    """Raise ``ValueError`` unless the parameters are whole numbers of at least ``least`` pixels; NumPy's become int."""
    for name in parameters:
        value = getattr(edit, name)
        if type(value) is int and least <= value <= _LARGEST:
            continue
        if isinstance(value, np.integer) and least <= value <= _LARGEST:
            object.__setattr__(edit, name, int(value))
            continue
        raise wrong(edit, name, f"a whole number of pixels in [{least}, {_LARGEST}]")


def require_range(edit: Edit, low: float, high: float, *parameters: str) -> None:
    """Raise ``ValueError`` unless the parameters are numbers in [low, high]."""
    for name in parameters:
        value = getattr(edit, name)
        # ``not (a <= v <= b)`` also catches NaN.
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not low <= value <= high:
            raise wrong(edit, name, f"a number in [{low:g}, {high:g}]")


def require_seed(edit: Edit) -> None:
    """Raise ``ValueError`` unless ``edit.noise_seed`` is one of 2**31."""
    require_range(edit, 0, 2**31 - 1, "noise_seed")


def require_color(edit: Edit, color: tuple[float, ...]) -> None:
    """Raise ``ValueError`` unless ``edit.color`` is red, green and blue in [0, 1]."""
    if len(color) != 3 or not all(isinstance(v, (int, float)) and 0.0 <= v <= 1.0 for v in color):
        raise wrong(edit, "color", "red, green and blue in [0, 1]")


def checked_matrix(edit: Edit, matrix: object) -> Rows:
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


def checked_size(size: Size, name: str) -> Size:
    """``size`` as two ints; raises ``ValueError`` naming it if a side is shorter than a pixel."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be (height, width) of at least 1 pixel, got {tuple(size)}")
    return int(height), int(width)


class Boxed(Protocol):
    """An edit with a box of ``height`` x ``width`` pixels whose top left corner is at (``left``, ``top``)."""

    @property
    def top(self) -> int: ...
    @property
    def left(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


def box_of(edit: Boxed) -> tuple[int, int, int, int]:
    """The edit's box as (left, top, right, bottom)."""
    return edit.left, edit.top, edit.left + edit.width, edit.top + edit.height


def require_box_inside(edit: Boxed, height: int, width: int) -> None:
    """Raise ``ValueError`` unless the edit's box lies inside of a picture of ``height`` x ``width`` pixels."""
    if edit.top < 0 or edit.left < 0 or edit.top + edit.height > height or edit.left + edit.width > width:
        raise ValueError(
            f"{type(edit).__name__} must lie inside of the {height}x{width} picture, got top={edit.top}, "
            f"left={edit.left}, height={edit.height}, width={edit.width}"
        )


# ------------------------------------------------------------------------------------------ from relative to absolute

_Kind = TypeVar("_Kind", bound=Edit)


def trusted(kind: type[_Kind], *values: object) -> _Kind:
    """An absolute edit of numbers that were checked when its relative form was made; checking again costs the time."""
    edit = object.__new__(kind)
    edit.__dict__.update(zip(kind.__match_args__, values, strict=True))
    return edit


def first_fitting(shapes: tuple[tuple[float, float], ...], height: int, width: int) -> Size | None:
    """The first (fraction of the area, aspect ratio width/height) as whole pixels (h, w) that fit into height x width.

    None if none fits: at the first ten attempts that fail torchvision's random shapes give up too.
    """
    for area, aspect in shapes:
        w = round(math.sqrt(area * height * width * aspect))
        h = round(math.sqrt(area * height * width / aspect))
        if 0 < w <= width and 0 < h <= height:
            return h, w
    return None


def placed(h: int, w: int, height: int, width: int, x: float, y: float) -> tuple[int, int]:
    """(top, left) of a box of ``h`` x ``w`` pixels at fractions ``x`` and ``y`` of the room left in a larger one."""
    return round(y * (height - h)), round(x * (width - w))
