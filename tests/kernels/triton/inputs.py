"""Inputs of the cases, what they must be, and by how much they may be off."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from copynce.kernels.copynce.reference import copynce_reference

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
Shape = tuple[int, int]


def zoomed(shape: Shape, target_shape: Shape, zoom: float) -> Tensor:
    """Table of a picture that shows the target from the top left on, ``zoom`` times the size that would fill it."""
    y = (torch.arange(shape[0]) * target_shape[0] / shape[0] / zoom).long()
    x = (torch.arange(shape[1]) * target_shape[1] / shape[1] / zoom).long()
    inside = (y < target_shape[0])[:, None] & (x < target_shape[1])
    return torch.where(inside, y[:, None] * target_shape[1] + x, -1).int()


def reversal(table: Tensor, target_shape: Shape) -> Tensor:
    """Reverse of one table by a loop: the last pixel in raster order wins."""
    reverse = torch.full((math.prod(target_shape),), -1, dtype=torch.int32)
    for pixel, index in enumerate(table.flatten().tolist()):
        if index >= 0:
            reverse[index] = pixel
    return reverse.view(target_shape)


def make_tables(shape: Shape, target_shape: Shape) -> tuple[Tensor, Tensor]:
    """Both directions of four pairs: the same picture (full), a 12 times smaller one, noise, no copy (empty)."""
    forward = [zoomed(shape, target_shape, zoom) for zoom in (1.0, 1 / 12)]
    forward += [torch.randint(-1, math.prod(target_shape), shape, dtype=torch.int32)]
    forward += [torch.full(shape, -1, dtype=torch.int32)]
    backward = [reversal(table, target_shape) for table in forward]
    return torch.stack(forward).to(DEVICE), torch.stack(backward).to(DEVICE)


def make_tokens(patches: tuple[int, int], channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Four pairs of any length: a common offset in one channel of all, one reference token 100 times the others."""
    tokens = [torch.randn(4, count, channels) * 3 for count in patches]
    for side in tokens:
        side[:, :, 0] += 10
    tokens[1][:, -1] *= 100
    return [side.to(DEVICE, dtype) for side in tokens]


def error(value: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(value).all()
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def exact(
    tokens: list[Tensor],
    tables: tuple[Tensor, Tensor],
    traced: Tensor,
    dtype: torch.dtype = torch.float64,
    **settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the twin in float64, or in another dtype."""
    query, reference = (side.to(dtype, copy=True).requires_grad_() for side in tokens)
    loss = copynce_reference(query, reference, *tables, traced, **{"temperature": 1 / 16, **settings})
    (2.5 * loss).backward()
    assert query.grad is not None
    assert reference.grad is not None
    return loss.detach(), query.grad, reference.grad


def gradient_bars(
    tokens: list[Tensor], tables: tuple[Tensor, Tensor], traced: Tensor, expected: tuple[Tensor, ...], **settings
) -> list[float]:
    """Twice the errors of plain float32, and what the kernels round besides: a logit and its line's logarithm, both up
    to 1/temperature, where plain float32 subtracts the largest logit first. How numbers are added up differs between
    processors, and so does each of these errors.
    """
    plain = exact(tokens, tables, traced, torch.float32, **settings)
    rounding = 2 * 2.0**-24 / settings.get("temperature", 1 / 16)
    return [2 * error(one, other) + rounding for one, other in zip(plain[1:], expected[1:], strict=True)]
