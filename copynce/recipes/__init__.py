"""Named runs: ``copynce train NAME key=value``.

A recipe is a function that takes a run, {dotted setting: value}, and returns it with what differs; what it does not
name stays as it was, at last the default. So one recipe is told by another, and no value stands twice.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from copynce.errors import ConfigError
from copynce.recipes import ablations, box, descriptor, matcher
from copynce.recipes.base import Recipe, Run

RECIPES: Mapping[str, Recipe] = {
    "descriptor": descriptor.released,
    "descriptor-vitb": descriptor.vit_base,
    "descriptor-336": descriptor.at_336,
    "descriptor-r50": descriptor.resnet50,
    "descriptor-finetune": descriptor.finetune,
    "descriptor-vits14-112": descriptor.vits14_112,
    "matcher": matcher.released,
    "matcher-stage2": matcher.second_stage,
    "matcher-336": matcher.at_336,
    "matcher-336-stage2": matcher.at_336_second_stage,
    "matcher-finetune": matcher.finetune,
    "matcher-vits14-112": matcher.vits14_112,
    "box-descriptor": box.box_descriptor,
    "box-descriptor-stage2": box.box_descriptor_second_stage,
    "box-descriptor-stage3": box.box_descriptor_third_stage,
    "box-matcher": box.box_matcher,
    **ablations.RECIPES,
}


def named_run(name: str) -> Run:
    """The settings in which run ``name`` differs from the defaults. Raises ConfigError for a name that is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "copynce train --help lists them"
        raise ConfigError(f"{name!r} is neither a file of settings nor a named run; {hint}")
    return RECIPES[name]({})


def sentence(name: str) -> str:
    """What run ``name`` is."""
    return " ".join((RECIPES[name].__doc__ or "").split())
