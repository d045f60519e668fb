"""Activation checkpointing: backward computes a block again instead of keeping what its forward made."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from copynce.models import AnyModel, Matcher


def checkpoint_activations(model: AnyModel) -> None:
    """From now on, ``model`` keeps the inputs of its transformer blocks alone where gradients are wanted.

    What is drawn at random (stochastic depth) is drawn again alike. The blocks are those of the encoder, and of a
    matcher's fusion.
    """
    encoder: Any = model.encoder
    encoder.set_grad_checkpointing()
    if isinstance(model, Matcher):
        for block in model.fusion.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
