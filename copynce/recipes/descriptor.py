"""Descriptors: the released trainings, and small ones."""

from __future__ import annotations

import math

from copynce.recipes.base import Run


def released(run: Run) -> Run:
    """The released descriptor: ViT-S/16 at 224 px, 8 GPUs x 96 items, 30 epochs (PROTOCOLS 10); mined neighbours with
    data.neighbours=FILE."""
    return run | {"data.threads": 12}  # the defaults are the released values; a GPU's share of a node's cores


def vit_base(run: Run) -> Run:
    """The same with a ViT-B/16."""
    return released(run) | {"model.backbone": "vit_base_patch16_224"}


def at_336(run: Run) -> Run:
    """The same at 336 px."""
    return released(run) | {"model.img_size": 336}


def resnet50(run: Run) -> Run:
    """The paper's descriptor on a ResNet-50 at 448 px: SSCD's weight 30 of KoLeo, and its temperature .05, from which
    the learnable one starts; all else is the released ViT's, for no configuration of this was released (PROTOCOLS 9.6,
    13.1)."""
    return released(run) | {
        "model.backbone": "resnet50",
        "model.img_size": 448,
        "loss.koleo_weight": 30.0,
        "loss.log_scale": math.log(1 / 0.05),
    }


def finetune(run: Run) -> Run:
    """The released fine-tuning on dev set I: known copies as they are, no CopyNCE (PROTOCOLS 11)."""
    return released(run) | {"data.pairs": "supervised", "loss.copynce_weight": 0.0, "optim.lr": 1e-4}


def vits14_112(run: Run) -> Run:
    """A pretrained ViT-S/14 on a few thousand pictures, on a laptop: 112 px (8 x 8 patches), small batches."""
    return run | {
        "model.backbone": "vit_small_patch14_dinov2",
        "model.img_size": 112,
        "data.batch_size": 32,
        "data.threads": 1,
        "optim.lr": 8.5e-4,  # 1.5e-4 at 32 pairs a step; at 2.8e-4 InfoNCE climbs again after twenty steps
        "optim.steps": 560,
        "optim.warmup_epochs": 0.5,
        "checkpoint_every": 40,
    }
