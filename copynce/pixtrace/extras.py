"""Albumentations' operations of the released policies' "extra" group, as edits of colours.

Numbers are the defaults of Albumentations 1.3.1. Where the operation itself is no matrix, curve or kernel, the nearest
one stands for it; docs/edits.md lists each difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from copynce.pixtrace.edits.base import Photometric
from copynce.pixtrace.edits.colour import (
    Clahe,
    ColorMatrix,
    Convolve,
    Equalize,
    Jpeg,
    Median,
    Noise,
    Rain,
    ToneCurve,
)


class Draw(Protocol):
    """A stream of random numbers."""

    def unit(self) -> float: ...

    def uniform(self, low: float, high: float) -> float: ...

    def integer(self, below: int) -> int: ...


def _mixed(matrix: np.ndarray, offset: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> ColorMatrix:
    red, green, blue = ((float(r), float(g), float(b), float(o)) for (r, g, b), o in zip(matrix, offset, strict=True))
    return ColorMatrix((red, green, blue))


def _normal(draw: Draw) -> float:
    """N(0, 1), by Box and Muller."""
    return math.sqrt(-2.0 * math.log(1.0 - draw.unit())) * math.cos(2.0 * math.pi * draw.unit())


def clahe(draw: Draw) -> Photometric:
    """The luma's histogram made flatter, tile by tile."""
    return Clahe()


def channel_dropout(draw: Draw) -> Photometric:
    """One channel black."""
    kept = np.ones(3)
    kept[draw.integer(3)] = 0.0
    return _mixed(np.diag(kept))


def channel_shuffle(draw: Draw) -> Photometric:
    """Channels change places."""
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    return _mixed(np.eye(3)[list(orders[draw.integer(6)])])


def equalize(draw: Draw) -> Photometric:
    """The histogram of each channel made flat."""
    return Equalize()


def fancy_pca(draw: Draw) -> Photometric:
    """A shift along the principal axes of natural colours."""
    return _mixed(np.eye(3), _offsets(_AXES @ (_SPREADS * [0.1 * _normal(draw) for _ in range(3)])))


def gauss_noise(draw: Draw) -> Photometric:
    """Noise of a variance of 10 to 50 on the 0..255 scale, on each channel."""
    return Noise(chroma=math.sqrt(draw.uniform(10.0, 50.0)) / 255.0, noise_seed=draw.integer(2**31 - 1))


def hue_saturation_value(draw: Draw) -> Photometric:
    """Hue turned by up to 40 degrees, saturation times 0.7 to 1.3, up to 20 levels brighter or darker."""
    turn, saturation = math.radians(draw.uniform(-40.0, 40.0)), draw.uniform(0.7, 1.3)
    chroma = _FROM_YIQ @ np.diag([0.0, 1.0, 1.0]) @ _TO_YIQ
    turned = _FROM_YIQ @ [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]] @ _TO_YIQ
    matrix = np.eye(3) - chroma + saturation * (math.cos(turn) * chroma + math.sin(turn) * turned)
    return _mixed(matrix, (draw.uniform(-20.0, 20.0) / 255.0,) * 3)


def iso_noise(draw: Draw) -> Photometric:
    """A camera's noise at high sensitivity: of lightness and, weaker, of colour."""
    shift, intensity = draw.uniform(0.01, 0.05), draw.uniform(0.1, 0.5)
    luma, chroma = math.sqrt(51.0 * intensity) / 255.0, 0.6 * math.pi * shift * intensity
    return Noise(luma=luma, chroma=chroma, noise_seed=draw.integer(2**31 - 1))


def image_compression(draw: Draw) -> Photometric:
    """JPEG of quality 99 or 100."""
    return Jpeg(99 + draw.integer(2))


def invert(draw: Draw) -> Photometric:
    """The negative."""
    return _mixed(-np.eye(3), (1.0, 1.0, 1.0))


def median_blur(draw: Draw) -> Photometric:
    """Median over 3, 5 or 7 pixels a side."""
    return Median(3 + 2 * draw.integer(3))


def motion_blur(draw: Draw) -> Photometric:
    """Mean along a line between two pixels of a box of 3, 5 or 7 pixels a side."""
    size = 3 + 2 * draw.integer(3)
    ax, ay, bx, by = (draw.integer(size) for _ in range(4))
    if (ax, ay) == (bx, by):
        bx, by = size - 1 - ax, size - 1 - ay
    steps = max(abs(bx - ax), abs(by - ay), 1)
    kernel = np.zeros((size, size))
    for k in range(steps + 1):
        kernel[math.floor(ay + (by - ay) * k / steps + 0.5), math.floor(ax + (bx - ax) * k / steps + 0.5)] = 1.0
    return _filter(kernel / kernel.sum())


def multiplicative_noise(draw: Draw) -> Photometric:
    """All colours times 0.9 to 1.1."""
    return _mixed(draw.uniform(0.9, 1.1) * np.eye(3))


def posterize(draw: Draw) -> Photometric:
    """The four highest bits of each value."""
    return _POSTERIZED


def rgb_shift(draw: Draw) -> Photometric:
    """Up to 20 levels added to or taken from each channel."""
    return _mixed(np.eye(3), _offsets(np.array([draw.uniform(-20.0, 20.0) / 255.0 for _ in range(3)])))


def brightness_contrast(draw: Draw) -> Photometric:
    """Times 0.8 to 1.2, plus up to 20 % of white."""
    return _mixed(draw.uniform(0.8, 1.2) * np.eye(3), (draw.uniform(-0.2, 0.2),) * 3)


def fog(draw: Draw) -> Photometric:
    """An even haze: 10 to 50 % of light grey."""
    haze = draw.uniform(0.1, 0.5)
    return _mixed((1.0 - haze) * np.eye(3), (0.9 * haze,) * 3)


def gamma(draw: Draw) -> Photometric:
    """Gamma 0.8 to 1.2."""
    exponent = draw.uniform(0.8, 1.2)
    return ToneCurve(tuple((k / 63.0) ** exponent for k in range(64)))


def rain(draw: Draw) -> Photometric:
    """Drops, all at one slant of up to 10 pixels."""
    slant = math.trunc(draw.uniform(-10.0, 10.0))
    return Rain(slant, noise_seed=draw.integer(2**31 - 1))


def snow(draw: Draw) -> Photometric:
    """Dark values times 2.5, up to a threshold of 98 to 123."""
    threshold = (draw.uniform(0.1, 0.3) * 127.5 + 85.0) / 255.0
    return ToneCurve(tuple(min(1.0, 2.5 * x) if x < threshold else x for x in _VALUES))


def tone_curve(draw: Draw) -> Photometric:
    """A cubic Bezier curve whose inner points lie near 1/4 and 3/4."""
    low, high = (min(1.0, max(0.0, at + 0.1 * _normal(draw))) for at in (0.25, 0.75))
    return ToneCurve(
        tuple(
            min(1.0, 3 * (1 - t) ** 2 * t * low + 3 * (1 - t) * t * t * high + t**3)
            for t in [k / 63.0 for k in range(64)]
        )
    )


def sharpen(draw: Draw) -> Photometric:
    """20 to 50 % of a sharpening kernel."""
    alpha, lightness = draw.uniform(0.2, 0.5), draw.uniform(0.5, 1.0)
    kernel = np.full((3, 3), -alpha)
    kernel[1, 1] = alpha * (8.0 + lightness) + 1.0 - alpha
    return _filter(kernel)


def solarize(draw: Draw) -> Photometric:
    """Values from 128 on inverted."""
    return _SOLARIZED


def sepia(draw: Draw) -> Photometric:
    """Brownish."""
    return _mixed(np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]]))


def _filter(kernel: np.ndarray) -> Convolve:
    return Convolve(tuple(tuple(row) for row in kernel.tolist()))


def _offsets(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = values.tolist()
    return red, green, blue


_VALUES = [k / 255.0 for k in range(256)]
_POSTERIZED = ToneCurve(tuple((k & 0xF0) / 255.0 for k in range(256)))
_SOLARIZED = ToneCurve(tuple((k if k < 128 else 255 - k) / 255.0 for k in range(256)))
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
#: Principal axes of ImageNet's colours and the spread along them, on the [0, 1] scale.
_AXES = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_SPREADS = np.array([0.2175, 0.0188, 0.0045])

#: The 24 operations, each drawn with the same probability.
EXTRAS: tuple[Callable[[Draw], Photometric], ...] = (
    clahe,
    channel_dropout,
    channel_shuffle,
    equalize,
    fancy_pca,
    gauss_noise,
    hue_saturation_value,
    iso_noise,
    image_compression,
    invert,
    median_blur,
    motion_blur,
    multiplicative_noise,
    posterize,
    rgb_shift,
    brightness_contrast,
    fog,
    gamma,
    rain,
    snow,
    tone_curve,
    sharpen,
    solarize,
    sepia,
)
