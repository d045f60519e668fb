"""The paper's ablations of the descriptor (dev set II): each the released run with one thing changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from copynce.recipes.base import Recipe, Run
from copynce.recipes.descriptor import released


def _but(sentence: str, **loss: Any) -> Recipe:
    """The released run but for some settings of its loss."""

    def recipe(run: Run) -> Run:
        return released(run) | {f"loss.{name}": value for name, value in loss.items()}

    recipe.__doc__ = sentence
    return recipe


def _rivals() -> Mapping[str, Recipe]:
    """Targets that the paper compares the overlap with: the nearest patches by feature, by place, or both."""
    found: dict[str, Recipe] = {}
    for target in ("feature", "location", "both"):
        for form in ("cosine", "nce"):
            for k in (1, 4):
                sentence = f"Patches drawn to their {k} nearest by {target}, {form}."
                found[f"ablation-{target}-{form}-{k}"] = _but(sentence, target=target, form=form, neighbours=k)
    return found


RECIPES: Mapping[str, Recipe] = {
    **{
        f"ablation-weight-{weight}": _but(f"CopyNCE with weight {weight} instead of 5.", copynce_weight=float(weight))
        for weight in (0, 3, 8)
    },
    **{
        f"ablation-gamma-{gamma:g}": _but(f"A prior sharpened by gamma = {gamma:g} instead of 3.", gamma=gamma)
        for gamma in (0.0, 0.5, 1.0, 2.0, math.inf)
    },
    "ablation-cosine": _but("Cosine instead of cross-entropy.", form="cosine"),
    **_rivals(),
}
