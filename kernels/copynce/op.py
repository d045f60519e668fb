"""CopyNCE as registered operators, forward and backward, as autograd, ``torch.compile`` and DDP want them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..patch_overlap import power_mode, power_table
from .backward import copynce_bwd
from .device import cosine_stride
from .forward import copynce_fwd


def _pair_weight(traced: Tensor) -> Tensor:
    """Weight of each pair in the batch, float32 [B]: one over the number of traced ones, 0 for the others."""
    return torch.div(traced, traced.sum().clamp_min(1)).float()


def _with_contiguous_channels(tokens: Tensor) -> Tensor:
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _powers(like: Tensor, gamma: float, patch_size: int) -> Tensor:
    return like if power_mode(gamma) else power_table(gamma, patch_size**2, like.device)


@torch.library.custom_op("copynce::copynce_triton", mutates_args=())
def copynce_triton(
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_counts: Tensor,
    query_prior: Tensor,
    reference_counts: Tensor,
    reference_prior: Tensor,
    traced: Tensor,
    patch_size: int,
    temperature: float,
    gamma: float,
    released: bool,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch loss, float32 scalar, and what backward needs: int16 cosines (empty without ``stash``), factors,
    pair weights.

    ``query_tokens`` [B, Lq, D], ``reference_tokens`` [B, Lr, D]: float32, float16 or bfloat16, at most 1024 patches.
    ``*_counts``, ``*_prior``: of ``patch_overlap`` for the two tables, made with the same settings. ``traced`` [B]:
    bool; the other pairs' tokens are not read. ``temperature``: at least 0.025
    (``copynce.losses.settings`` says why).
    """
    pair_weight = _pair_weight(traced)
    losses, *kept = copynce_fwd(
        _with_contiguous_channels(query_tokens),
        _with_contiguous_channels(reference_tokens),
        query_counts,
        query_prior,
        reference_counts,
        reference_prior,
        pair_weight,
        _powers(query_prior, gamma, patch_size),
        temperature,
        power_mode(gamma),
        released,
        stash,
    )
    return losses.sum(), kept[0], kept[1], kept[2], pair_weight


@copynce_triton.register_fake
def _(query_tokens: Tensor, reference_tokens: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, stash = others
    batch, query_patches, _ = query_tokens.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return query_tokens.new_empty(shape, dtype=dtype)

    stride = cosine_stride(reference_tokens.shape[1])
    cosine = empty(batch if stash else 0, query_patches, stride, dtype=torch.int16)
    factors = empty(batch, 2, query_patches), empty(batch, 2, reference_tokens.shape[1])
    return empty(), cosine, *factors, empty(batch)


@torch.library.custom_op("copynce::copynce_triton_backward", mutates_args=())
def copynce_triton_backward(
    upstream: Tensor,
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_counts: Tensor,
    query_prior: Tensor,
    reference_counts: Tensor,
    reference_prior: Tensor,
    cosine: Tensor,
    query_factor: Tensor,
    reference_factor: Tensor,
    pair_weight: Tensor,
    patch_size: int,
    temperature: float,
    gamma: float,
    released: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss to both token tensors, in their dtype, times the scalar ``upstream``."""
    return copynce_bwd(
        upstream,
        _with_contiguous_channels(query_tokens),
        _with_contiguous_channels(reference_tokens),
        query_counts,
        query_prior,
        reference_counts,
        reference_prior,
        query_factor,
        reference_factor,
        pair_weight,
        _powers(query_prior, gamma, patch_size),
        cosine,
        temperature,
        power_mode(gamma),
        released,
    )


@copynce_triton_backward.register_fake
def _(upstream: Tensor, query_tokens: Tensor, reference_tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query_tokens.new_empty(query_tokens.shape), reference_tokens.new_empty(reference_tokens.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, patch_size, temperature, gamma, released, _ = inputs
    _, *kept = output
    ctx.settings = patch_size, temperature, gamma, released
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return (*copynce_triton_backward(upstream, *ctx.saved_tensors, *ctx.settings), *(None,) * 10)


copynce_triton.register_autograd(_backward, setup_context=_save_for_backward)
