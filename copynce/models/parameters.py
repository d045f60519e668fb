"""Which parameters an optimiser decays."""

from __future__ import annotations

from typing import Any

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as two optimiser groups: those that decay, and those that must not.

    No weight decay for scalars and 1-D parameters (biases, norms, LayerScale, a learned temperature), position
    embeddings and class or register tokens. Frozen parameters are left out. Works on any module that contains a
    model.
    """
    exempt = ("pos_embed", "cls_token", "reg_token")
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.rpartition(".")[2] in exempt
        (undecayed if plain else decayed).append(parameter)
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
