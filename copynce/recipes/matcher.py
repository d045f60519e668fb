"""Matchers: the released trainings, and small ones."""

from __future__ import annotations

from copynce.recipes import descriptor
from copynce.recipes.base import Run


def released(run: Run) -> Run:
    """The released matcher, first stage: ViT-S/16 of 8 + 4 blocks at 224 px, 8 GPUs x 32 pairs, 30 epochs (PROTOCOLS
    10), from a backbone with weights=FILE; mined neighbours with data.neighbours=FILE."""
    return run | {"objective": "matcher", "data.pairs": "matcher", "data.threads": 12, "optim.lr": 1e-3}


def second_stage(run: Run) -> Run:
    """Its second stage: 30 more epochs at a fifth of the rate, from the first with weights=RUN."""
    return released(run) | {"optim.lr": 2e-4}


def at_336(run: Run) -> Run:
    """The first stage at 336 px; the position embedding of what it starts from is resized."""
    return released(run) | {"model.img_size": 336}


def at_336_second_stage(run: Run) -> Run:
    """The second stage at 336 px, from the first with weights=RUN."""
    return at_336(run) | {"optim.lr": 2e-4}


def finetune(run: Run) -> Run:
    """The released fine-tuning on dev set I, of a trained matcher with weights=RUN: known copies as they are and a
    twelfth of the training items, BCE only (PROTOCOLS 11)."""
    return released(run) | {
        "data.pairs": "mixture",
        "loss.copynce_weight": 0.0,
        "optim.lr": 2e-4,
        "optim.epochs": 20,
    }


def vits14_112(run: Run) -> Run:
    """A pretrained ViT-S/14 of 8 + 4 blocks on a few thousand pictures, on a laptop: 112 px (8 x 8 patches), the first
    blocks of a descriptor as its encoder with weights=RUN, and with its mined neighbours; two other negatives."""
    return descriptor.vits14_112(run) | {
        "objective": "matcher",
        # The released pairs (data.pairs=matcher) stayed at the prior for 300 steps, these leave it after 50; and after
        # 30 with an encoder that stays as it is, whose steps take 70 % of the time.
        "data.pairs": "descriptor",
        "data.batch_size": 12,  # with neighbours 24 pairs
        "model.freeze_encoder": True,
        "loss.batch_negatives": 2,
        "optim.lr": 2e-3,  # 2.2e-4 at 12 items a step
        "optim.steps": 1400,
        "optim.warmup_epochs": 0.2,
        "checkpoint_every": 100,
    }
