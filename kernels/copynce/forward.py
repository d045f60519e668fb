"""CopyNCE forward: a kernel for blocks of query rows by all columns, one that finishes a pair, and their launches."""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers and constants to Triton; their dtypes and shapes stand beside them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, next_power_of_2
from ..patch_overlap import MASS
from .device import (
    COSINE_STEPS,
    INVERSE_NORM,
    LOG2_E,
    ROUNDING,
    SOFTMAX,
    cosine_stride,
    dot,
    finished,
    inverse_length,
    load_tokens,
    patch_weight,
    row_prior,
    squares,
    targets,
)
from .launch_config import forward_config, sizes, strides


@triton.jit
def _copynce_fwd_kernel(
    p_query,  # [B, LQ, D]: query tokens, rows of contiguous channels
    p_reference,  # [B, LR, D]: reference tokens
    p_query_counts,  # [B, LQ, SR] uint8 or int16: query to reference
    p_reference_counts,  # [B, LR, SQ] uint8 or int16: reference to query
    p_query_prior,  # [B, 2 or 3, LQ] float32
    p_reference_prior,  # [B, 2 or 3, LR] float32
    p_pair_weight,  # [B] float32: weight of the pair in the batch, 0 if it is not traced
    p_power,  # [P + 1] float32: read with POWER 0 only
    p_cosine,  # [B, LQ, SC] int16: out with STASH
    p_query_factor,  # [B, 2, LQ] float32: out, rows INVERSE_NORM and SOFTMAX
    p_reference_factor,  # [B, 2, LR] float32: out, row INVERSE_NORM
    p_column_sum,  # [B, row blocks, 1 or 2, LR] float32: out, sums over the block's rows of E and, with STASH, E x
    p_loss,  # [B, row blocks] float32: out, the block's part of the loss
    query_stride_b,
    query_stride_l,
    reference_stride_b,
    reference_stride_l,
    scale,  # 1 / tau
    LQ: tl.constexpr,
    LR: tl.constexpr,
    SQ: tl.constexpr,
    SR: tl.constexpr,
    D: tl.constexpr,
    LP: tl.constexpr,
    POWER: tl.constexpr,
    RELEASED: tl.constexpr,
    STASH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    LQP: tl.constexpr = triton.next_power_of_2(LQ)
    SC: tl.constexpr = cosine_stride(LR)
    PRIOR_ROWS: tl.constexpr = 3 if POWER == 0 else 2
    i_block = tl.program_id(0)
    i_sample = tl.program_id(1).to(tl.int64)
    pair_weight = tl.load(p_pair_weight + i_sample)
    if pair_weight == 0:
        return
    p_query += i_sample * query_stride_b
    p_reference += i_sample * reference_stride_b
    p_query_prior += i_sample * (PRIOR_ROWS * LQ)
    p_reference_prior += i_sample * (PRIOR_ROWS * LR)
    o_i = i_block * BLOCK_L + tl.arange(0, BLOCK_L)
    o_j = tl.arange(0, LP)
    m_i = o_i < LQ
    m_j = o_j < LR
    m_ij = m_i[:, None] & m_j[None, :]

    # Cosines, with the lengths from the same loads.
    b_product = tl.zeros((BLOCK_L, LP), tl.float32)
    GROUPS: tl.constexpr = BLOCK_D // 8
    b_query_squares = tl.zeros((BLOCK_L, GROUPS), tl.float32)
    b_reference_squares = tl.zeros((LP, GROUPS), tl.float32)
    for i_channel in range(0, D, BLOCK_D):
        b_query = load_tokens(p_query, query_stride_l, o_i, LQ, i_channel, D, BLOCK_D)
        b_reference = load_tokens(p_reference, reference_stride_l, o_j, LR, i_channel, D, BLOCK_D)
        b_product = dot(b_query, tl.trans(b_reference), b_product)
        b_product = finished(b_product, i_channel)
        b_query_squares += squares(b_query, BLOCK_L, GROUPS)
        b_reference_squares += squares(b_reference, LP, GROUPS)
    b_query_norm = inverse_length(b_query_squares)
    b_reference_norm = inverse_length(b_reference_squares)
    p_query_factor += i_sample * (2 * LQ) + o_i
    tl.store(p_query_factor + INVERSE_NORM * LQ, b_query_norm, mask=m_i)
    if i_block == 0:
        tl.store(p_reference_factor + i_sample * (2 * LR) + INVERSE_NORM * LR + o_j, b_reference_norm, mask=m_j)
    # The cosine's distance below 1, in steps.
    b_below = b_product * (b_query_norm * COSINE_STEPS)[:, None] * b_reference_norm[None, :] - COSINE_STEPS

    query_weight = patch_weight(p_query_prior, pair_weight, LQ, LQP, RELEASED)
    reference_weight = patch_weight(p_reference_prior, pair_weight, LR, LP, RELEASED)
    b_query_scale, b_query_peak = row_prior(p_query_prior, query_weight, o_i, LQ, POWER)
    b_reference_scale, b_reference_peak = row_prior(p_reference_prior, reference_weight, o_j, LR, POWER)
    b_targets = targets(
        p_query_counts + i_sample * (LQ * SR),
        p_reference_counts + i_sample * (LR * SQ),
        b_query_scale,
        b_query_peak,
        b_reference_scale,
        b_reference_peak,
        p_power,
        o_i,
        o_j,
        LQ,
        LR,
        SR,
        SQ,
        POWER,
    )
    step = scale / COSINE_STEPS
    b_matched = tl.sum(b_targets * b_below, axis=1) * step

    # Both softmaxes from one exponential, of the cosines that backward will know.
    b_kept = b_below
    if STASH:
        b_rounded = b_below + ROUNDING
        b_kept = b_rounded - ROUNDING
        p_steps = p_cosine + i_sample * (LQ * SC) + o_i[:, None] * SC + o_j[None, :]
        tl.store(p_steps, b_rounded.to(tl.int32, bitcast=True).to(tl.int16), mask=m_i[:, None] & (o_j < SC)[None, :])
    b_exponential = tl.where(m_ij, tl.exp2(b_kept * (step * LOG2_E)), 0.0)
    b_row_sum = tl.where(m_i, tl.sum(b_exponential, axis=1), 1.0)
    b_exact_sum = b_row_sum
    p_sum = p_column_sum + (i_sample * tl.num_programs(0) + i_block) * ((2 if STASH else 1) * LR) + o_j
    tl.store(p_sum, tl.sum(b_exponential, axis=0), mask=m_j)
    if STASH:
        b_exponential *= b_below - b_kept
        b_exact_sum += tl.sum(b_exponential, axis=1) * step
        tl.store(p_sum + LR, tl.sum(b_exponential, axis=0) * step, mask=m_j)

    b_mass = tl.load(p_query_prior + MASS * LQ + o_i, mask=m_i, other=0.0) * query_weight
    b_loss = b_mass * tl.log(b_exact_sum) - b_matched
    tl.store(p_loss + i_sample * tl.num_programs(0) + i_block, tl.sum(tl.where(m_i, b_loss, 0.0), axis=0))

    tl.store(p_query_factor + SOFTMAX * LQ, b_mass / b_row_sum, mask=m_i)


@triton.jit
def _copynce_finalise_kernel(
    p_reference_prior,  # [B, 2 or 3, LR] float32
    p_pair_weight,  # [B] float32
    p_column_sum,  # [B, BLOCKS, 1 or 2, LR] float32
    p_block_loss,  # [B, BLOCKS] float32
    p_reference_factor,  # [B, 2, LR] float32: out, row SOFTMAX
    p_loss,  # [B] float32: out, the pair's part of the batch loss
    LR: tl.constexpr,
    LP: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRIOR_ROWS: tl.constexpr,
    RELEASED: tl.constexpr,
    STASH: tl.constexpr,
):
    i_sample = tl.program_id(0).to(tl.int64)
    pair_weight = tl.load(p_pair_weight + i_sample)
    if pair_weight == 0:
        tl.store(p_loss + i_sample, 0.0)
        return
    p_reference_prior += i_sample * (PRIOR_ROWS * LR)
    o_j = tl.arange(0, LP)
    m_j = o_j < LR
    b_sum = tl.zeros((LP,), tl.float32)
    b_change = tl.zeros((LP,), tl.float32)
    loss = 0.0
    for i_block in range(BLOCKS):
        p_sum = p_column_sum + (i_sample * BLOCKS + i_block) * ((2 if STASH else 1) * LR) + o_j
        b_sum += tl.load(p_sum, mask=m_j, other=0.0)
        if STASH:
            b_change += tl.load(p_sum + LR, mask=m_j, other=0.0)
        loss += tl.load(p_block_loss + i_sample * BLOCKS + i_block)
    b_sum = tl.where(m_j, b_sum, 1.0)
    weight = patch_weight(p_reference_prior, pair_weight, LR, LP, RELEASED)
    b_mass = tl.load(p_reference_prior + MASS * LR + o_j, mask=m_j, other=0.0) * weight
    tl.store(p_reference_factor + i_sample * (2 * LR) + SOFTMAX * LR + o_j, b_mass / b_sum, mask=m_j)
    tl.store(p_loss + i_sample, loss + tl.sum(b_mass * tl.log(b_sum + b_change), axis=0))


def copynce_fwd(
    query: Tensor,
    reference: Tensor,
    query_counts: Tensor,
    query_prior: Tensor,
    reference_counts: Tensor,
    reference_prior: Tensor,
    pair_weight: Tensor,
    powers: Tensor,
    temperature: float,
    mode: int,
    released: bool,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each pair's part of the loss [B], cosines int16 [B, Lq, Sc] (empty without ``stash``) and both factor tensors.

    Two launches. Tokens with contiguous channels; ``pair_weight`` float32 [B]; ``powers`` read with ``mode`` 0 only.
    """
    batch, query_patches, _ = query.shape
    reference_patches = reference.shape[1]
    width = max(16, next_power_of_2(reference_patches))
    config = forward_config(query, width, mode)
    blocks = -(-query_patches // config.rows)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    cosine = empty(batch if stash else 0, query_patches, cosine_stride(reference_patches), dtype=torch.int16)
    query_factor, reference_factor = empty(batch, 2, query_patches), empty(batch, 2, reference_patches)
    column_sum, block_loss = empty(batch, blocks, 2 if stash else 1, reference_patches), empty(batch, blocks)
    loss = empty(batch)
    if not batch:
        return loss, cosine, query_factor, reference_factor
    launch(
        _copynce_fwd_kernel,
        (blocks, batch),
        {
            "p_query": query,
            "p_reference": reference,
            "p_query_counts": query_counts,
            "p_reference_counts": reference_counts,
            "p_query_prior": query_prior,
            "p_reference_prior": reference_prior,
            "p_pair_weight": pair_weight,
            "p_power": powers,
            "p_cosine": cosine,
            "p_query_factor": query_factor,
            "p_reference_factor": reference_factor,
            "p_column_sum": column_sum,
            "p_loss": block_loss,
            **strides(query, reference),
            "scale": 1 / temperature,
        },
        {
            **sizes(query, reference, query_counts, reference_counts),
            "LP": width,
            "POWER": mode,
            "RELEASED": released,
            "STASH": stash,
            "BLOCK_L": config.rows,
            "BLOCK_D": config.channels,
        },
        config.warps,
        config.stages,
    )
    launch(
        _copynce_finalise_kernel,
        (batch,),
        {
            "p_reference_prior": reference_prior,
            "p_pair_weight": pair_weight,
            "p_column_sum": column_sum,
            "p_block_loss": block_loss,
            "p_reference_factor": reference_factor,
            "p_loss": loss,
        },
        {
            "LR": reference_patches,
            "LP": width,
            "BLOCKS": blocks,
            "PRIOR_ROWS": reference_prior.shape[1],
            "RELEASED": released,
            "STASH": stash,
        },
        warps=4,
        stages=1,
    )
    return loss, cosine, query_factor, reference_factor
