"""How every kernel of this package is launched: one call, with the device of its tensors and fixed launch settings.

The benchmark of compiled resources puts itself in place of ``launch`` to see each kernel with the arguments, constants
and settings that training gives it; so nothing else here starts a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any], warps: int, stages: int
) -> None:
    """Start ``kernel`` on ``grid``; ``arguments`` in the kernel's order and first a tensor, ``constants`` by name."""
    first = next(iter(arguments.values()))
    assert isinstance(first, Tensor)
    with torch.cuda.device_of(first):
        kernel[grid](**arguments, **constants, num_warps=warps, num_stages=stages)


@torch.compiler.assume_constant_result
def runs_on(device: torch.device) -> bool:
    """True where the kernels run: on a CUDA device of compute capability 8.0 or more, or in Triton's interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(triton.knobs.runtime.interpret)


def next_power_of_2(number: int) -> int:
    """Smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
