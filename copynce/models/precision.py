"""What a model computes in, and the attention that is fastest there: one rule for training and extraction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from copynce.processor import multiplies_bfloat16


def bf16_in_hardware(device: torch.device) -> bool:
    """True where bfloat16 matrix products are faster than float32 ones: recent GPUs, AVX512-BF16 or AMX processors."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return multiplies_bfloat16()


def choose_attention(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Let `blocks` compute attention in the way that is fastest for the forward pass on `device` that begins now.

    Fused (PyTorch's scaled_dot_product_attention), but plain products on a CPU where bfloat16 gradients will be asked
    for: their fused backward pass is slow there. Seconds of one core, ViT-S/16, four pictures of 224 px, AMX:

                                     fused   plain
        float32, forward              .507    .491
        float32, with gradients      1.458   1.467
        bfloat16, forward             .263    .284
        bfloat16, with gradients      .754    .558
    """
    bf16 = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
    fused = not (device.type == "cpu" and bf16 and torch.is_grad_enabled())
    for block in blocks:
        attention: Any = block.attn
        attention.fused_attn = fused
