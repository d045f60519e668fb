"""Edits of colours. They move nothing and cover nothing, so tables pass them over; each has one form."""

from __future__ import annotations

import math
from dataclasses import dataclass

from copynce.pixtrace.edits.base import Photometric, require_integers, require_range, require_seed, wrong


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
            raise wrong(self, "order", f"a permutation of {names}")
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
            raise wrong(self, "rows", "three rows of four finite numbers")


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
            raise wrong(self, "levels", "2 to 256 numbers in [0, 1]")


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
            raise wrong(self, "kernel", "rows of one length, all sides odd and at most 15")
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for row in self.kernel for v in row):
            raise wrong(self, "kernel", "finite numbers")


@dataclass(frozen=True)
class Median(Photometric):
    """Each channel's median over ``window`` x ``window`` pixels (odd, 3 to 15) of the view, on 8-bit values."""

    window: int = 3

    def __post_init__(self) -> None:
        require_integers(self, 3, "window")
        if self.window % 2 == 0 or self.window > 15:
            raise wrong(self, "window", "odd and at most 15")


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

    ``noise_seed`` chooses which, as in :class:`Erase`.
    """

    luma: float = 0.0
    chroma: float = 0.0
    noise_seed: int = 0

    def __post_init__(self) -> None:
        require_range(self, 0.0, 1.0, "luma", "chroma")
        require_seed(self)


@dataclass(frozen=True)
class Rain(Photometric):
    """Light grey drops of 1 x 20 pixels of the view, a mean of 7 x 7 pixels, and 70 % of the brightness.

    ``slant``: how far right a drop ends of where it begins, in pixels; ``noise_seed`` chooses the places, as in
    :class:`Erase`.
    """

    slant: int = 0
    noise_seed: int = 0

    def __post_init__(self) -> None:
        require_range(self, -20, 20, "slant")
        require_seed(self)


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
