"""The settings of the losses and their limits; without torch, so that they can be read and listed without it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Prior = Literal["released", "paper"]
Target = Literal["overlap", "feature", "location", "both"]
Form = Literal["nce", "cosine"]
Gather = Literal["differentiable", "local_gradient"]

INITIAL_LOG_SCALE = 3.2
"""Initial value of InfoNCE's learnable log scale: exp(3.2) = 24.53, temperature 0.0408."""

SMALLEST_TEMPERATURE = 2 / 80
"""Of the fused paths. They subtract no running maximum but 1 / temperature, which no logit exceeds: at cosine -1 there
remains exp(-2 / temperature), which must be a normal float32, above 1.2e-38 = exp(-87.3); 80 leaves room for a sum."""

_PRIORS, _TARGETS, _FORMS = get_args(Prior), get_args(Target), get_args(Form)


@dataclass(frozen=True, kw_only=True)
class CopyNCESettings:
    """What ``copynce_loss`` computes of its tensors; ``copynce.kernels`` defines prior and loss.

    Raises TypeError or ValueError naming the setting that is no such number or word.
    """

    patch_size: int = 16
    """Side of a patch in pixels."""
    temperature: float = 1 / 16
    """tau of the softmax over cosines, above 0 (eq. 6)."""
    gamma: float = 1.0
    """Sharpening exponent of the prior in [0, inf] (eq. 5); rival targets have no use for it."""
    prior: Prior = "released"
    """Over which bins a patch's prior adds to 1, and over which patches the loss is averaged. "released": over the
    reference patches and what is not copied, over all patches; "paper": over the reference patches, over the copied
    patches."""
    target: Target = "overlap"
    """What patches are drawn to: the overlap prior, or the paper's rivals (``copynce.losses.rival_targets``)."""
    neighbours: int = 1
    """Nearest patches of a rival target (k of Table 2), at most as many as a picture has patches."""
    form: Form = "nce"
    """Cross-entropy over patches, or the rival "cosine", which only pulls targets together."""

    def __post_init__(self) -> None:
        for name, what, whole in (
            ("patch_size", "an int in pixels", self.patch_size),
            ("neighbours", "an int", self.neighbours),
        ):
            if isinstance(whole, bool) or not isinstance(whole, int):
                raise TypeError(f"{name} must be {what}, got {type(whole).__name__}")
        for name, number in (("temperature", self.temperature), ("gamma", self.gamma)):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"{name} must be a float, got {type(number).__name__}")
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1 pixel, got {self.patch_size}")
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a finite number above 0, got {self.temperature}")
        if not self.gamma >= 0:
            raise ValueError(f"gamma must lie in [0, inf], got {self.gamma}")
        check_word("prior", self.prior, _PRIORS)
        check_word("target", self.target, _TARGETS)
        check_word("form", self.form, _FORMS)

    @property
    def suits_fused_paths(self) -> bool:
        """Whether the fused paths' exponentials are normal float32 numbers at this temperature."""
        return self.temperature >= SMALLEST_TEMPERATURE


def check_word(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value``, given as ``name``, is one of the ``known`` words."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
