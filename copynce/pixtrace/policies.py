"""Augmentation policies: how often each edit is drawn, and how strong. The released ones (PROTOCOLS 6), and our own."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Probabilities and ranges of one augmentation policy; defaults are the released descriptor's (PROTOCOLS 6.2)."""

    crop: float = 0.3  #: probability of the crop group, one of resized crop, onto another picture, another on top
    crop_area: Range = (0.25, 0.5)  #: fraction of the picture that a resized crop keeps
    paste_area: Range = (0.25, 0.5)  #: fraction of the canvas that the picture takes when laid on another
    paste_crop_area: Range = (0.2, 1.0)  #: fraction kept by the crop that comes before it half of the time
    paste_opacity: Range = (0.5, 1.0)
    overlay_area: Range = (0.3, 0.7)  #: fraction of the picture that another one laid on top takes
    overlay_crop_area: Range = (0.3, 1.0)
    overlay_opacity: Range = (0.0, 0.5)
    aspect: Range = (0.33, 3.0)  #: width / height, log-uniform, of crops and layers
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.1
    warp: float = 0.25  #: probability of one of perspective and affine
    tilt: float = 0.5  #: largest inward move of a corner, as a fraction of half the side
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
    pad_size: float = 0.2  #: of the width left and right, of the height top and bottom
    erase: float = 0.15
    erase_area: Range = (0.02, 0.33)
    erase_aspect: Range = (0.3, 3.3)
    stretch: float = 0.0  #: probability of scaling the axes apart and moving the picture on its canvas
    stretch_factor: Range = (0.6, 1.6)  #: of each axis, log-uniform
    shift: float = 0.2  #: largest move, as a fraction of the side, that goes with a stretch
    #: Which text probability counts: the configured one, or the one that the released code's inverted test makes of it
    text: Literal["none", "configured", "effective"] = "effective"
    text_configured: float = 0.25
    text_effective: float = 0.75
    text_size: Range = (0.1, 0.3)  #: height as a fraction of the shorter side
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
            most = {"shear": 89.0, "snap": 45.0, "hue": 0.5, "pad_size": 10.0}.get(field.name, 1.0)
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
