"""The settings of the objectives' losses; without torch, so that they can be read and listed without it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from copynce.config import require_number
from copynce.errors import ConfigError
from copynce.losses.settings import (
    INITIAL_LOG_SCALE,
    SMALLEST_TEMPERATURE,
    CopyNCESettings,
    Form,
    Gather,
    Prior,
    Target,
)


@dataclass(frozen=True, kw_only=True)
class _AnyLoss:
    """CopyNCE's settings, which all objectives share."""

    copynce_weight: float
    """Of CopyNCE in the sum of the losses; 0: measured, but without gradient."""
    gamma: float
    """Sharpening exponent of the overlap prior (eq. 5)."""
    temperature: float = 1 / 16
    """Of the patch affinity's softmax."""
    prior: Prior = "released"
    """Over which bins a patch's prior adds to 1. released: reference patches and what is not copied; paper: reference
    patches alone."""
    target: Target = "overlap"
    """What patches are drawn to: the overlap prior, or the paper's rivals (nearest patches by feature, location)."""
    neighbours: int = 1
    """Nearest patches of a rival target (k of Table 2)."""
    form: Form = "nce"
    """Of CopyNCE: cross-entropy over patches, or the rival that only pulls targets together."""

    def __post_init__(self) -> None:
        weights = [field.name for field in fields(self) if field.name.endswith("_weight")]
        for name in weights:
            require_number(f"loss.{name}", getattr(self, name), least=0)
        if not any(getattr(self, name) for name in weights):
            raise ConfigError(f"one of {', '.join(f'loss.{name}' for name in weights)} must be above 0, got 0 for all")
        require_number("loss.gamma", self.gamma, least=0, infinite=True)
        require_number("loss.neighbours", self.neighbours, least=1)
        require_number("loss.temperature", self.temperature, above=SMALLEST_TEMPERATURE)  # as the fused loss needs

    def copynce(self, patch_size: int) -> CopyNCESettings:
        """CopyNCE's settings, which have the same names here, for tokens of patches of ``patch_size`` pixels."""
        names = {field.name for field in fields(CopyNCESettings)} - {"patch_size"}
        return CopyNCESettings(patch_size=patch_size, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class DescriptorLossConfig(_AnyLoss):
    """Weights and parameters of the loss; defaults are the released descriptor's (PROTOCOLS 8)."""

    copynce_weight: float = 5.0
    gamma: float = 3.0
    info_nce_weight: float = 1.0
    """Of InfoNCE between descriptors."""
    log_scale: float = INITIAL_LOG_SCALE
    """Initial log of InfoNCE's learnable inverse temperature: exp(3.2) = 24.5."""
    koleo_weight: float = 5.0
    """Of KoLeo, which spreads descriptors out."""
    gather: Gather = "differentiable"
    """Features of other ranks as negatives: with their gradients, or as constants (the released code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Its exponential must be a float32, in which 0 is exp(-104) and the largest number exp(88.7).
        require_number("loss.log_scale", self.log_scale, least=-80, most=80)


@dataclass(frozen=True, kw_only=True)
class MatcherLossConfig(_AnyLoss):
    """Weights and parameters of the loss; defaults are the released matcher's (PROTOCOLS 8)."""

    copynce_weight: float = 3.0
    gamma: float = 1.0
    bce_weight: float = 1.0
    """Of the binary cross-entropy of the pairs' logits."""
    batch_negatives: int = 0
    """How many other references of the process's batch each query is also matched with, as pairs that are no copies:
    those of the next pair, the one before, the second next, ... With data.pairs=descriptor and neighbours, of the first
    two the one is a mined neighbour. An encoding serves all of them, so a pair costs its fusion only. 0: none (the
    released code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("loss.batch_negatives", self.batch_negatives, least=0)


LossConfig = DescriptorLossConfig | MatcherLossConfig

#: By the value of ``objective``.
LOSS_SETTINGS: dict[str, type] = {"descriptor": DescriptorLossConfig, "matcher": MatcherLossConfig}
