"""Weights at 8 bits a number: a quarter of the file, the model hardly another.

Each row of a matrix (of a convolution: each filter) is kept as int8 with one float32 step, w = step * n, |n| <= 127:
what rounding changes is at most half a step, 1/254 of the row's largest weight. Vectors stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: What follows a tensor's name in the name of its rows' steps.
STEP = ".step"


def quantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices among float tensors as int8 of the same shape, each with float32 [rows] under its name + `STEP`."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.shape[0] < 2:
            found[name] = tensor
            continue
        rows = tensor.detach().float().flatten(1)
        step = (rows.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        found[name] = (rows / step[:, None]).round().to(torch.int8).reshape(tensor.shape)
        found[name + STEP] = step
    return found


def restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `quantized` took, float32. Raises ValueError where steps do not fit."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(STEP) and name.removesuffix(STEP) in tensors:
            continue
        step = tensors.get(name + STEP)
        if step is None:
            found[name] = tensor
            continue
        if tensor.dtype != torch.int8 or step.shape != tensor.shape[:1] or step.dtype != torch.float32:
            raise ValueError(f"{name} is no int8 matrix with a step for each of its rows")
        found[name] = tensor.float() * step.reshape(-1, *[1] * (tensor.ndim - 1))
    return found
