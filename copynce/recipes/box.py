"""The models in the package, `default`: how they were trained (docs/model.md has what was tried)."""

from __future__ import annotations

from copynce.recipes import descriptor, matcher
from copynce.recipes.base import Run


def box_descriptor(run: Run) -> Run:
    """The descriptor in the package, `default`, with data.train=LIST and weights=BACKBONE, a pretrained ViT-S/14; its
    head is then solved for (scripts/refit_head.py)."""
    return descriptor.vits14_112(run) | {"optim.steps": 1000, "checkpoint_every": 100}


def box_matcher(run: Run) -> Run:
    """The matcher in the package, whose encoder is the descriptor's first blocks: data.train=LIST, weights= that
    descriptor, data.neighbours= a table that it mined (`copynce knn`)."""
    return matcher.vits14_112(run) | {"optim.steps": 3600}
