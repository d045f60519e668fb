"""What a model computes in: one rule for training and extraction."""

from __future__ import annotations

import torch

from copynce.processor import multiplies_bfloat16


def bf16_in_hardware(device: torch.device) -> bool:
    """True where bfloat16 matrix products are faster than float32 ones: recent GPUs, AVX512-BF16 or AMX processors."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return multiplies_bfloat16()
