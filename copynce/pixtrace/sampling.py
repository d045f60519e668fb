"""Sample edit programs from (seed, epoch, uuid): the released augmentation policies (PROTOCOLS 6), as numbers.

Every draw of one program comes from one generator seeded by a hash of the three, so a program does not depend on the
number of workers, threads or ranks, nor on the picture's size.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from copynce.pixtrace.edits import (
    Blur,
    ColorJitter,
    Edit,
    EraseShare,
    Grayscale,
    HorizontalFlip,
    Jpeg,
    OverlayShare,
    PadShare,
    PasteShare,
    ResizedCrop,
    Rotation,
    Tilt,
    VerticalFlip,
)
from copynce.pixtrace.programs import EditProgram

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
    blur: float = 0.2
    blur_sigma: Range = (0.0, 4.5)  #: pixels of a 224-pixel view: AugLy's radius 0 to 10 on a side of about 500
    jpeg: float = 0.25
    jpeg_quality: tuple[int, ...] = (10, 20, 30, 50)
    pad: float = 0.15
    pad_share: float = 0.2  #: of the width left and right, of the height top and bottom
    erase: float = 0.15
    erase_area: Range = (0.02, 0.33)
    erase_aspect: Range = (0.3, 3.3)


POLICIES: dict[str, Policy] = {
    "descriptor": Policy(),
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
    ),
}


def sample_program(policy: str | Policy, *, seed: int, epoch: int, uuid: str) -> EditProgram:
    """The program of one view: ``policy`` is a name of :data:`POLICIES` or a :class:`Policy`.

    Order as released: crop and geometry groups in random order, colours, then padding, resize and erasing.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {sorted(POLICIES)} or a Policy, got {policy!r}")
        policy = POLICIES[policy]
    draw = _Draw(seed, epoch, uuid)
    groups = [_crop_group(policy, draw), _geometry_group(policy, draw)]
    if draw.happens(0.5):
        groups.reverse()
    steps: list[Edit] = [edit for group in groups for edit in group]
    if draw.happens(policy.pad):
        steps.append(PadShare(*[policy.pad_share] * 4))
    if draw.happens(policy.erase):
        shapes = draw.shapes(policy.erase_area, policy.erase_aspect)
        steps.append(EraseShare(shapes, draw.unit(), draw.unit(), draw.integer(2**31 - 1)))
    return EditProgram((*steps, *_appearance_group(policy, draw)))


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
    return steps


def _appearance_group(policy: Policy, draw: _Draw) -> list[Edit]:
    steps: list[Edit] = [
        ColorJitter(
            draw.factor(policy.brightness),
            draw.factor(policy.contrast),
            draw.factor(policy.saturation),
            draw.uniform(-policy.hue, policy.hue),
        )
    ]
    if draw.happens(policy.grayscale):
        steps.append(Grayscale())
    if draw.happens(policy.blur):
        steps.append(Blur(draw.uniform(*policy.blur_sigma)))
    if draw.happens(policy.jpeg):
        steps.append(Jpeg(policy.jpeg_quality[draw.integer(len(policy.jpeg_quality))]))
    return steps


class _Draw:
    """The one generator of a program."""

    def __init__(self, seed: int, epoch: int, uuid: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{epoch}/{uuid}".encode(), digest_size=16).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        return self._generator.random()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def happens(self, probability: float) -> bool:
        return self.unit() < probability

    def integer(self, below: int) -> int:
        return int(self._generator.integers(below))

    def factor(self, strength: float) -> float:
        return self.uniform(max(0.0, 1.0 - strength), 1.0 + strength)

    def shapes(self, area: Range, aspect: Range) -> tuple[tuple[float, float], ...]:
        """Ten (area share, aspect ratio) draws, the ratio log-uniform."""
        low, high = math.log(aspect[0]), math.log(aspect[1])
        return tuple((self.uniform(*area), math.exp(self.uniform(low, high))) for _ in range(_ATTEMPTS))
