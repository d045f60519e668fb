"""Coordinate tables (Definition 1 of the paper): where each pixel of an edited picture came from.

A :class:`CoordinateTable` is the dictionary T of the paper in array form: ``T[c]`` is
:meth:`CoordinateTable.coordinates` or ``index`` itself, ``F(T)`` for an edit F is :meth:`CoordinateTable.update`,
``T^-1`` is :meth:`CoordinateTable.reverse`. All three hold in both modes:

* ``"exact"``: edits map the centres of pixels, sources are rounded down, a pixel that something covers is no copy
  (:mod:`copynce.pixtrace.tables.stepwise`, and composed :func:`copynce.pixtrace.trace`).
* ``"released"``: what the released code computes, to the bit, with its truncation towards zero, its integer pixel
  positions and the holes of its reverse tables (:mod:`copynce.pixtrace.tables.released`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import copynce.pixtrace.compiled.counting as counting
import copynce.pixtrace.compiled.tracing as tracing
import copynce.pixtrace.tables.released as released
from copynce.pixtrace.compiled.spans import LEAST_SOURCE_WEIGHT
from copynce.pixtrace.edits.base import Edit, Matrix, Photometric, Size, checked_size
from copynce.pixtrace.tables.released import Mode, check_mode
from copynce.pixtrace.tables.stepwise import moved_map, step


@dataclass(frozen=True, eq=False)
class CoordinateTable:
    """For each pixel of a view, the pixel of the source grid that its centre came from.

    ``index`` int32 [H, W]: ``y * grid_width + x`` in the source grid, -1 where nothing of the source shows.
    ``grid_shape``: (height, width) of the source grid. ``forward`` float64 [3, 3] maps grid points to view points if
    the whole chain is one projective map (then reversal and bridging leave no holes), else None. ``mode``: which
    rules :meth:`update` follows; ``single``: the released table is still a float32 array (only "released" looks at
    it). ``bounds``, where known: int64 [H, 2], columns [first, last) of each row outside of which no pixel has a
    source; whoever writes one there into ``index`` must not use the table after it.
    """

    index: NDArray[np.int32]
    grid_shape: Size
    forward: Matrix | None = None
    mode: Mode = "exact"
    single: bool = False
    bounds: NDArray[np.int64] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.index, np.ndarray) or self.index.ndim != 2 or self.index.dtype != np.int32:
            found = getattr(self.index, "dtype", type(self.index).__name__), getattr(self.index, "shape", None)
            raise TypeError(f"index must be an int32 array [H, W], got {found[0]} {found[1]}")
        check_mode(self.mode)
        if not self.index.flags.c_contiguous:
            object.__setattr__(self, "index", np.ascontiguousarray(self.index))
        cells = self.grid_shape[0] * self.grid_shape[1]
        if self.index.size and not (self.index.min() >= -1 and self.index.max() < cells):
            raise ValueError(
                f"index must lie in [-1, {cells}) for a grid of {self.grid_shape}, "
                f"got {int(self.index.min())} to {int(self.index.max())}"
            )

    @classmethod
    def identity(cls, shape: Size, mode: Mode = "exact") -> CoordinateTable:
        """T0: every pixel of a (height, width) grid comes from itself."""
        height, width = checked_size(shape, "shape")
        index = np.arange(height * width, dtype=np.int32).reshape(height, width)
        exact = check_mode(mode) == "exact"
        return trusted_table(index, (height, width), np.eye(3) if exact else None, mode, not exact)

    @property
    def shape(self) -> Size:
        """(height, width) of the view."""
        return self.index.shape[0], self.index.shape[1]

    def _bounds(self) -> NDArray[np.int64]:
        if self.bounds is not None:
            return self.bounds
        found = np.empty((self.shape[0], 2), np.int64)
        tracing.bounds_of(self.index, found)
        return found

    def coordinates(self) -> NDArray[np.int32]:
        """int32 [2, H, W]: T[c] as (y, x) in the source grid, (-1, -1) where nothing of the source shows."""
        y, x = np.divmod(self.index, np.int32(self.grid_shape[1]))
        hidden = self.index < 0
        return np.stack([np.where(hidden, -1, y), np.where(hidden, -1, x)]).astype(np.int32)

    def reverse(self) -> CoordinateTable:
        """T^-1: for each grid pixel, the view pixel that shows it, or -1.

        Through the forward map where there is one: centre of the grid pixel, floor, and the view must show the source
        there. Otherwise by scattering: of several view pixels that came from one grid pixel the last in raster order
        wins.
        """
        height, width = self.grid_shape
        if self.forward is None:
            cells = np.empty(height * width + 1, np.int32)
            tracing.scatter(self.index, cells)
            return trusted_table(cells[1:].reshape(height, width), self.shape, None, self.mode)
        out, bounds, forward = _new(self.grid_shape)
        tracing.reverse(self.forward, self.index, self._bounds(), out, bounds, forward)
        return trusted_table(out, self.shape, forward, bounds=bounds)

    def then(self, other: CoordinateTable) -> CoordinateTable:
        """Where each pixel came from one source further back: ``other[self[c]]``.

        ``other`` must be a table of the picture that ``self`` leads to, of this table's grid size.
        """
        if other.shape != self.grid_shape:
            raise ValueError(
                f"other must be a table of the {self.grid_shape} grid that this one leads to, got {other.shape}"
            )
        out = np.empty(self.shape, np.int32)
        tracing.gather(self.index, other.index.reshape(-1), out)
        forward = None if self.forward is None or other.forward is None else self.forward @ other.forward
        return trusted_table(out, other.grid_shape, forward, self.mode)

    def update(self, edit: Edit) -> CoordinateTable:
        """F(T): the table after one more absolute edit of the view, by the rules of :attr:`mode`. Plain NumPy.

        A cover hides by its own opacity here; :func:`trace` also multiplies the opacities of covers that overlap.
        """
        height, width = self.shape
        if isinstance(edit, Photometric):
            return self
        if self.mode == "released":
            index, single = released.step(edit, (height, width), self.single)
            return trusted_table(released.gather(index, self.index), self.grid_shape, None, self.mode, single)
        index, hidden = step(edit, (height, width))
        moved = np.where(index < 0, -1, self.index.reshape(-1)[index]).astype(np.int32)
        moved[hidden < LEAST_SOURCE_WEIGHT] = -1
        return trusted_table(
            np.ascontiguousarray(moved), self.grid_shape, moved_map(self.forward, edit, (height, width))
        )

    def on_grid(self, grid: Size) -> CoordinateTable:
        """The same table, leading to the same source scaled to ``grid`` (height, width).

        "exact": the grid pixel in which the source pixel's centre lies. "released": the position, scaled and
        rounded to the nearest whole number (half to even), -1 if that is outside of the grid.
        """
        height, width = checked_size(grid, "grid")
        if self.mode == "released":
            index = released.rounded(self.positions((height, width)), (height, width))
            return trusted_table(index, (height, width), None, self.mode, self.single)
        y, x = self.coordinates()
        rows = ((2 * np.arange(self.grid_shape[0]) + 1) * height) // (2 * self.grid_shape[0])
        columns = ((2 * np.arange(self.grid_shape[1]) + 1) * width) // (2 * self.grid_shape[1])
        index = np.where(y < 0, -1, rows[y] * width + columns[x]).astype(np.int32)
        scale = np.diag([self.grid_shape[1] / width, self.grid_shape[0] / height, 1.0])
        return trusted_table(index, (height, width), None if self.forward is None else self.forward @ scale)

    def positions(self, grid: Size) -> NDArray[Any]:
        """float [2, H, W]: the released form of the table, (y, x) positions in a grid of (height, width), with
        fractions.

        Rows times height / H0 and columns times width / W0, the -1 of a pixel without source too (any negative number);
        float32 as long as the chain had only crops, resizes and pads, else float64.
        """
        return released.positions(self.coordinates(), self.grid_shape, checked_size(grid, "grid"), self.single)


def bridge(query_table: CoordinateTable, reference_table: CoordinateTable) -> CoordinateTable:
    """q -> r through the source that both views copy; r -> q is ``bridge(reference_table, query_table)``.

    With projective tables each query centre is mapped through the composed map (no holes, no rounding in between) and
    kept if both views show the source there; otherwise ``query_table.then(reference_table.reverse())``, and r -> q is
    the :meth:`CoordinateTable.reverse` of that in the released code.
    """
    if query_table.grid_shape != reference_table.grid_shape:
        raise ValueError(
            "query_table and reference_table must lead to the same source grid, "
            f"got {query_table.grid_shape} and {reference_table.grid_shape}"
        )
    if query_table.mode != reference_table.mode:
        raise ValueError(
            f"query_table and reference_table must have one mode, got {query_table.mode!r} and {reference_table.mode!r}"
        )
    if query_table.forward is None or reference_table.forward is None:
        return query_table.then(reference_table.reverse())
    out, bounds, forward = _new(query_table.shape)
    tracing.bridge(
        query_table.forward, query_table.index, query_table._bounds(),
        reference_table.forward, reference_table.index, reference_table._bounds(), out, bounds, forward,
    )  # fmt: skip
    return trusted_table(out, reference_table.shape, forward, bounds=bounds)


def patch_counts(table: CoordinateTable, patch_size: int = 16, dtype: type = np.uint16) -> NDArray:
    """[Lq, Lr]: how many pixels of view patch i have their source in grid patch j, patches row-major.

    ``dtype`` uint16 or uint8; of the latter 255 stands for 255 and more (a patch of 16 has up to 256).
    """
    (height, width), (grid_height, grid_width) = table.shape, table.grid_shape
    if not 1 <= patch_size <= 255 or any(side % patch_size for side in (height, width, grid_height, grid_width)):
        raise ValueError(
            f"patch_size must divide the view {table.shape} and the grid {table.grid_shape} and be at most 255, "
            f"got {patch_size}"
        )
    patches = (grid_height // patch_size) * (grid_width // patch_size)
    if patches >= 2**16 - 1:
        raise ValueError(f"patch_size {patch_size} gives {patches} patches of the grid {table.grid_shape}, over 65534")
    counts = np.empty(((height // patch_size) * (width // patch_size), patches), np.uint16)
    counting.count_overlap(
        table.index, table._bounds(), patch_size, _patch_numbers(table.grid_shape, patch_size), counts
    )
    if dtype is np.uint16:
        return counts
    if dtype is np.uint8:
        return np.minimum(counts, 255).astype(np.uint8)
    raise TypeError(f"dtype must be numpy.uint16 or numpy.uint8, got {dtype!r}")


def patch_overlap(table: CoordinateTable, patch_size: int = 16) -> NDArray[np.float32]:
    """float32 [Lq, Lr] (eq. 4): part of view patch i's pixels whose source lies in grid patch j; rows sum to <= 1."""
    return patch_counts(table, patch_size) * np.float32(1.0 / (patch_size * patch_size))


def trusted_table(
    index: NDArray[np.int32],
    grid_shape: Size,
    forward: Matrix | None,
    mode: Mode = "exact",
    single: bool = False,
    bounds: NDArray[np.int64] | None = None,
) -> CoordinateTable:
    """A table from our own arrays: reading all of an index to check it would cost as much as tracing it."""
    table = object.__new__(CoordinateTable)
    table.__dict__.update(
        index=index, grid_shape=grid_shape, forward=forward, mode=mode, single=single, bounds=bounds
    )  # fmt: skip
    return table


def _new(shape: Size) -> tuple[NDArray[np.int32], NDArray[np.int64], Matrix]:
    """Index, bounds and map of a table to be filled."""
    return np.empty(shape, np.int32), np.empty((shape[0], 2), np.int64), np.empty((3, 3))


@lru_cache(maxsize=16)
def _patch_numbers(grid: Size, patch_size: int) -> NDArray[np.uint16]:
    """uint16 [1 + cells]: 1 + the patch of each grid pixel, row-major; the first, 0, stands for index -1."""
    height, width = grid
    rows = np.arange(height) // patch_size * (width // patch_size)
    numbers = rows[:, None] + np.arange(width) // patch_size + 1
    return np.concatenate([[0], numbers.reshape(-1)]).astype(np.uint16)
