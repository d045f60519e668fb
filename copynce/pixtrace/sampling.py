"""Sample edit programs from (seed, epoch, uuid): the released augmentation policies (PROTOCOLS 6), as numbers.

Every draw of one program comes from one stream of a hash of the three, so a program does not depend on the
number of workers, threads or ranks, nor on the picture's size, the machine or the version of a library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

import copynce.pixtrace.kernels as kernels
from copynce.pixtrace.bitmaps import Bits, bits_of, stroke_bits, text_bits
from copynce.pixtrace.edits import (
    PHOTOMETRIC_ORDER,
    Blur,
    ColorJitter,
    Convolve,
    Edit,
    Grayscale,
    HorizontalFlip,
    Jpeg,
    Photometric,
    Pixelate,
    ShufflePixels,
    VerticalFlip,
)
from copynce.pixtrace.extras import EXTRAS
from copynce.pixtrace.programs import EditProgram
from copynce.pixtrace.shares import (
    EraseShare,
    Lens,
    MatteShare,
    OverlayShare,
    PadShare,
    PasteShare,
    ResizedCrop,
    Rotation,
    Shift,
    StampShare,
    Stretch,
    Swirl,
    Tilt,
    Wave,
)

Range = tuple[float, float]

#: Attempts that torchvision makes for a random shape that fits.
_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Probabilities and ranges of one augmentation policy; defaults are the released descriptor's (PROTOCOLS 6.2)."""

    crop: float = 0.3  #: probability of the crop group, one of resized crop, onto another picture, another on top
    crop_area: Range = (0.25, 0.5)  #: share of the picture that a resized crop keeps
    paste_area: Range = (0.25, 0.5)  #: share of the canvas that the picture takes when laid on another
    paste_crop_area: Range = (0.2, 1.0)  #: share kept by the crop that comes before it half of the time
    paste_opacity: Range = (0.5, 1.0)
    overlay_area: Range = (0.3, 0.7)  #: share of the picture that another one laid on top takes
    overlay_crop_area: Range = (0.3, 1.0)
    overlay_opacity: Range = (0.0, 0.5)
    aspect: Range = (0.33, 3.0)  #: width / height, log-uniform, of crops and layers
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.1
    warp: float = 0.25  #: probability of one of perspective and affine
    tilt: float = 0.5  #: largest inward move of a corner, as a share of half the side
    shear: float = 45.0  #: degrees, both signs
    snap: float = 22.5  #: degrees within which a rotation snaps to a multiple of 90
    brightness: float = 0.5  #: factors are drawn in [1 - b, 1 + b], not below 0
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.1  #: turns, both signs
    grayscale: float = 0.25
    pixelate: float = 0.15
    pixelate_ratio: Range = (0.22, 2.2)  #: of a 224-pixel view's side: AugLy's 0.1 to 1 of a side of about 500
    shuffle: float = 0.15  #: a tenth of the pixels change places
    edges: float = 0.25  #: one of Pillow's two kernels that enhance edges
    extra: float = 0.15  #: one of Albumentations' 24 operations, see :mod:`copynce.pixtrace.extras`
    blur: float = 0.2
    blur_sigma: Range = (0.0, 4.5)  #: pixels of a 224-pixel view: AugLy's radius 0 to 10 on a side of about 500
    jpeg: float = 0.25
    jpeg_quality: tuple[int, ...] = (10, 20, 30, 50)
    pad: float = 0.15
    pad_share: float = 0.2  #: of the width left and right, of the height top and bottom
    erase: float = 0.15
    erase_area: Range = (0.02, 0.33)
    erase_aspect: Range = (0.3, 3.3)
    stretch: float = 0.0  #: probability of scaling the axes apart and moving the picture on its canvas
    stretch_factor: Range = (0.6, 1.6)  #: of each axis, log-uniform
    shift: float = 0.2  #: largest move, as a share of the side, that goes with a stretch
    #: Which text probability counts: the configured one, or the one that the released code's inverted test makes of it
    text: Literal["none", "configured", "effective"] = "effective"
    text_configured: float = 0.25
    text_effective: float = 0.75
    text_size: Range = (0.1, 0.3)  #: height as a share of the shorter side
    text_opacity: Range = (0.1, 1.0)
    emoji: float = 0.25
    emoji_size: Range = (0.1, 0.5)
    emoji_opacity: Range = (0.7, 1.0)
    stroke: float = 0.25  #: a smear of a brush
    matte: float = 0.0  #: an object cut out and laid on another picture, after everything else
    remap: float = 0.0  #: one of swirl, wave and lens

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "Range" and not (len(value) == 2 and 0.0 <= value[0] <= value[1] < math.inf):
                raise ValueError(f"Policy.{field.name} must be (low, high) with 0 <= low <= high, got {value!r}")
            most = {"shear": 89.0, "snap": 45.0, "hue": 0.5, "pad_share": 10.0}.get(field.name, 1.0)
            if field.type == "float" and not 0.0 <= value <= most:
                raise ValueError(f"Policy.{field.name} must be a number in [0, {most:g}], got {value!r}")
        if self.text not in ("none", "configured", "effective"):
            raise ValueError(f"Policy.text must be 'none', 'configured' or 'effective', got {self.text!r}")


POLICIES: dict[str, Policy] = {
    "descriptor": Policy(),
    # The descriptor's geometry, layers, colour jitter, blur, JPEG and erasing: a small model learns it in minutes.
    "light": Policy(pixelate=0.0, shuffle=0.0, edges=0.0, extra=0.0, text="none", emoji=0.0, stroke=0.0),
    "matcher": Policy(
        crop=0.5,
        crop_area=(0.15, 0.5),
        paste_area=(0.15, 0.5),
        overlay_area=(0.5, 0.8),
        warp=0.35,
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        blur=0.25,
        jpeg=0.35,
        pad=0.25,
        erase=0.25,
        pixelate=0.25,
        shuffle=0.25,
        edges=0.3,
        text_configured=0.35,
        text_effective=0.65,
        emoji=0.35,
        stroke=0.3,
    ),
    # Stronger in every respect, for queries as hard as those of the challenge's second phase; our own numbers.
    "phase2": Policy(
        crop=0.6,
        crop_area=(0.08, 0.5),
        paste_area=(0.08, 0.5),
        paste_crop_area=(0.15, 1.0),
        overlay_area=(0.3, 0.8),
        overlay_opacity=(0.2, 0.9),
        vertical_flip=0.2,
        warp=0.5,
        tilt=0.6,
        stretch=0.3,
        brightness=0.8,
        contrast=0.8,
        saturation=0.9,
        hue=0.3,
        grayscale=0.3,
        blur=0.35,
        jpeg=0.4,
        jpeg_quality=(5, 10, 20, 30, 50),
        pad=0.3,
        erase=0.3,
        erase_area=(0.02, 0.4),
        pixelate=0.3,
        shuffle=0.25,
        edges=0.35,
        extra=0.3,
        text_configured=0.5,
        text_effective=0.5,
        emoji=0.4,
        stroke=0.4,
        matte=0.1,
        remap=0.1,
    ),
}


def sample_program(policy: str | Policy, *, seed: int, epoch: int, uuid: str) -> EditProgram:
    """The program of one view: ``policy`` is a name of :data:`POLICIES` or a :class:`Policy`.

    Order: crop, geometry and paint in random order, then padding, resize and erasing, as released; colours come last,
    in the order of :data:`copynce.pixtrace.edits.PHOTOMETRIC_ORDER` (released: in random order).

    >>> sample_program("descriptor", seed=0, epoch=1, uuid="T000007") == sample_program(
    ...     "descriptor", seed=0, epoch=1, uuid="T000007")
    True
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {sorted(POLICIES)} or a Policy, got {policy!r}")
        policy = POLICIES[policy]
    draw = _Draw(seed, epoch, uuid)
    groups = [(draw.unit(), k) for k in range(3)]
    made = (_crop_group(policy, draw), _geometry_group(policy, draw), _paint_group(policy, draw))
    steps: list[Edit] = [edit for _, k in sorted(groups) for edit in made[k]]
    if draw.happens(policy.remap):
        kind, strength = draw.integer(3), draw.unit()
        if kind == 0:
            steps.append(Swirl(0.4 * strength - 0.2, draw.uniform(0.2, 0.7), draw.unit(), draw.unit()))
        elif kind == 1:
            steps.append(Wave(0.05 * strength, 0.05 * draw.unit(), draw.uniform(1.0, 4.0), draw.unit()))
        else:
            steps.append(Lens(draw.uniform(-0.4, 0.8)))
    if draw.happens(policy.matte):
        angle, opacity = draw.uniform(-45.0, 45.0), draw.uniform(*policy.paste_opacity)
        mask = _blob(draw)
        steps.append(MatteShare(mask, draw.uniform(0.4, 1.0), angle, draw.unit(), draw.unit(), opacity, draw.unit()))
    if draw.happens(policy.pad):
        steps.append(PadShare(*[policy.pad_share] * 4))
    if draw.happens(policy.erase):
        shapes = draw.shapes(policy.erase_area, policy.erase_aspect)
        steps.append(EraseShare(shapes, draw.unit(), draw.unit(), draw.integer(2**31 - 1)))
    return EditProgram((*steps, *_color_group(policy, draw)))


def _crop_group(policy: Policy, draw: _Draw) -> list[Edit]:
    if not draw.happens(policy.crop):
        return []
    kind = draw.integer(3)
    if kind == 0:
        return [_resized_crop(policy, draw, policy.crop_area)]
    cropped = draw.happens(0.5)
    if kind == 1:
        before = [_resized_crop(policy, draw, policy.paste_crop_area)] if cropped else []
        shapes = draw.shapes(policy.paste_area, policy.aspect)
        return [*before, PasteShare(shapes, draw.unit(), draw.unit(), draw.uniform(*policy.paste_opacity), draw.unit())]
    before = [_resized_crop(policy, draw, policy.overlay_crop_area)] if cropped else []
    shapes = draw.shapes(policy.overlay_area, policy.aspect)
    return [*before, OverlayShare(shapes, draw.unit(), draw.unit(), draw.uniform(*policy.overlay_opacity), draw.unit())]


def _resized_crop(policy: Policy, draw: _Draw, area: Range) -> Edit:
    return ResizedCrop(draw.shapes(area, policy.aspect), draw.unit(), draw.unit(), policy.aspect)


def _geometry_group(policy: Policy, draw: _Draw) -> list[Edit]:
    steps: list[Edit] = []
    if draw.happens(policy.horizontal_flip):
        steps.append(HorizontalFlip())
    if draw.happens(policy.vertical_flip):
        steps.append(VerticalFlip())
    if draw.happens(policy.warp):
        if draw.happens(0.5):
            corners = tuple((policy.tilt * draw.unit(), policy.tilt * draw.unit()) for _ in range(4))
            steps.append(Tilt(corners))
        else:
            angle = draw.uniform(0.0, 360.0)
            quarter = 90.0 * round(angle / 90.0)
            if abs(angle - quarter) <= policy.snap:
                angle = quarter % 360.0
            steps.append(Rotation(angle, draw.uniform(-policy.shear, policy.shear)))
    if draw.happens(policy.stretch):
        steps.append(Stretch(draw.log_uniform(*policy.stretch_factor), draw.log_uniform(*policy.stretch_factor)))
        steps.append(Shift(draw.uniform(-policy.shift, policy.shift), draw.uniform(-policy.shift, policy.shift)))
    return steps


def _paint_group(policy: Policy, draw: _Draw) -> list[Edit]:
    steps: list[Edit] = []
    text = {"none": 0.0, "configured": policy.text_configured, "effective": policy.text_effective}[policy.text]
    if draw.happens(text):
        words = "".join(_LETTERS[draw.integer(len(_LETTERS))] for _ in range(3 + draw.integer(12)))
        steps.append(_stamp(draw, text_bits(words), policy.text_size, policy.text_opacity))
    if draw.happens(policy.emoji):
        size, opacity = draw.uniform(*policy.emoji_size), draw.uniform(*policy.emoji_opacity)
        x, y = draw.unit(), draw.unit()
        steps += [
            StampShare(_DISC, size, x, y, (1.0, 0.85, 0.2), opacity),
            StampShare(_FACE, size, x, y, (0.2, 0.1, 0.0), opacity),
        ]
    if draw.happens(policy.stroke):
        points = tuple((draw.unit(), draw.unit()) for _ in range(5 + draw.integer(46)))
        steps.append(_stamp(draw, stroke_bits(_smooth(points), draw.uniform(0.01, 0.04)), (0.3, 0.9), (1.0, 1.0)))
    return steps


def _stamp(draw: _Draw, bits: Bits, size: Range, opacity: Range) -> Edit:
    color = (draw.unit(), draw.unit(), draw.unit())
    return StampShare(bits, draw.uniform(*size), draw.unit(), draw.unit(), color, draw.uniform(*opacity))


def _smooth(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """The Bezier curve with these control points, as 24 straight pieces."""
    curve = np.empty((2, 25))
    kernels.bezier(np.array(points), np.arange(25) / 24, curve)
    x, y = curve.tolist()
    return tuple(zip(x, y, strict=True))


def _blob(draw: _Draw) -> Bits:
    """A round object with a wavy outline, 64 x 64."""
    y, x = np.mgrid[:64, :64] / 31.5 - 1.0
    angle = np.arctan2(y, x)
    edge = 0.7 + sum(0.12 * draw.unit() * np.cos(k * angle + 6.3 * draw.unit()) for k in (2, 3, 5))
    return bits_of(np.hypot(x, y) < edge)


def _color_group(policy: Policy, draw: _Draw) -> list[Edit]:
    brightness, contrast = draw.factor(policy.brightness), draw.factor(policy.contrast)
    saturation, hue = draw.factor(policy.saturation), draw.uniform(-policy.hue, policy.hue)
    steps: list[Photometric] = []
    if draw.happens(policy.grayscale):
        steps.append(Grayscale())
    if draw.happens(policy.edges):
        steps.append(_EDGES[draw.integer(2)])
    if draw.happens(policy.pixelate):
        ratio = draw.uniform(*policy.pixelate_ratio)
        if ratio < 1.0:
            steps.append(Pixelate(ratio))
    if draw.happens(policy.shuffle):
        steps.append(ShufflePixels())
    if draw.happens(policy.blur):
        steps.append(Blur(draw.uniform(*policy.blur_sigma)))
    if draw.happens(policy.jpeg):
        steps.append(Jpeg(policy.jpeg_quality[draw.integer(len(policy.jpeg_quality))]))
    if draw.happens(policy.extra):
        extra = EXTRAS[draw.integer(len(EXTRAS))](draw)
        # Of two savings as JPEG the one of lower quality counts.
        if not (isinstance(extra, Jpeg) and any(isinstance(step, Jpeg) for step in steps)):
            steps.append(extra)
    order = _JITTER_ORDERS[draw.integer(len(_JITTER_ORDERS))]
    steps.append(ColorJitter(brightness, contrast, saturation, hue, order))
    return sorted(steps, key=_place)


def _place(edit: Edit) -> int:
    return PHOTOMETRIC_ORDER.index(type(edit))


class _Draw:
    """The one stream of numbers of a program: SHAKE-128 of its name, 53 bits a number."""

    def __init__(self, seed: int, epoch: int, uuid: str) -> None:
        self._name = f"{seed}/{epoch}/{uuid}"
        self._block = 0
        self._numbers: list[float] = []

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        if not self._numbers:
            digest = hashlib.shake_128(f"{self._name}/{self._block}".encode()).digest(8 * 64)
            self._numbers = ((np.frombuffer(digest, "<u8") >> np.uint64(11)) * 2.0**-53).tolist()
            self._block += 1
        return self._numbers.pop()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def log_uniform(self, low: float, high: float) -> float:
        return low * (high / low) ** self.unit()

    def happens(self, probability: float) -> bool:
        return self.unit() < probability

    def integer(self, below: int) -> int:
        return int(below * self.unit())

    def factor(self, strength: float) -> float:
        return self.uniform(max(0.0, 1.0 - strength), 1.0 + strength)

    def shapes(self, area: Range, aspect: Range) -> tuple[tuple[float, float], ...]:
        """Ten (area share, aspect ratio) draws, the ratio log-uniform."""
        return tuple([(self.uniform(*area), self.log_uniform(*aspect)) for _ in range(_ATTEMPTS)])


_JITTER_ORDERS = tuple(itertools.permutations(ColorJitter().order))
#: Pillow's EDGE_ENHANCE and EDGE_ENHANCE_MORE.
_EDGES = tuple(
    Convolve(((around,) * 3, (around, centre, around), (around,) * 3)) for around, centre in ((-0.5, 5.0), (-1.0, 9.0))
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,!?-"
_y, _x = np.mgrid[:32, :32] / 15.5 - 1.0
_DISC = bits_of(np.hypot(_x, _y) <= 1.0)
_FACE = bits_of(
    (np.hypot(np.abs(_x) - 0.35, _y + 0.25) < 0.14) | ((abs(np.hypot(_x, _y) - 0.6) < 0.09) & (_y > 0.25))
)  # two eyes and a mouth
