"""Patch-overlap counts and the row scales of the prior, from coordinate tables.

``n_ij`` is the number of pixels of patch i whose entry lies in patch j of the other picture, ``n_i0`` of those without
source (eq. 4). The prior ``w_ij = scale_i * power(n_ij)`` is never stored: the loss reads a byte a count and makes it
in registers. With ``power(n) = n^gamma`` for gamma 1, 2 and 3 and, else, ``2^(log_i(n) - peak_i)`` from a table of
``gamma log2 n`` and its largest value in the row (so no gamma overflows, and gamma 2^17 is the limit of infinity):

    scale_i = 1 / (power(n_i0) + sum_k power(n_ik))  "released",    1 / sum_k power(n_ik)  "paper" (eq. 5; 0 if empty)
    mass_i  = sum_k w_ik

One program makes one histogram of a run of neighbouring patches: every pixel is counted under (patch of the run, patch
of the other picture). Integer sums alone: the result is the same bit for bit, whatever the downscale. Counts of patches
of at most 256 pixels saturate at 255 in a byte; 256 occurs only where the whole patch falls in one bin, and there the
weight is 1 all the same, because the scale is made from the saturated count.

Shapes: B pairs, H x W pixels of the table, L its patches, M patches of the other picture, P pixels a patch, S = M
rounded up to 16 (rows that start on 16 bytes are what vector loads need; the rest of a row is 0).
Cost: 4 B H W bytes read and B L S written for one direction.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers and constants to Triton; their dtypes and shapes stand beside them)

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2

# Rows of the prior tensor [B, 2, L], or [B, 3, L] where the power comes from the table.
SCALE = tl.constexpr(0)
MASS = tl.constexpr(1)
PEAK = tl.constexpr(2)

# (patches of a run) x (patches of the other picture, padded): small programs, many of which share a multiprocessor.
_BINS = 512
_WARPS = 2
_GAMMA_LIMIT = 2.0**17  # (1023 / 1024)^gamma is below 2^-150 here: the largest bins alone are left, as at infinity


@triton.jit
def power(b_count, b_peak, p_power, POWER: tl.constexpr):
    """power(count) of the module's docstring, float32; ``p_power`` float32 [P + 1] and ``b_peak`` serve POWER 0."""
    if POWER == 0:
        return tl.exp2(tl.load(p_power + b_count.to(tl.int32)) - b_peak)
    b_base = b_count.to(tl.float32)
    b_result = b_base
    if POWER >= 2:
        b_result = b_result * b_base
    if POWER == 3:
        b_result = b_result * b_base
    return b_result


@triton.jit
def _patch_overlap_kernel(
    p_table,  # [B, H, W] int32: pixel index in the other picture; any other number is no source
    p_power,  # [P + 1] float32: read with POWER 0 only
    p_counts,  # [B, L, STRIDE] uint8 or int16: out
    p_prior,  # [B, 2 or 3, L] float32: out, rows SCALE, MASS and, with POWER 0 only, PEAK
    H: tl.constexpr,
    W: tl.constexpr,
    HT: tl.constexpr,  # sides of the other picture
    WT: tl.constexpr,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    RUN: tl.constexpr,  # neighbouring patches of one program
    MP: tl.constexpr,  # bins of a patch: M padded to a power of two
    POWER: tl.constexpr,
    RELEASED: tl.constexpr,
):
    COLUMNS: tl.constexpr = W // PATCH
    RUNS: tl.constexpr = (COLUMNS + RUN - 1) // RUN
    L: tl.constexpr = (H // PATCH) * COLUMNS
    M: tl.constexpr = (HT // PATCH) * (WT // PATCH)
    PY: tl.constexpr = triton.next_power_of_2(PATCH)
    PX: tl.constexpr = triton.next_power_of_2(PATCH * RUN)
    PRIOR_ROWS: tl.constexpr = 3 if POWER == 0 else 2
    LARGEST: tl.constexpr = 255 if PATCH * PATCH <= 256 else PATCH * PATCH
    i_sample = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(0) // RUNS
    i_first = (tl.program_id(0) % RUNS) * RUN

    # Entries of the run's pixels, and the patch that each falls in.
    o_y = tl.arange(0, PY)[:, None]
    o_x = tl.arange(0, PX)[None, :]
    o_pixel = (i_row * PATCH + o_y) * W + i_first * PATCH + o_x
    m_pixel = (o_y < PATCH) & (o_x < PATCH * RUN) & (i_first * PATCH + o_x < W)
    b_entry = tl.load(p_table + i_sample * (H * W) + o_pixel, mask=m_pixel, other=-1)
    m_source = (b_entry >= 0) & (b_entry < HT * WT)
    b_target = (b_entry // WT // PATCH) * (WT // PATCH) + (b_entry % WT) // PATCH
    b_bin = tl.where(m_source, (o_x // PATCH) * MP + b_target, 0)
    b_counts = tl.histogram(tl.reshape(b_bin, (PY * PX,)), RUN * MP, mask=tl.reshape(m_source, (PY * PX,)))
    b_counts = tl.reshape(b_counts, (RUN, MP))

    # Scale and mass of each patch's prior.
    o_patch = tl.arange(0, RUN)
    o_bin = tl.arange(0, MP)
    m_patch = i_first + o_patch < COLUMNS
    b_outside = PATCH * PATCH - tl.sum(b_counts, axis=1)
    b_counts = tl.minimum(b_counts, LARGEST)
    b_largest = tl.max(b_counts, axis=1)
    b_peak = b_largest.to(tl.float32)
    if POWER == 0:
        b_most = tl.maximum(b_largest, b_outside) if RELEASED else b_largest
        b_peak = tl.load(p_power + tl.maximum(b_most, 1))
    b_power = tl.where(o_bin[None, :] < M, power(b_counts, b_peak[:, None], p_power, POWER), 0.0)
    b_inside = tl.sum(b_power, axis=1)
    if RELEASED:
        b_total = b_inside + power(b_outside, b_peak, p_power, POWER)
    else:
        b_total = tl.where(b_largest > 0, b_inside, 0.0)
    b_scale = tl.where(b_total > 0, 1.0 / tl.where(b_total > 0, b_total, 1.0), 0.0)

    o_l = i_row * COLUMNS + i_first + o_patch
    p_row = p_prior + i_sample * (PRIOR_ROWS * L) + o_l
    tl.store(p_row + SCALE * L, b_scale, mask=m_patch)
    tl.store(p_row + MASS * L, b_inside * b_scale, mask=m_patch)
    if POWER == 0:
        tl.store(p_row + PEAK * L, b_peak, mask=m_patch)
    o_count = i_sample * (L * STRIDE) + o_l[:, None] * STRIDE + o_bin[None, :]
    tl.store(
        p_counts + o_count, b_counts.to(p_counts.dtype.element_ty), mask=m_patch[:, None] & (o_bin < STRIDE)[None, :]
    )


def power_mode(gamma: float) -> int:
    """POWER of the kernels: gamma itself where it takes at most two products, else 0."""
    return int(gamma) if gamma in (1, 2, 3) else 0


@functools.lru_cache(maxsize=64)
def power_table(gamma: float, pixels: int, device: torch.device) -> Tensor:
    """``gamma log2(n / pixels)`` for n of 0 .. pixels, float32; -inf for n = 0, or 0 with gamma 0 (0^0 = 1).

    Made on the device, so that nothing waits for a copy, and kept.
    """
    if gamma == 0:
        return torch.zeros(pixels + 1, device=device)
    counts = torch.arange(pixels + 1, dtype=torch.float64, device=device)
    return ((counts / pixels).log2() * min(gamma, _GAMMA_LIMIT)).float()


def row_stride(patches: int) -> int:
    """Elements from one row of counts or cosines to the next: ``patches`` rounded up to 16."""
    return -(-patches // 16) * 16


def patches_of(shape: tuple[int, int], patch_size: int) -> int:
    """Number of patches of a picture of height x width pixels."""
    return (shape[0] // patch_size) * (shape[1] // patch_size)


def empty_outputs(
    like: Tensor, batch: int, shape: tuple[int, int], target_shape: tuple[int, int], patch_size: int, gamma: float
) -> tuple[Tensor, Tensor]:
    """Counts [batch, L, S] and prior rows [batch, 2 or 3, L] of one direction, unwritten."""
    patches, stride = patches_of(shape, patch_size), row_stride(patches_of(target_shape, patch_size))
    dtype = torch.uint8 if patch_size**2 <= 256 else torch.int16
    rows = 2 if power_mode(gamma) else 3
    counts = like.new_empty(batch, patches, stride, dtype=dtype)
    return counts, like.new_empty(batch, rows, patches, dtype=torch.float32)


def patch_overlap_fwd(
    table: Tensor,
    counts: Tensor,
    prior: Tensor,
    target_shape: tuple[int, int],
    patch_size: int,
    gamma: float,
    released: bool,
) -> None:
    """Fill ``counts`` [B, L, S] and ``prior`` [B, 2 or 3, L] of one direction from ``table`` [B, H, W]; one launch."""
    batch, height, width = table.shape
    columns = width // patch_size
    bins = max(64, next_power_of_2(patches_of(target_shape, patch_size)))
    run = max(1, min(_BINS // bins, next_power_of_2(columns)))
    constants: dict[str, Any] = {
        "H": height,
        "W": width,
        "HT": target_shape[0],
        "WT": target_shape[1],
        "PATCH": patch_size,
        "STRIDE": counts.shape[2],
        "RUN": run,
        "MP": bins,
        "POWER": power_mode(gamma),
        "RELEASED": released,
    }
    arguments = {
        "p_table": table,
        "p_power": prior if power_mode(gamma) else power_table(gamma, patch_size**2, table.device),
        "p_counts": counts,
        "p_prior": prior,
    }
    programs = (height // patch_size) * -(-columns // run)
    launch(_patch_overlap_kernel, (programs, batch), arguments, constants, warps=_WARPS, stages=1)


@torch.library.custom_op("copynce::patch_overlap", mutates_args=())
def patch_overlap(
    table: Tensor, target_height: int, target_width: int, patch_size: int, gamma: float, released: bool
) -> tuple[Tensor, Tensor]:
    """Counts uint8 (int16 for patches of more than 256 pixels) [B, L, S] and prior rows float32 [B, 2 or 3, L].

    ``table`` [B, H, W]: int32 pixel index in the other picture of target_height x target_width pixels, or -1; any other
    entry counts as no source. ``gamma``, ``released``: the prior's form, as in the twin. M is at most 4096.
    """
    shape, target_shape = (table.shape[1], table.shape[2]), (target_height, target_width)
    counts, prior = empty_outputs(table, len(table), shape, target_shape, patch_size, gamma)
    if counts.numel():
        patch_overlap_fwd(table.contiguous(), counts, prior, target_shape, patch_size, gamma, released)
    return counts, prior


@patch_overlap.register_fake
def _(
    table: Tensor, target_height: int, target_width: int, patch_size: int, gamma: float, released: bool
) -> tuple[Tensor, Tensor]:
    shape, target_shape = (table.shape[1], table.shape[2]), (target_height, target_width)
    return empty_outputs(table, table.shape[0], shape, target_shape, patch_size, gamma)
