"""The models in the package, `default`: how they were trained (docs/model.md has what was tried)."""

from __future__ import annotations

from copynce.recipes import descriptor, matcher
from copynce.recipes.base import Run


def box_descriptor(run: Run) -> Run:
    """The descriptor in the package, `default`, with data.train=LIST and weights=BACKBONE, a pretrained ViT-S/14; its
    head is then solved for (scripts/refit_head.py --second-block 7)."""
    return descriptor.vits14_112(run) | {"optim.steps": 1000, "checkpoint_every": 100}


def box_descriptor_second_stage(run: Run) -> Run:
    """Its last four blocks trained on from there, with weights= what refit_head made, which then solves for the head
    again; the first eight stay as the matcher has them."""
    return box_descriptor(run) | {
        "model.second_class_block": 7,
        "model.freeze_blocks": 8,
        "optim.lr": 5e-4,  # .88e-4 at 32 pairs a step
        "optim.steps": 2200,
    }


def box_descriptor_third_stage(run: Run) -> Run:
    """The same four blocks at 126 px (9 x 9 patches), without KoLeo, with weights= what refit_head made of the stage
    before, which then solves for the head again; scripts/share_encoder.py brings the matcher to this size."""
    return box_descriptor_second_stage(run) | {
        "model.img_size": 126,
        "loss.koleo_weight": 0.0,
        "data.batch_size": 48,
        "optim.steps": 400,
    }


def box_matcher(run: Run) -> Run:
    """The matcher in the package, whose encoder is the descriptor's first blocks: data.train=LIST, weights= that
    descriptor, data.neighbours= a table that it mined (`copynce knn`). Where the descriptor is trained on,
    scripts/share_encoder.py makes of both what weights= is then."""
    return matcher.vits14_112(run) | {"optim.steps": 3600}
