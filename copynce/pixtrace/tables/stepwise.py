"""One absolute edit at a time, in plain NumPy: Definition 1 at pixel centres, the twin of the composed way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from copynce.pixtrace.bitmaps import mask_of
from copynce.pixtrace.compiled.maps import TIE
from copynce.pixtrace.edits.base import Cover, Edit, Matrix, Size
from copynce.pixtrace.edits.dense import Remap


def moved_map(forward: Matrix | None, edit: Edit, size: Size) -> Matrix | None:
    """``forward`` after the edit of a picture of ``size``; None once no single map says where points go."""
    if forward is None or isinstance(edit, Remap):
        return None
    matrix = edit.forward(*size)
    return forward if matrix is None else np.array(matrix).reshape(3, 3) @ forward


def step(edit: Edit, size: Size) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """One absolute edit of a picture of ``size``.

    Returns int64 [H, W], the row-major input pixel of every output pixel or -1, and the weight (of 255) that the
    picture keeps there: 255 where nothing is laid over it.
    """
    height, width = size
    out_height, out_width = edit.output_size(height, width)
    y, x = np.mgrid[:out_height, :out_width] + 0.5
    inside = np.ones((out_height, out_width), bool)
    matrix = edit.forward(height, width)
    if matrix is not None:
        back = np.linalg.inv(np.array(matrix).reshape(3, 3))
        points = back @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
        inside = (points[2] > 0).reshape(x.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y = (points[:2] / points[2]).reshape(2, *x.shape)
    elif isinstance(edit, Remap):
        x, y = edit.field[..., 0].astype(np.float64), edit.field[..., 1].astype(np.float64)
    column, row = np.floor(x + TIE), np.floor(y + TIE)
    inside &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = np.where(inside, row * width + column, -1).astype(np.int64)
    weight = np.full((out_height, out_width), 255.0)
    cover = edit.cover(height, width)
    if cover is not None and cover.beneath:
        # The picture lies on what the edit brings: all of it, or what the mask cuts out, shows at one weight.
        weight[:] = round(255 * cover.keep)
        index = np.where(_shape_of(cover).reshape(-1)[index], index, -1)
    elif cover is not None:
        left, top, right, bottom = cover.box
        weight[top:bottom, left:right][_shape_of(cover)] = round(255 * cover.keep)
    return index, weight


def _shape_of(cover: Cover) -> NDArray[np.bool_]:
    """bool [height, width] of the cover's box: where it covers, a pixel by the bit that its centre falls on."""
    left, top, right, bottom = cover.box
    height, width = bottom - top, right - left
    if cover.bits is None:
        return np.ones((height, width), bool)
    bits = mask_of(cover.bits)
    rows = ((2 * np.arange(height) + 1) * bits.shape[0]) // (2 * height)
    columns = ((2 * np.arange(width) + 1) * bits.shape[1]) // (2 * width)
    return bits[rows][:, columns] != 0
