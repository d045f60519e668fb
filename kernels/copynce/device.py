"""What both CopyNCE kernels call on the device, and their constants."""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers and constants to Triton; their dtypes and shapes stand beside them)

from __future__ import annotations

import triton
import triton.language as tl

from ..patch_overlap import MASS, PEAK, SCALE, power

SMALLEST_NORM = tl.constexpr(1e-12)  # as torch.nn.functional.normalize
COSINE_STEPS = tl.constexpr(32000.0)  # |cos| may exceed 1 by rounding, int16 ends at 1.024 of this
# Added to steps below cosine 1 it rounds them to integers, and the lowest bits of the sum are the steps of the cosine.
ROUNDING = tl.constexpr(1.5 * 2.0**23 + 32000.0)
ROUNDING_BITS = tl.constexpr(0x4B400000)  # of 1.5 * 2^23
FLOAT16_UNIT = tl.constexpr(2.0**-10)  # a bound of 2^10 units: 64 times below float16's largest, 2^24 above its normal
LOG2_E = tl.constexpr(1.4426950408889634)
# Rows of the factor tensors [B, 2, L].
INVERSE_NORM = tl.constexpr(0)
SOFTMAX = tl.constexpr(1)  # a or b


@triton.constexpr_function
def chunks(patches: int, chunk: int) -> int:
    """Number of chunks of columns."""
    return (patches + chunk - 1) // chunk


@triton.constexpr_function
def chunk_width(patches: int, chunk: int, c: int) -> int:
    """Columns of chunk ``c``: a power of two from 16 on, and the last chunk as narrow as it may be."""
    return min(chunk, max(16, triton.next_power_of_2(patches - c * chunk)))


@triton.constexpr_function
def cosine_stride(patches: int) -> int:
    """Elements from one row of cosines to the next: ``patches`` rounded up to 16 bytes, as vector loads need."""
    return (patches + 7) // 8 * 8


@triton.jit
def patch_weight(p_prior, pair_weight, L: tl.constexpr, LP: tl.constexpr, RELEASED: tl.constexpr):
    """Half of the pair's weight over its number of patches: all of them ("released") or the copied ones ("paper")."""
    if RELEASED:
        return pair_weight * (0.5 / L)
    o_l = tl.arange(0, LP)
    b_mass = tl.load(p_prior + MASS * L + o_l, mask=o_l < L, other=0.0)
    return pair_weight * 0.5 / tl.maximum(tl.sum((b_mass > 0).to(tl.float32), axis=0), 1.0)


@triton.jit
def dot(b_a, b_b, b_sum):
    """b_sum + b_a @ b_b; float32 operands by three tf32 products, which keep float32's accuracy."""
    if b_a.dtype == tl.float32:
        return tl.dot(b_a, b_b, b_sum, input_precision="tf32x3")
    return tl.dot(b_a, b_b, b_sum)


@triton.jit
def squares(b_tokens, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Sums of squares [ROWS, GROUPS] of neighbouring channels, which one thread loaded together."""
    b_wide = tl.reshape(b_tokens.to(tl.float32), (ROWS, GROUPS, b_tokens.shape[1] // GROUPS))
    return tl.sum(b_wide * b_wide, axis=2)


@triton.jit
def inverse_length(b_squares):
    """1 / length from sums of squares [rows, groups]."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(b_squares, axis=1)), SMALLEST_NORM)


@triton.jit
def finished(b_product, i_channel):
    """``b_product`` itself, in a way that makes Triton wait for it before it loads the next tiles.

    A Hopper product runs on while its loop goes on, and Triton 3.8 then keeps one buffer more; but not for a tile that
    the loop also reads otherwise (here for the lengths): the next load would overwrite what the product still reads.
    Triton sees a use of the product; the compiler after it knows that no channel is negative, and leaves it out.
    """
    return tl.where(i_channel < 0, 0.0, b_product)


@triton.jit
def load_tokens(p_tokens, stride, o_l, length, i_channel, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile [len(o_l), BLOCK_D] of tokens whose channels are contiguous; zeros outside."""
    o_d = i_channel + tl.arange(0, BLOCK_D)
    m = (o_l < length)[:, None]
    if D % BLOCK_D != 0:
        m = m & (o_d < D)[None, :]
    return tl.load(p_tokens + o_l[:, None] * stride + o_d[None, :], mask=m, other=0.0)


@triton.jit
def row_prior(p_prior, weight, o_l, length, POWER: tl.constexpr):
    """Scale (times the weight) and peak of the prior of rows o_l; 0 outside."""
    b_scale = tl.load(p_prior + SCALE * length + o_l, mask=o_l < length, other=0.0) * weight
    b_peak = b_scale
    if POWER == 0:
        b_peak = tl.load(p_prior + PEAK * length + o_l, mask=o_l < length, other=0.0)
    return b_scale, b_peak


@triton.jit
def targets(
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
def load_steps(p_cosine, role, o_i, o_j, rows, columns, SC: tl.constexpr):
    """Cosines' distances below 1 at rows o_i and columns o_j of the query (role 0) or the reference, in steps."""
    if role == 0:
        m_own = (o_i < rows)[:, None] & (o_j < SC)[None, :]
        b_steps = tl.load(p_cosine + o_i[:, None] * SC + o_j[None, :], mask=m_own, other=0)
    else:
        m_other = (o_j < columns)[:, None] & (o_i < SC)[None, :]
        b_steps = tl.trans(tl.load(p_cosine + o_j[:, None] * SC + o_i[None, :], mask=m_other, other=0))
    # As in forward: an integer in the lowest bits, and a difference.
    return (b_steps.to(tl.int32) + ROUNDING_BITS).to(tl.float32, bitcast=True) - ROUNDING
