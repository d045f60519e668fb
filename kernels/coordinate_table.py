"""Coordinate table of a projective map from its 3x3 matrix, in integers: equal to the twin's bit for bit.

``coordinate_table_reference`` holds the equation. The quotient is estimated in float32 and then put right by its
remainder in int64; a fused multiply-add, an approximate division or another rounding of a device cannot change a tie.

Shapes: B pairs, H x W pixels of the table. Cost: O(B H W) arithmetic, 4 B H W bytes written, nothing read but M.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers and constants to Triton; their dtypes and shapes stand beside them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coordinate_table_reference import fixed_point_matrix
from .launch import launch

_BLOCK = 1024  # pixels of a program: 4 a thread keep the int64 temporaries in registers, 8 blocks or more fill an SM


@triton.jit
def _floor_quotient(b_number, b_depth, LIMIT: tl.constexpr):
    """floor(number / depth) in [0, LIMIT), or -1 outside of it; int64 numbers, depth > 0."""
    # The estimate errs by less than 1 below 2^20: relative errors of three roundings are below 2^-21.
    b_estimate = b_number.to(tl.float32) / b_depth.to(tl.float32)
    b_estimate = tl.minimum(tl.maximum(b_estimate, -2.0), LIMIT + 2.0)
    b_quotient = tl.floor(b_estimate).to(tl.int64)
    b_rest = b_number - b_quotient * b_depth
    b_quotient = b_quotient - (b_rest < 0).to(tl.int64) + (b_rest >= b_depth).to(tl.int64)
    # Outside of the clamped range one correction is not enough, but it stays outside of [0, LIMIT).
    return tl.where((b_quotient >= 0) & (b_quotient < LIMIT), b_quotient, -1).to(tl.int32)


@triton.jit
def project(
    p_matrix,  # [3, 3] int64: fixed point, of one pair
    o_y,  # int32: rows of the pixels
    o_x,  # int32: columns of the pixels, broadcastable with o_y
    SOURCE_HEIGHT: tl.constexpr,
    SOURCE_WIDTH: tl.constexpr,
):
    """Table entries int32 of the pixels (o_y, o_x)."""
    o_x2 = o_x.to(tl.int64) * 2 + 1
    o_y2 = o_y.to(tl.int64) * 2 + 1
    b_x = tl.load(p_matrix + 0) * o_x2 + tl.load(p_matrix + 1) * o_y2 + 2 * tl.load(p_matrix + 2)
    b_y = tl.load(p_matrix + 3) * o_x2 + tl.load(p_matrix + 4) * o_y2 + 2 * tl.load(p_matrix + 5)
    b_depth = tl.load(p_matrix + 6) * o_x2 + tl.load(p_matrix + 7) * o_y2 + 2 * tl.load(p_matrix + 8)
    m_front = b_depth > 0
    b_depth = tl.where(m_front, b_depth, 1)
    b_column = _floor_quotient(b_x, b_depth, SOURCE_WIDTH)
    b_line = _floor_quotient(b_y, b_depth, SOURCE_HEIGHT)
    return tl.where(m_front & (b_column >= 0) & (b_line >= 0), b_line * SOURCE_WIDTH + b_column, -1)


@triton.jit
def _coordinate_table_kernel(
    p_matrix,  # [B, 3, 3] int64: fixed point, picture to source
    p_table,  # [B, HEIGHT, WIDTH] int32: out, row-major index in the source or -1
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCE_HEIGHT: tl.constexpr,
    SOURCE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sample = tl.program_id(1).to(tl.int64)
    o_pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_entry = project(p_matrix + i_sample * 9, o_pixel // WIDTH, o_pixel % WIDTH, SOURCE_HEIGHT, SOURCE_WIDTH)
    tl.store(p_table + i_sample * (HEIGHT * WIDTH) + o_pixel, b_entry, mask=o_pixel < HEIGHT * WIDTH)


def coordinate_table_fwd(matrix: Tensor, table: Tensor, source_shape: tuple[int, int]) -> None:
    """Fill ``table`` int32 [B, H, W] from ``matrix`` [B, 3, 3] int64 in fixed point; one launch."""
    batch, height, width = table.shape
    launch(
        _coordinate_table_kernel,
        (triton.cdiv(height * width, _BLOCK), batch),
        {"p_matrix": matrix, "p_table": table},
        {
            "HEIGHT": height,
            "WIDTH": width,
            "SOURCE_HEIGHT": source_shape[0],
            "SOURCE_WIDTH": source_shape[1],
            "BLOCK": _BLOCK,
        },
        warps=8,
        stages=1,
    )


@torch.library.custom_op("copynce::coordinate_table", mutates_args=())
def coordinate_table(matrix: Tensor, height: int, width: int, source_height: int, source_width: int) -> Tensor:
    """Coordinate tables int32 [B, height, width] of the maps ``matrix`` [B, 3, 3] float64; see the twin."""
    table = torch.empty(len(matrix), height, width, dtype=torch.int32, device=matrix.device)
    if table.numel():
        coordinate_table_fwd(fixed_point_matrix(matrix), table, (source_height, source_width))
    return table


@coordinate_table.register_fake
def _(matrix: Tensor, height: int, width: int, source_height: int, source_width: int) -> Tensor:
    return torch.empty(matrix.shape[0], height, width, dtype=torch.int32, device=matrix.device)
