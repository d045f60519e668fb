"""Sample edit programs from (seed, epoch, uuid): the released augmentation policies (PROTOCOLS 6), as numbers.

Every draw of one program comes from one stream of a hash of the three, so a program does not depend on the
number of workers, threads or ranks, nor on the picture's size, the machine or the version of a library.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from copynce.pixtrace.bitmaps import Bits, bits_of, stroke_bits, text_bits
from copynce.pixtrace.compiled.drawing import bezier
from copynce.pixtrace.edits import (
    PHOTOMETRIC_ORDER,
    Blur,
    ColorJitter,
    Convolve,
    Edit,
    Grayscale,
    HorizontalFlip,
    Jpeg,
    Lens,
    Photometric,
    Pixelate,
    RelativeErase,
    RelativeMatte,
    RelativeOverlay,
    RelativePad,
    RelativePasteOnto,
    RelativeStamp,
    ResizedCrop,
    Rotation,
    Shift,
    ShufflePixels,
    Stretch,
    Swirl,
    Tilt,
    VerticalFlip,
    Wave,
)
from copynce.pixtrace.extras import EXTRAS
from copynce.pixtrace.policies import POLICIES, Policy, Range
from copynce.pixtrace.programs import EditProgram

#: Attempts that torchvision makes for a random shape that fits.
_ATTEMPTS = 10


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
        steps.append(RelativeMatte(mask, draw.uniform(0.4, 1.0), angle, draw.unit(), draw.unit(), opacity, draw.unit()))
    if draw.happens(policy.pad):
        steps.append(RelativePad(*[policy.pad_size] * 4))
    if draw.happens(policy.erase):
        shapes = draw.shapes(policy.erase_area, policy.erase_aspect)
        steps.append(RelativeErase(shapes, draw.unit(), draw.unit(), draw.integer(2**31 - 1)))
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
        return [
            *before,
            RelativePasteOnto(shapes, draw.unit(), draw.unit(), draw.uniform(*policy.paste_opacity), draw.unit()),
        ]
    before = [_resized_crop(policy, draw, policy.overlay_crop_area)] if cropped else []
    shapes = draw.shapes(policy.overlay_area, policy.aspect)
    return [
        *before,
        RelativeOverlay(shapes, draw.unit(), draw.unit(), draw.uniform(*policy.overlay_opacity), draw.unit()),
    ]


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
            RelativeStamp(_DISC, size, x, y, (1.0, 0.85, 0.2), opacity),
            RelativeStamp(_FACE, size, x, y, (0.2, 0.1, 0.0), opacity),
        ]
    if draw.happens(policy.stroke):
        points = tuple((draw.unit(), draw.unit()) for _ in range(5 + draw.integer(46)))
        steps.append(_stamp(draw, stroke_bits(_smooth(points), draw.uniform(0.01, 0.04)), (0.3, 0.9), (1.0, 1.0)))
    return steps


def _stamp(draw: _Draw, bits: Bits, size: Range, opacity: Range) -> Edit:
    color = (draw.unit(), draw.unit(), draw.unit())
    return RelativeStamp(bits, draw.uniform(*size), draw.unit(), draw.unit(), color, draw.uniform(*opacity))


def _smooth(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """The Bezier curve with these control points, as 24 straight pieces."""
    curve = np.empty((2, 25))
    bezier(np.array(points), np.arange(25) / 24, curve)
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
        """Ten draws of (fraction of the area, aspect ratio), the ratio log-uniform."""
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
