"""The paper's ablations (dev set II): each a released run with one thing changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from copynce.recipes import descriptor, matcher
from copynce.recipes.base import Recipe, Run


def _but(sentence: str, changed: Mapping[str, Any], base: Recipe = descriptor.released) -> Recipe:
    """A released run but for some settings."""

    def recipe(run: Run) -> Run:
        return base(run) | dict(changed)

    recipe.__doc__ = sentence
    return recipe


def _rival(target: str, form: str, k: int) -> dict[str, Any]:
    """Targets that the paper compares the overlap with: the nearest patches by feature, by place, or both."""
    return {"loss.target": target, "loss.form": form, "loss.neighbours": k}


_TARGETS, _FORMS = ("feature", "location", "both"), ("cosine", "nce")

RECIPES: Mapping[str, Recipe] = {
    **{
        f"ablation-weight-{weight}": _but(
            f"CopyNCE with weight {weight} instead of 5.", {"loss.copynce_weight": float(weight)}
        )
        for weight in (0, 3, 8)
    },
    **{
        f"ablation-gamma-{gamma:g}": _but(
            f"A prior sharpened by gamma = {gamma:g} instead of 3.", {"loss.gamma": gamma}
        )
        for gamma in (0.0, 0.5, 1.0, 2.0, math.inf)
    },
    "ablation-layer-10": _but("Patches of the 10th block instead of the 12th.", {"model.tokens_block": 9}),
    "ablation-cosine": _but("Cosine instead of cross-entropy.", {"loss.form": "cosine"}),
    **{
        f"ablation-{target}-{form}-{k}": _but(
            f"Patches drawn to their {k} nearest by {target}, {form}.", _rival(target, form, k)
        )
        for target in _TARGETS
        for form in _FORMS
        for k in (1, 4)
    },
    "ablation-r50-weight-0": _but("The ResNet-50: no CopyNCE.", {"loss.copynce_weight": 0.0}, descriptor.resnet50),
    **{
        f"ablation-matcher-weight-{weight}": _but(
            f"The matcher: CopyNCE with weight {weight} instead of 3.",
            {"loss.copynce_weight": float(weight)},
            matcher.released,
        )
        for weight in (0, 1, 5)
    },
    **{
        f"ablation-matcher-gamma-{gamma:g}": _but(
            f"The matcher: a prior sharpened by gamma = {gamma:g} instead of 1.",
            {"loss.gamma": gamma},
            matcher.released,
        )
        for gamma in (0.0, 0.5, 2.0, 3.0, math.inf)
    },
    **{
        f"ablation-matcher-split-{encoder}-{12 - encoder}": _but(
            f"The matcher: {encoder} + {12 - encoder} blocks instead of 8 + 4.",
            {"model.encoder_blocks": encoder, "model.fusion_blocks": 12 - encoder},
            matcher.released,
        )
        for encoder in (6, 10)
    },
    **{
        f"ablation-matcher-{target}-{form}": _but(
            f"The matcher: patches drawn to their nearest by {target}, {form}.",
            _rival(target, form, 1),
            matcher.released,
        )
        for target in _TARGETS
        for form in _FORMS
    },
}
