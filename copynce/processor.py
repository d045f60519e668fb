"""What this machine's processor computes in hardware."""

from __future__ import annotations

import torch


def multiplies_bfloat16() -> bool:
    """Whether the processor has units for bfloat16 products (AVX512-BF16, AMX) that PyTorch uses.

    oneDNN, which multiplies bfloat16 for PyTorch, must be free to use them: ONEDNN_MAX_CPU_ISA may forbid it.
    """
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(units and torch.ops.mkldnn._is_mkldnn_bf16_supported())
