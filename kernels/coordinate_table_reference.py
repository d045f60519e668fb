"""Coordinate table of a projective map, from its 3x3 matrix: the plain PyTorch twin, and the fixed point of both.

For the centre (x + 1/2, y + 1/2) of each pixel and the matrix M from its picture to the source,

    (X, Y, Z) = M (x + 1/2, y + 1/2, 1),    entry = floor(Y / Z) * source width + floor(X / Z)

where Z > 0 and the point lies inside of the source, else -1 (Definition 1 of the paper with F = M; the convention of
pixel centres is DESIGN's). M is rounded to fixed point first: from then on integers decide, so that every device gives
the same table, ties included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FIXED_POINT_BITS = 32


def fixed_point_matrix(matrix: Tensor) -> Tensor:
    """``matrix`` [..., 3, 3] float64 over the largest size in its last row, as int64 multiples of 2^-32.

    Entries so scaled must stay below 2^9 for pictures of up to 1024 pixels (translations: below 2^19): then every
    product and sum is exact in float64 (below 2^53) as in int64.
    """
    largest = matrix[..., 2:, :].abs().amax(-1, keepdim=True)
    return torch.round(matrix / largest * 2.0**FIXED_POINT_BITS).long()


def coordinate_table_reference(matrix: Tensor, shape: Sequence[int], source_shape: Sequence[int]) -> Tensor:
    """Coordinate tables int32 [B, H, W] of the maps ``matrix`` [B, 3, 3] float64, picture to source, both in pixels.

    ``shape``: height and width of the picture (and table); ``source_shape``: those of the source, that entries index.
    """
    (height, width), (source_height, source_width) = shape, source_shape
    fixed = fixed_point_matrix(matrix).double()
    # Twice the centre, so that it is an integer; the last column of M twice as well.
    x = torch.arange(width, device=matrix.device).double() * 2 + 1
    y = torch.arange(height, device=matrix.device).double()[:, None] * 2 + 1
    rows = [
        row[:, 0, None, None] * x + row[:, 1, None, None] * y + 2 * row[:, 2, None, None] for row in fixed.unbind(1)
    ]
    depth = torch.where(rows[2] > 0, rows[2], 1)
    column, line = (torch.floor(row / depth) for row in rows[:2])
    inside = (rows[2] > 0) & (column >= 0) & (column < source_width) & (line >= 0) & (line < source_height)
    return torch.where(inside, line * source_width + column, -1).int()
