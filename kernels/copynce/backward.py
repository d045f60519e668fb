"""CopyNCE backward: one kernel for both pictures' gradients, and its launch."""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers and constants to Triton; their dtypes and shapes stand beside them)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, next_power_of_2
from .device import (
    COSINE_STEPS,
    FLOAT16_UNIT,
    INVERSE_NORM,
    LOG2_E,
    SOFTMAX,
    chunk_width,
    chunks,
    cosine_stride,
    dot,
    load_steps,
    load_tokens,
    patch_weight,
    row_prior,
    targets,
)
from .launch_config import backward_config, sizes, strides


@triton.jit
def _copynce_bwd_kernel(
    p_upstream,  # [] float32: gradient of the loss
    p_query,  # [B, LQ, D]
    p_reference,  # [B, LR, D]
    p_query_counts,  # [B, LQ, SR]
    p_reference_counts,  # [B, LR, SQ]
    p_query_prior,  # [B, 2 or 3, LQ] float32
    p_reference_prior,  # [B, 2 or 3, LR] float32
    p_query_factor,  # [B, 2, LQ] float32
    p_reference_factor,  # [B, 2, LR] float32
    p_pair_weight,  # [B] float32
    p_power,  # [P + 1] float32: read with POWER 0 only
    p_cosine,  # [B, LQ, SC] int16: read with STASH only
    p_query_gradient,  # [B, LQ, D]: out, contiguous
    p_reference_gradient,  # [B, LR, D]: out, contiguous
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
    LP: tl.constexpr,  # the larger of both sides, padded
    POWER: tl.constexpr,
    RELEASED: tl.constexpr,
    STASH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Even programs make rows of dQ, odd ones of dR, side by side: what both read of a pair meets in L2. The pictures
    # are exchanged by their pointers alone; a branch around the work itself would double the kernel.
    PRIOR_ROWS: tl.constexpr = 3 if POWER == 0 else 2
    role = tl.program_id(0) % 2
    i_block = tl.program_id(0) // 2
    i_sample = tl.program_id(1).to(tl.int64)
    rows = LQ + role * (LR - LQ)
    columns = LR + role * (LQ - LR)
    own_stride = tl.multiple_of(SR + role * (SQ - SR), 16)
    other_stride = tl.multiple_of(SQ + role * (SR - SQ), 16)
    if i_block * BLOCK_L >= rows:
        return
    PATCHES: tl.constexpr = max(LQ, LR)
    CHUNKS: tl.constexpr = chunks(PATCHES, CHUNK)
    SC: tl.constexpr = cosine_stride(LR)
    p_cosine += i_sample * (LQ * SC)
    if role == 0:
        p_own = p_query + i_sample * query_stride_b
        p_other = p_reference + i_sample * reference_stride_b
        own_step = query_stride_l
        other_step = reference_stride_l
        p_own_counts = p_query_counts + i_sample * (LQ * SR)
        p_other_counts = p_reference_counts + i_sample * (LR * SQ)
        p_own_prior = p_query_prior + i_sample * (PRIOR_ROWS * LQ)
        p_other_prior = p_reference_prior + i_sample * (PRIOR_ROWS * LR)
        p_own_factor = p_query_factor + i_sample * (2 * LQ)
        p_other_factor = p_reference_factor + i_sample * (2 * LR)
        p_gradient = p_query_gradient + i_sample * (LQ * D)
    else:
        p_own = p_reference + i_sample * reference_stride_b
        p_other = p_query + i_sample * query_stride_b
        own_step = reference_stride_l
        other_step = query_stride_l
        p_own_counts = p_reference_counts + i_sample * (LR * SQ)
        p_other_counts = p_query_counts + i_sample * (LQ * SR)
        p_own_prior = p_reference_prior + i_sample * (PRIOR_ROWS * LR)
        p_other_prior = p_query_prior + i_sample * (PRIOR_ROWS * LQ)
        p_own_factor = p_reference_factor + i_sample * (2 * LR)
        p_other_factor = p_query_factor + i_sample * (2 * LQ)
        p_gradient = p_reference_gradient + i_sample * (LR * D)
    o_i = i_block * BLOCK_L + tl.arange(0, BLOCK_L)
    m_i = o_i < rows
    p_gradient += o_i[:, None] * D
    pair_weight = tl.load(p_pair_weight + i_sample)
    if pair_weight == 0:
        for i_channel in range(0, D, BLOCK_D):
            o_d = i_channel + tl.arange(0, BLOCK_D)
            b_zero = tl.zeros((BLOCK_L, BLOCK_D), p_gradient.dtype.element_ty)
            tl.store(p_gradient + o_d[None, :], b_zero, mask=m_i[:, None] & (o_d < D)[None, :])
        return

    b_own_norm = tl.load(p_own_factor + INVERSE_NORM * rows + o_i, mask=m_i, other=0.0)
    b_own_softmax = tl.load(p_own_factor + SOFTMAX * rows + o_i, mask=m_i, other=0.0)
    query_weight = patch_weight(p_query_prior + i_sample * (PRIOR_ROWS * LQ), pair_weight, LQ, LP, RELEASED)
    reference_weight = patch_weight(p_reference_prior + i_sample * (PRIOR_ROWS * LR), pair_weight, LR, LP, RELEASED)
    own_weight = tl.where(role == 0, query_weight, reference_weight)
    other_weight = tl.where(role == 0, reference_weight, query_weight)
    b_own_scale, b_own_peak = row_prior(p_own_prior, own_weight, o_i, rows, POWER)
    unit = 1.0
    if p_gradient.dtype.element_ty == tl.float16:
        # G lies far below float16's range. |dS| is at most the sum of both weights, which bounds every |G| beforehand.
        o_j = tl.arange(0, LP)
        b_other_norm = tl.load(p_other_factor + INVERSE_NORM * columns + o_j, mask=o_j < columns, other=0.0)
        unit = tl.max(b_other_norm, axis=0) * scale * (query_weight + reference_weight) * FLOAT16_UNIT

    # G as the tensor cores see it, and its part along the token itself. In chunks, since all columns at once take all
    # registers of a thread; what stays of a chunk is rounded, and Triton keeps it in shared memory.
    b_along = tl.zeros((BLOCK_L,), tl.float32)
    b_gradients = ()
    for c in tl.static_range(CHUNKS):
        o_j = c * CHUNK + tl.arange(0, chunk_width(PATCHES, CHUNK, c))
        m_j = o_j < columns
        b_other_norm = tl.load(p_other_factor + INVERSE_NORM * columns + o_j, mask=m_j, other=1.0)
        b_other_softmax = tl.load(p_other_factor + SOFTMAX * columns + o_j, mask=m_j, other=0.0)
        if STASH:
            b_below = load_steps(p_cosine, role, o_i, o_j, rows, columns, SC)
        else:
            b_cosine = tl.zeros((BLOCK_L, chunk_width(PATCHES, CHUNK, c)), tl.float32)
            for i_channel in range(0, D, BLOCK_D):
                b_own = load_tokens(p_own, own_step, o_i, rows, i_channel, D, BLOCK_D)
                b_other = load_tokens(p_other, other_step, o_j, columns, i_channel, D, BLOCK_D)
                b_cosine = dot(b_own, tl.trans(b_other), b_cosine)
            b_below = b_cosine * (b_own_norm * COSINE_STEPS)[:, None] * b_other_norm[None, :] - COSINE_STEPS
        b_other_scale, b_other_peak = row_prior(p_other_prior, other_weight, o_j, columns, POWER)
        b_targets = targets(
            p_own_counts,
            p_other_counts,
            b_own_scale,
            b_own_peak,
            b_other_scale,
            b_other_peak,
            p_power,
            o_i,
            o_j,
            rows,
            columns,
            own_stride,
            other_stride,
            POWER,
        )
        b_exponential = tl.exp2(b_below * (scale / COSINE_STEPS * LOG2_E))
        b_gradient = b_exponential * (b_own_softmax[:, None] + b_other_softmax[None, :]) - b_targets
        b_gradient *= (b_other_norm * (scale / unit))[None, :]
        b_gradient = tl.where(m_i[:, None] & m_j[None, :], b_gradient, 0.0).to(p_gradient.dtype.element_ty)
        b_part = b_gradient.to(tl.float32) * (1.0 / b_other_norm)[None, :]
        b_along += tl.sum(b_part * (b_below * (1.0 / COSINE_STEPS) + 1.0), axis=1)
        b_gradients += (b_gradient,)  # type: ignore[assignment]  # one type for mypy: a tuple of no or one tensor
    b_along *= b_own_norm
    b_size = b_own_norm * (tl.load(p_upstream) * unit)

    for i_channel in range(0, D, BLOCK_D):
        b_own = load_tokens(p_own, own_step, o_i, rows, i_channel, D, BLOCK_D)
        b_sum = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        for c in tl.static_range(CHUNKS):
            o_j = c * CHUNK + tl.arange(0, chunk_width(PATCHES, CHUNK, c))
            b_other = load_tokens(p_other, other_step, o_j, columns, i_channel, D, BLOCK_D)
            b_sum = dot(b_gradients[c], b_other, b_sum)
        b_sum = (b_sum - b_along[:, None] * b_own.to(tl.float32)) * b_size[:, None]
        o_d = i_channel + tl.arange(0, BLOCK_D)
        m = m_i[:, None]
        if D % BLOCK_D != 0:
            m = m & (o_d < D)[None, :]
        tl.store(p_gradient + o_d[None, :], b_sum.to(p_gradient.dtype.element_ty), mask=m)


def copynce_bwd(
    upstream: Tensor,
    query: Tensor,
    reference: Tensor,
    query_counts: Tensor,
    query_prior: Tensor,
    reference_counts: Tensor,
    reference_prior: Tensor,
    query_factor: Tensor,
    reference_factor: Tensor,
    pair_weight: Tensor,
    powers: Tensor,
    cosine: Tensor,
    temperature: float,
    mode: int,
    released: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both token tensors, contiguous, in their dtype, times the scalar ``upstream``; one launch."""
    batch, query_patches, _ = query.shape
    patches = max(query_patches, reference.shape[1])
    width = max(16, next_power_of_2(patches))
    config = backward_config(query, width)
    gradients = query.new_empty(query.shape), reference.new_empty(reference.shape)
    if not batch:
        return gradients
    launch(
        _copynce_bwd_kernel,
        (2 * -(-patches // config.rows), batch),
        {
            "p_upstream": upstream,
            "p_query": query,
            "p_reference": reference,
            "p_query_counts": query_counts,
            "p_reference_counts": reference_counts,
            "p_query_prior": query_prior,
            "p_reference_prior": reference_prior,
            "p_query_factor": query_factor,
            "p_reference_factor": reference_factor,
            "p_pair_weight": pair_weight,
            "p_power": powers,
            "p_cosine": cosine,
            "p_query_gradient": gradients[0],
            "p_reference_gradient": gradients[1],
            **strides(query, reference),
            "scale": 1 / temperature,
        },
        {
            **sizes(query, reference, query_counts, reference_counts),
            "LP": width,
            "POWER": mode,
            "RELEASED": released,
            "STASH": bool(len(cosine)),
            "BLOCK_L": config.rows,
            "CHUNK": config.chunk,
            "BLOCK_D": config.channels,
        },
        config.warps,
        config.stages,
    )
    return gradients
