"""CopyNCE, both directions at once: loss and gradients without a [B, L, L] float tensor or a normalised token.

With raw tokens Q_i and R_j, their inverse lengths u_i and v_j, s = 1 / tau and ``S_ij = s u_i v_j (Q_i . R_j)``
(``copynce_reference`` states the loss, eq. 6 and 7):

    E_ij = exp(S_ij - s)                 S is bounded by s: no running maximum, and row *and* column sums are plain sums
    loss = sum_i m_i log sum_j E_ij + sum_j n_j log sum_i E_ij - sum_ij T_ij (S_ij - s)
    dS_ij = E_ij (a_i + b_j) - T_ij,     a_i = m_i / sum_j E_ij,   b_j = n_j / sum_i E_ij
    dQ_i = u_i (sum_j G_ij R_j - t_i u_i Q_i),   G_ij = s v_j dS_ij,   t_i = sum_j G_ij cos_ij / v_j

where T is the sum of both priors and m, n their masses, each times half of the pair's share in the batch over its
number of patches. G is taken as the tensor cores see it, rounded: t then cancels the radial part of what was added.
dR is the same program with the pictures exchanged.

Four launches with the two of ``patch_overlap`` before: forward (a block of query rows by all columns), a finalising one
(column sums; a pair each) and backward (both pictures). No atomics: the same bits every time.

For backward the forward leaves the cosines as int16 in steps of 1/32000, when the tokens have 16 bits and there are 64
patches or more: 2 bytes an entry for half of the backward's products, with an error far below the rounding of the
gradient (a bfloat16 cosine would not do). The sums in a and b are of these rounded cosines, so that each softmax adds
to 1: where a match is certain dS is the difference of nearly equal numbers, and an error in their ratio would be all
that is left of it. The loss is of the exact cosines: to first order ``sum E exp(x) = sum E + sum E x``, x the rounding.
For float32 tokens backward computes the cosines again, in float32.

Shapes: B pairs, Lq and Lr patches of query and reference, D channels, Sq and Sr: L rounded up to 16, Sc: Lr up to 8.
Cost of 16-bit tokens: 2 B L D FLOP forward and 4 backward per column; tokens, counts (1 byte) and cosines (2 bytes)
read or written once by forward and once by backward, gradients written.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers and constants to Triton; their dtypes and shapes stand beside them)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2
from .patch_overlap import MASS, PEAK, SCALE, power, power_mode, power_table

LARGEST_PATCHES = 1024  # a block of rows holds all columns: forward in registers, backward in shared memory
_SMALLEST_KEPT = 64  # patches; with fewer a launch costs more than its products, and fewer errors average out
LARGEST_PATCH_SIZE = 181  # the counts of a larger patch would overflow int16
# exp(S - s) must stay a normal float32 down to cosine -1, that is exp(-2 / tau) > 1e-38.
LARGEST_LOGIT_RANGE = 80.0

_SMALLEST_NORM = tl.constexpr(1e-12)  # as torch.nn.functional.normalize
_COSINE_STEPS = tl.constexpr(32000.0)  # |cos| may exceed 1 by rounding, int16 ends at 1.024 of this
# Added to steps below cosine 1 it rounds them to integers, and the lowest bits of the sum are the steps of the cosine.
_ROUNDING = tl.constexpr(1.5 * 2.0**23 + 32000.0)
_ROUNDING_BITS = tl.constexpr(0x4B400000)  # of 1.5 * 2^23
_FLOAT16_UNIT = tl.constexpr(2.0**-10)  # a bound of 2^10 units: 64 times below float16's largest, 2^24 above its normal
_LOG2_E = tl.constexpr(1.4426950408889634)
# Rows of the factor tensors [B, 2, L].
INVERSE_NORM = tl.constexpr(0)
SOFTMAX = tl.constexpr(1)  # a or b


class Config(NamedTuple):
    """Launch settings of one kernel for one width class."""

    rows: int
    channels: int
    warps: int
    stages: int
    chunk: int = 0  # columns that backward makes at a time; forward holds the products of all


# By columns padded to a power of two. Chosen from compiled resources (benchmarks.kernels --aot): the largest row block
# without spills, since each block reads the whole other picture from L2, and 64 rows are what wgmma needs. Backward up
# to 512 columns: chunks of so few registers that two blocks share a multiprocessor of an H100, where one alone mostly
# waits (docs/kernels.md, also on what was timed, and in which form).
_FORWARD = {256: Config(64, 64, 8, 3), 512: Config(32, 64, 8, 2), 1024: Config(16, 32, 8, 2)}
_BACKWARD = {256: Config(64, 64, 8, 2, 32), 512: Config(32, 32, 8, 2, 64), 1024: Config(32, 16, 8, 2, 64)}
# Float32 tokens: twice the bytes a tile, and three tf32 products each, for the accuracy of float32.
_FORWARD_FLOAT32 = {256: Config(32, 32, 8, 2), 512: Config(16, 16, 8, 2), 1024: Config(16, 16, 16, 1)}
_BACKWARD_FLOAT32 = {256: Config(16, 32, 8, 1, 64), 512: Config(16, 16, 8, 1, 64), 1024: Config(16, 16, 8, 1, 64)}


@triton.constexpr_function
def _chunks(patches: int, chunk: int) -> int:
    """Number of chunks of columns."""
    return (patches + chunk - 1) // chunk


@triton.constexpr_function
def _width(patches: int, chunk: int, c: int) -> int:
    """Columns of chunk ``c``: a power of two from 16 on, and the last chunk as narrow as it may be."""
    return min(chunk, max(16, triton.next_power_of_2(patches - c * chunk)))


@triton.constexpr_function
def _cosine_stride(patches: int) -> int:
    """Elements from one row of cosines to the next: ``patches`` rounded up to 16 bytes, as vector loads need."""
    return (patches + 7) // 8 * 8


@triton.jit
def _pair_weight(p_prior, share, L: tl.constexpr, LP: tl.constexpr, RELEASED: tl.constexpr):
    """Half of the pair's share over its number of patches: all of them ("released") or the copied ones ("paper")."""
    if RELEASED:
        return share * (0.5 / L)
    o_l = tl.arange(0, LP)
    b_mass = tl.load(p_prior + MASS * L + o_l, mask=o_l < L, other=0.0)
    return share * 0.5 / tl.maximum(tl.sum((b_mass > 0).to(tl.float32), axis=0), 1.0)


@triton.jit
def _dot(b_a, b_b, b_sum):
    """b_sum + b_a @ b_b; float32 operands by three tf32 products, which keep float32's accuracy."""
    if b_a.dtype == tl.float32:
        return tl.dot(b_a, b_b, b_sum, input_precision="tf32x3")
    return tl.dot(b_a, b_b, b_sum)


@triton.jit
def _squares(b_tokens, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Sums of squares [ROWS, GROUPS] of neighbouring channels, which one thread loaded together."""
    b_wide = tl.reshape(b_tokens.to(tl.float32), (ROWS, GROUPS, b_tokens.shape[1] // GROUPS))
    return tl.sum(b_wide * b_wide, axis=2)


@triton.jit
def _inverse_length(b_squares):
    """1 / length from sums of squares [rows, groups]."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(b_squares, axis=1)), _SMALLEST_NORM)


@triton.jit
def _finished(b_product, i_channel):
    """``b_product`` itself, in a way that makes Triton wait for it before it loads the next tiles.

    A Hopper product runs on while its loop goes on, and Triton 3.8 then keeps one buffer more; but not for a tile that
    the loop also reads otherwise (here for the lengths): the next load would overwrite what the product still reads.
    Triton sees a use of the product; the compiler after it knows that no channel is negative, and leaves it out.
    """
    return tl.where(i_channel < 0, 0.0, b_product)


@triton.jit
def _load_tokens(p_tokens, stride, o_l, length, i_channel, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile [len(o_l), BLOCK_D] of tokens whose channels are contiguous; zeros outside."""
    o_d = i_channel + tl.arange(0, BLOCK_D)
    m = (o_l < length)[:, None]
    if D % BLOCK_D != 0:
        m = m & (o_d < D)[None, :]
    return tl.load(p_tokens + o_l[:, None] * stride + o_d[None, :], mask=m, other=0.0)


@triton.jit
def _row_prior(p_prior, weight, o_l, length, POWER: tl.constexpr):
    """Scale (times the weight) and peak of the prior of rows o_l; 0 outside."""
    b_scale = tl.load(p_prior + SCALE * length + o_l, mask=o_l < length, other=0.0) * weight
    b_peak = b_scale
    if POWER == 0:
        b_peak = tl.load(p_prior + PEAK * length + o_l, mask=o_l < length, other=0.0)
    return b_scale, b_peak


@triton.jit
def _targets(
    p_own_counts,  # [L, own_stride]: counts of the rows' picture
    p_other_counts,  # [M, other_stride]: counts of the columns' picture
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
    POWER: tl.constexpr,
):
    """T: both directions' weighted priors at rows o_i and columns o_j, 0 outside of the matrix."""
    b_own = tl.load(
        p_own_counts + o_i[:, None] * own_stride + o_j[None, :],
        mask=(o_i < rows)[:, None] & (o_j < own_stride)[None, :],
        other=0,
    )
    b_other = tl.load(
        p_other_counts + o_j[:, None] * other_stride + o_i[None, :],
        mask=(o_j < columns)[:, None] & (o_i < other_stride)[None, :],
        other=0,
    )
    b_targets = power(b_own, b_own_peak[:, None], p_power, POWER) * b_own_scale[:, None]
    b_targets += power(tl.trans(b_other), b_other_peak[None, :], p_power, POWER) * b_other_scale[None, :]
    if POWER == 0:  # a count of 0 may weigh something: 0^0
        b_targets = tl.where((o_i < rows)[:, None] & (o_j < columns)[None, :], b_targets, 0.0)
    return b_targets


@triton.jit
def _load_steps(p_cosine, role, o_i, o_j, rows, columns, SC: tl.constexpr):
    """Cosines' distances below 1 at rows o_i and columns o_j of the query (role 0) or the reference, in steps."""
    if role == 0:
        m_own = (o_i < rows)[:, None] & (o_j < SC)[None, :]
        b_steps = tl.load(p_cosine + o_i[:, None] * SC + o_j[None, :], mask=m_own, other=0)
    else:
        m_other = (o_j < columns)[:, None] & (o_i < SC)[None, :]
        b_steps = tl.trans(tl.load(p_cosine + o_j[:, None] * SC + o_i[None, :], mask=m_other, other=0))
    # As in forward: an integer in the lowest bits, and a difference.
    return (b_steps.to(tl.int32) + _ROUNDING_BITS).to(tl.float32, bitcast=True) - _ROUNDING


@triton.jit
def _copynce_fwd_kernel(
    p_query,  # [B, LQ, D]: query tokens, rows of contiguous channels
    p_reference,  # [B, LR, D]: reference tokens
    p_query_counts,  # [B, LQ, SR] uint8 or int16: query to reference
    p_reference_counts,  # [B, LR, SQ] uint8 or int16: reference to query
    p_query_prior,  # [B, 2 or 3, LQ] float32
    p_reference_prior,  # [B, 2 or 3, LR] float32
    p_share,  # [B] float32: share of the pair in the batch, 0 if it is not active
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
    SC: tl.constexpr = _cosine_stride(LR)
    PRIOR_ROWS: tl.constexpr = 3 if POWER == 0 else 2
    i_block = tl.program_id(0)
    i_sample = tl.program_id(1).to(tl.int64)
    share = tl.load(p_share + i_sample)
    if share == 0:
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
        b_query = _load_tokens(p_query, query_stride_l, o_i, LQ, i_channel, D, BLOCK_D)
        b_reference = _load_tokens(p_reference, reference_stride_l, o_j, LR, i_channel, D, BLOCK_D)
        b_product = _dot(b_query, tl.trans(b_reference), b_product)
        b_product = _finished(b_product, i_channel)
        b_query_squares += _squares(b_query, BLOCK_L, GROUPS)
        b_reference_squares += _squares(b_reference, LP, GROUPS)
    b_query_norm = _inverse_length(b_query_squares)
    b_reference_norm = _inverse_length(b_reference_squares)
    p_query_factor += i_sample * (2 * LQ) + o_i
    tl.store(p_query_factor + INVERSE_NORM * LQ, b_query_norm, mask=m_i)
    if i_block == 0:
        tl.store(p_reference_factor + i_sample * (2 * LR) + INVERSE_NORM * LR + o_j, b_reference_norm, mask=m_j)
    # The cosine's distance below 1, in steps.
    b_below = b_product * (b_query_norm * _COSINE_STEPS)[:, None] * b_reference_norm[None, :] - _COSINE_STEPS

    query_weight = _pair_weight(p_query_prior, share, LQ, LQP, RELEASED)
    reference_weight = _pair_weight(p_reference_prior, share, LR, LP, RELEASED)
    b_query_scale, b_query_peak = _row_prior(p_query_prior, query_weight, o_i, LQ, POWER)
    b_reference_scale, b_reference_peak = _row_prior(p_reference_prior, reference_weight, o_j, LR, POWER)
    b_targets = _targets(
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
    step = scale / _COSINE_STEPS
    b_matched = tl.sum(b_targets * b_below, axis=1) * step

    # Both softmaxes from one exponential, of the cosines that backward will know.
    b_kept = b_below
    if STASH:
        b_rounded = b_below + _ROUNDING
        b_kept = b_rounded - _ROUNDING
        p_steps = p_cosine + i_sample * (LQ * SC) + o_i[:, None] * SC + o_j[None, :]
        tl.store(p_steps, b_rounded.to(tl.int32, bitcast=True).to(tl.int16), mask=m_i[:, None] & (o_j < SC)[None, :])
    b_exponential = tl.where(m_ij, tl.exp2(b_kept * (step * _LOG2_E)), 0.0)
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
    p_share,  # [B] float32
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
    share = tl.load(p_share + i_sample)
    if share == 0:
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
    weight = _pair_weight(p_reference_prior, share, LR, LP, RELEASED)
    b_mass = tl.load(p_reference_prior + MASS * LR + o_j, mask=m_j, other=0.0) * weight
    tl.store(p_reference_factor + i_sample * (2 * LR) + SOFTMAX * LR + o_j, b_mass / b_sum, mask=m_j)
    tl.store(p_loss + i_sample, loss + tl.sum(b_mass * tl.log(b_sum + b_change), axis=0))


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
    p_share,  # [B] float32
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
    CHUNKS: tl.constexpr = _chunks(PATCHES, CHUNK)
    SC: tl.constexpr = _cosine_stride(LR)
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
    share = tl.load(p_share + i_sample)
    if share == 0:
        for i_channel in range(0, D, BLOCK_D):
            o_d = i_channel + tl.arange(0, BLOCK_D)
            b_zero = tl.zeros((BLOCK_L, BLOCK_D), p_gradient.dtype.element_ty)
            tl.store(p_gradient + o_d[None, :], b_zero, mask=m_i[:, None] & (o_d < D)[None, :])
        return

    b_own_norm = tl.load(p_own_factor + INVERSE_NORM * rows + o_i, mask=m_i, other=0.0)
    b_own_softmax = tl.load(p_own_factor + SOFTMAX * rows + o_i, mask=m_i, other=0.0)
    query_weight = _pair_weight(p_query_prior + i_sample * (PRIOR_ROWS * LQ), share, LQ, LP, RELEASED)
    reference_weight = _pair_weight(p_reference_prior + i_sample * (PRIOR_ROWS * LR), share, LR, LP, RELEASED)
    own_weight = tl.where(role == 0, query_weight, reference_weight)
    other_weight = tl.where(role == 0, reference_weight, query_weight)
    b_own_scale, b_own_peak = _row_prior(p_own_prior, own_weight, o_i, rows, POWER)
    unit = 1.0
    if p_gradient.dtype.element_ty == tl.float16:
        # G lies far below float16's range. |dS| is at most the sum of both weights, which bounds every |G| beforehand.
        o_j = tl.arange(0, LP)
        b_other_norm = tl.load(p_other_factor + INVERSE_NORM * columns + o_j, mask=o_j < columns, other=0.0)
        unit = tl.max(b_other_norm, axis=0) * scale * (query_weight + reference_weight) * _FLOAT16_UNIT

    # G as the tensor cores see it, and its part along the token itself. In chunks, since all columns at once take all
    # registers of a thread; what stays of a chunk is rounded, and Triton keeps it in shared memory.
    b_along = tl.zeros((BLOCK_L,), tl.float32)
    b_gradients = ()
    for c in tl.static_range(CHUNKS):
        o_j = c * CHUNK + tl.arange(0, _width(PATCHES, CHUNK, c))
        m_j = o_j < columns
        b_other_norm = tl.load(p_other_factor + INVERSE_NORM * columns + o_j, mask=m_j, other=1.0)
        b_other_softmax = tl.load(p_other_factor + SOFTMAX * columns + o_j, mask=m_j, other=0.0)
        if STASH:
            b_below = _load_steps(p_cosine, role, o_i, o_j, rows, columns, SC)
        else:
            b_cosine = tl.zeros((BLOCK_L, _width(PATCHES, CHUNK, c)), tl.float32)
            for i_channel in range(0, D, BLOCK_D):
                b_own = _load_tokens(p_own, own_step, o_i, rows, i_channel, D, BLOCK_D)
                b_other = _load_tokens(p_other, other_step, o_j, columns, i_channel, D, BLOCK_D)
                b_cosine = _dot(b_own, tl.trans(b_other), b_cosine)
            b_below = b_cosine * (b_own_norm * _COSINE_STEPS)[:, None] * b_other_norm[None, :] - _COSINE_STEPS
        b_other_scale, b_other_peak = _row_prior(p_other_prior, other_weight, o_j, columns, POWER)
        b_targets = _targets(
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
        b_exponential = tl.exp2(b_below * (scale / _COSINE_STEPS * _LOG2_E))
        b_gradient = b_exponential * (b_own_softmax[:, None] + b_other_softmax[None, :]) - b_targets
        b_gradient *= (b_other_norm * (scale / unit))[None, :]
        b_gradient = tl.where(m_i[:, None] & m_j[None, :], b_gradient, 0.0).to(p_gradient.dtype.element_ty)
        b_part = b_gradient.to(tl.float32) * (1.0 / b_other_norm)[None, :]
        b_along += tl.sum(b_part * (b_below * (1.0 / _COSINE_STEPS) + 1.0), axis=1)
        b_gradients += (b_gradient,)  # type: ignore[assignment]  # one type for mypy: a tuple of no or one tensor
    b_along *= b_own_norm
    b_size = b_own_norm * (tl.load(p_upstream) * unit)

    for i_channel in range(0, D, BLOCK_D):
        b_own = _load_tokens(p_own, own_step, o_i, rows, i_channel, D, BLOCK_D)
        b_sum = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        for c in tl.static_range(CHUNKS):
            o_j = c * CHUNK + tl.arange(0, _width(PATCHES, CHUNK, c))
            b_other = _load_tokens(p_other, other_step, o_j, columns, i_channel, D, BLOCK_D)
            b_sum = _dot(b_gradients[c], b_other, b_sum)
        b_sum = (b_sum - b_along[:, None] * b_own.to(tl.float32)) * b_size[:, None]
        o_d = i_channel + tl.arange(0, BLOCK_D)
        m = m_i[:, None]
        if D % BLOCK_D != 0:
            m = m & (o_d < D)[None, :]
        tl.store(p_gradient + o_d[None, :], b_sum.to(p_gradient.dtype.element_ty), mask=m)


def _config(half: dict[int, Config], single: dict[int, Config], tokens: Tensor, width: int) -> Config:
    return (single if tokens.dtype.itemsize == 4 else half)[max(256, width)]


def keeps_cosines(query: Tensor, reference: Tensor) -> bool:
    """True where the forward leaves int16 cosines to backward: tokens of 16 bits, and enough of them."""
    return query.dtype.itemsize == 2 and min(query.shape[1], reference.shape[1]) >= _SMALLEST_KEPT


def copynce_fwd(
    query: Tensor,
    reference: Tensor,
    query_counts: Tensor,
    query_prior: Tensor,
    reference_counts: Tensor,
    reference_prior: Tensor,
    share: Tensor,
    powers: Tensor,
    temperature: float,
    mode: int,
    released: bool,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each pair's part of the loss [B], cosines int16 [B, Lq, Sc] (empty without ``stash``) and both factor tensors.

    Two launches. Tokens with contiguous channels; ``share`` float32 [B]; ``powers`` read with ``mode`` 0 only.
    """
    batch, query_patches, _ = query.shape
    reference_patches = reference.shape[1]
    width = max(16, next_power_of_2(reference_patches))
    config = _config(_FORWARD, _FORWARD_FLOAT32, query, width)
    if mode == 0 and query.dtype.itemsize == 2:  # the gather of powers takes as many registers again
        config = config._replace(rows=max(16, config.rows // 2))
    blocks = -(-query_patches // config.rows)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    cosine = empty(batch if stash else 0, query_patches, _cosine_stride(reference_patches), dtype=torch.int16)
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
            "p_share": share,
            "p_power": powers,
            "p_cosine": cosine,
            "p_query_factor": query_factor,
            "p_reference_factor": reference_factor,
            "p_column_sum": column_sum,
            "p_loss": block_loss,
            **_strides(query, reference),
            "scale": 1 / temperature,
        },
        {
            **_sizes(query, reference, query_counts, reference_counts),
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
            "p_share": share,
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
    share: Tensor,
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
    config = _config(_BACKWARD, _BACKWARD_FLOAT32, query, width)
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
            "p_share": share,
            "p_power": powers,
            "p_cosine": cosine,
            "p_query_gradient": gradients[0],
            "p_reference_gradient": gradients[1],
            **_strides(query, reference),
            "scale": 1 / temperature,
        },
        {
            **_sizes(query, reference, query_counts, reference_counts),
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


def _strides(query: Tensor, reference: Tensor) -> dict[str, Any]:
    return {
        "query_stride_b": query.stride(0),
        "query_stride_l": query.stride(1),
        "reference_stride_b": reference.stride(0),
        "reference_stride_l": reference.stride(1),
    }


def _sizes(query: Tensor, reference: Tensor, query_counts: Tensor, reference_counts: Tensor) -> dict[str, Any]:
    return {
        "LQ": query.shape[1],
        "LR": reference.shape[1],
        "SQ": reference_counts.shape[2],
        "SR": query_counts.shape[2],
        "D": query.shape[2],
    }


def _share(active: Tensor) -> Tensor:
    """Share of each pair in the batch, float32 [B]: 0 for the others, all 0 if no pair is active."""
    return torch.div(active, active.sum().clamp_min(1)).float()


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
    active: Tensor,
    patch_size: int,
    temperature: float,
    gamma: float,
    released: bool,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch loss, float32 scalar, and what backward needs: int16 cosines (empty without ``stash``), factors, shares.

    ``query_tokens`` [B, Lq, D], ``reference_tokens`` [B, Lr, D]: float32, float16 or bfloat16, at most 1024 patches.
    ``*_counts``, ``*_prior``: of ``patch_overlap`` for the two tables, made with the same settings. ``active`` [B]:
    bool; the other pairs' tokens are not read. 2 / temperature at most 80.
    """
    share = _share(active)
    losses, *kept = copynce_fwd(
        _with_contiguous_channels(query_tokens),
        _with_contiguous_channels(reference_tokens),
        query_counts,
        query_prior,
        reference_counts,
        reference_prior,
        share,
        _powers(query_prior, gamma, patch_size),
        temperature,
        power_mode(gamma),
        released,
        stash,
    )
    return losses.sum(), kept[0], kept[1], kept[2], share


@copynce_triton.register_fake
def _(
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_counts: Tensor,
    query_prior: Tensor,
    reference_counts: Tensor,
    reference_prior: Tensor,
    active: Tensor,
    patch_size: int,
    temperature: float,
    gamma: float,
    released: bool,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, query_patches, _ = query_tokens.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return query_tokens.new_empty(shape, dtype=dtype)

    stride = _cosine_stride(reference_tokens.shape[1])
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
    share: Tensor,
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
        share,
        _powers(query_prior, gamma, patch_size),
        cosine,
        temperature,
        power_mode(gamma),
        released,
    )


@copynce_triton_backward.register_fake
def _(
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
    share: Tensor,
    patch_size: int,
    temperature: float,
    gamma: float,
    released: bool,
) -> tuple[Tensor, Tensor]:
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


def fits(query_tokens: Tensor, reference_tokens: Tensor, temperature: float, patch_size: int) -> bool:
    """True where the kernels take these sizes and settings, whatever the device."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    patches = max(query_tokens.shape[1], reference_tokens.shape[1])
    small = patches <= LARGEST_PATCHES and patch_size <= LARGEST_PATCH_SIZE
    return small and query_tokens.dtype in dtypes and 2 / temperature <= LARGEST_LOGIT_RANGE
