"""The rules of the released tables (PROTOCOLS 7): integer positions, truncation towards zero, rounding at use.

The released code moves whole tables; a step here says, for every output pixel, which input pixel it takes, so that a
chain of steps gathers. The numbers are the same. It has no centre offset anywhere: a matrix acts on integer pixel
positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from copynce.pixtrace.edits.base import Edit, Size
from copynce.pixtrace.edits.geometry import Affine, Crop, HorizontalFlip, Pad, Perspective, Resize, VerticalFlip
from copynce.pixtrace.edits.layers import Erase, Overlay, PasteOnto, Stamp

Mode = Literal["exact", "released"]


def check_mode(mode: str) -> str:
    """``mode``, if there is such a one; else ``ValueError``."""
    if mode not in ("exact", "released"):
        raise ValueError(f"mode must be 'exact' or 'released', got {mode!r}")
    return mode


def step(edit: Edit, size: Size, single: bool) -> tuple[NDArray[np.int64], bool]:
    """int64 [H, W]: the row-major input pixel that each output pixel takes, or -1; and whether the table stays float32.

    ``size``: (height, width) of the input. ``single``: the table is a float32 array so far, which decides how
    resizing rounds. What is laid on the picture changes nothing. Raises ``ValueError`` for an edit that the released
    tables do not know.
    """
    if type(edit) not in _RULES:
        raise ValueError(
            f"mode='released' has no table for {type(edit).__name__}: the released code does not know this edit"
        )
    out = edit.output_size(*size)
    return _RULES[type(edit)](edit, size, out, single), single and type(edit) in _STAY_SINGLE


def gather(index: NDArray[np.int64], table: NDArray[np.int32]) -> NDArray[np.int32]:
    """``table`` (int32, any shape) at ``index``, -1 where that is -1."""
    return np.where(index < 0, -1, table.reshape(-1)[index]).astype(np.int32)


def positions(coordinates: NDArray[np.int32], source: Size, grid: Size, single: bool) -> NDArray[Any]:
    """float [2, H, W]: (y, x) source pixels scaled to the grid; the -1 of an untraced pixel is scaled with them."""
    scaled: NDArray[Any] = coordinates.astype(np.float32 if single else np.float64)
    scaled[0] *= grid[0] / source[0]
    scaled[1] *= grid[1] / source[1]
    return scaled


def rounded(positions: NDArray[Any], grid: Size) -> NDArray[np.int32]:
    """int32 [H, W]: row-major grid pixel nearest to each position (half to even), -1 unless inside before and after."""
    nearest = np.rint(positions)
    inside = (positions >= 0).all(axis=0) & (nearest[0] < grid[0]) & (nearest[1] < grid[1])
    return np.where(inside, nearest[0] * grid[1] + nearest[1], -1).astype(np.int32)


def _grid(rows: NDArray[np.int64], columns: NDArray[np.int64], size: Size) -> NDArray[np.int64]:
    """The input pixels of a map that treats rows and columns apart."""
    height, width = size
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    return np.where(inside, rows[:, None] * width + columns, -1)


def _nearest(out: int, size: int, single: bool) -> NDArray[np.int64]:
    """The input index of each output index of a nearest-neighbour resize, floor(index * size / out).

    PyTorch multiplies by the quotient in the table's precision; in float64 that is the exact floor for usual sizes.
    """
    if single:
        step = np.float32(size) / np.float32(out)
        found = np.floor(np.arange(out).astype(np.float32) * step).astype(np.int64)
    else:
        found = np.arange(out, dtype=np.int64) * size // out
    return np.minimum(found, size - 1)


def _stay(edit: Edit, size: Size, out: Size, single: bool) -> NDArray[np.int64]:
    return _grid(np.arange(size[0]), np.arange(size[1]), size)


def _crop(edit: Crop, size: Size, out: Size, single: bool) -> NDArray[np.int64]:
    return _grid(np.arange(out[0]) + edit.top, np.arange(out[1]) + edit.left, size)


def _resize(edit: Resize, size: Size, out: Size, single: bool) -> NDArray[np.int64]:
    return _grid(_nearest(out[0], size[0], single), _nearest(out[1], size[1], single), size)


def _surround(edit: Pad | PasteOnto, size: Size, out: Size, single: bool) -> NDArray[np.int64]:
    return _grid(np.arange(out[0]) - edit.top, np.arange(out[1]) - edit.left, size)


def _mirror_columns(edit: Edit, size: Size, out: Size, single: bool) -> NDArray[np.int64]:
    return _grid(np.arange(size[0]), size[1] - 1 - np.arange(size[1]), size)


def _mirror_rows(edit: Edit, size: Size, out: Size, single: bool) -> NDArray[np.int64]:
    return _grid(size[0] - 1 - np.arange(size[0]), np.arange(size[1]), size)


def _warp(edit: Affine | Perspective, size: Size, out: Size, single: bool) -> NDArray[np.int64]:
    """The input pixels under the inverse map of integer positions, truncated towards zero."""
    inverse = np.linalg.inv(np.array(edit.matrix))
    height, width = size
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    points = inverse @ np.stack([x, y, np.ones_like(x)]).astype(np.float64)
    depth = points[2]
    far = np.isclose(depth, 0.0)
    column, row = np.where(far, -1.0, points[:2]) / np.where(far, 1.0, depth)
    column, row = column.astype(np.int64), row.astype(np.int64)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return np.where(inside, row * width + column, -1).reshape(height, width)


#: The edits that the released code knows, a closed set: (edit, size, size after it, single) to the input pixels.
_RULES: dict[type[Edit], Callable[..., NDArray[np.int64]]] = {
    Crop: _crop,
    Resize: _resize,
    Pad: _surround,
    PasteOnto: _surround,
    HorizontalFlip: _mirror_columns,
    VerticalFlip: _mirror_rows,
    Affine: _warp,
    Perspective: _warp,
    Overlay: _stay,
    Erase: _stay,
    Stamp: _stay,
}
#: The edits after which a float32 table is one still; all others make it float64.
_STAY_SINGLE = {Crop, Resize, Pad, Overlay, Erase, Stamp}
