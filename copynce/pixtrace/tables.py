"""Coordinate tables (Definition 1 of the paper): where each pixel of an edited picture came from.

A :class:`CoordinateTable` is the dictionary T of the paper in array form: ``T[c]`` is :meth:`CoordinateTable.coordinates`
or ``index`` itself, ``F(T)`` for an edit F is :meth:`CoordinateTable.update`, ``T^-1`` is :meth:`CoordinateTable.reverse`.
:func:`trace` composes the whole chain first and touches each output pixel once; :func:`trace_stepwise` follows the
definition edit by edit at the source's resolution and is its obvious twin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from copynce.pixtrace import kernels
from copynce.pixtrace.compose import LEAST_SOURCE_WEIGHT, RenderPlan, compose
from copynce.pixtrace.edits import Edit, Erase, Geometry, Matrix, Overlay, PasteOnto, Photometric, Size


@dataclass(frozen=True)
class CoordinateTable:
    """For each pixel of a view, the pixel of the source grid that its centre came from.

    ``index`` int32 [H, W]: ``y * grid_width + x`` in the source grid, -1 where nothing of the source shows.
    ``grid_shape``: (height, width) of the source grid. ``forward`` float64 [3, 3] maps grid points to view points if the
    whole chain is one projective map (then reversal and bridging leave no holes), else None.
    """

    index: np.ndarray
    grid_shape: Size
    forward: Matrix | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.index, np.ndarray) or self.index.ndim != 2 or self.index.dtype != np.int32:
            found = getattr(self.index, "dtype", type(self.index).__name__), getattr(self.index, "shape", None)
            raise TypeError(f"index must be an int32 array [H, W], got {found[0]} {found[1]}")
        if not self.index.flags.c_contiguous:
            object.__setattr__(self, "index", np.ascontiguousarray(self.index))
        cells = self.grid_shape[0] * self.grid_shape[1]
        if self.index.size and not (-1 <= self.index.min() and self.index.max() < cells):
            raise ValueError(
                f"index must lie in [-1, {cells}) for a grid of {self.grid_shape}, "
                f"got {int(self.index.min())} to {int(self.index.max())}"
            )

    @classmethod
    def identity(cls, shape: Size) -> CoordinateTable:
        """T0: every pixel of a (height, width) grid comes from itself."""
        return cls(np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape), shape, np.eye(3))

    @property
    def shape(self) -> Size:
        """(height, width) of the view."""
        return self.index.shape[0], self.index.shape[1]

    def coordinates(self) -> np.ndarray:
        """int32 [2, H, W]: T[c] as (y, x) in the source grid, (-1, -1) where nothing of the source shows."""
        y, x = np.divmod(self.index, np.int32(self.grid_shape[1]))
        hidden = self.index < 0
        return np.stack([np.where(hidden, -1, y), np.where(hidden, -1, x)]).astype(np.int32)

    def reverse(self) -> CoordinateTable:
        """T^-1: for each grid pixel, the view pixel that shows it, or -1.

        Through the forward map where there is one: centre of the grid pixel, floor, and the view must show the source
        there. Otherwise by scattering: of several view pixels that came from one grid pixel the last in raster order wins.
        """
        out = np.full(self.grid_shape, -1, np.int32)
        if self.forward is None:
            kernels.scatter(self.index, out.reshape(-1))
            return CoordinateTable(out, self.shape)
        kernels.project(self.forward, self.index, False, self.index, out)
        return CoordinateTable(out, self.shape, np.linalg.inv(self.forward))

    def then(self, other: CoordinateTable) -> CoordinateTable:
        """Where each pixel came from one source further back: ``other[self[c]]``.

        ``other`` must be a table of the picture that ``self`` leads to, of this table's grid size.
        """
        if other.shape != self.grid_shape:
            raise ValueError(f"other must be a table of the {self.grid_shape} grid that this one leads to, got {other.shape}")
        out = np.empty(self.shape, np.int32)
        kernels.gather(self.index, other.index.reshape(-1), out)
        forward = None if self.forward is None or other.forward is None else self.forward @ other.forward
        return CoordinateTable(out, other.grid_shape, forward)

    def update(self, edit: Edit) -> CoordinateTable:
        """F(T): the table after one more concrete edit of the view (nearest neighbour, at pixel centres)."""
        height, width = self.shape
        size = edit.output_size(height, width)
        if isinstance(edit, Photometric):
            return self
        if isinstance(edit, Geometry):
            matrix = edit.matrix_for(height, width)
            out = np.empty(size, np.int32)
            kernels.project(np.linalg.inv(matrix), out, False, np.zeros_like(self.index), out)
            kernels.gather(out.copy(), self.index.reshape(-1), out)
            return CoordinateTable(out, self.grid_shape, None if self.forward is None else matrix @ self.forward)
        out = self.index
        forward = self.forward
        if isinstance(edit, PasteOnto):
            out = np.full(size, -1, np.int32)
            if 255 * edit.opacity >= LEAST_SOURCE_WEIGHT:
                out[edit.top : edit.top + height, edit.left : edit.left + width] = self.index
            if forward is not None:
                forward = np.array([[1.0, 0.0, edit.left], [0.0, 1.0, edit.top], [0.0, 0.0, 1.0]]) @ forward
        elif isinstance(edit, Erase) or (isinstance(edit, Overlay) and 255 * (1 - edit.opacity) < LEAST_SOURCE_WEIGHT):
            out = self.index.copy()
            out[edit.top : edit.top + edit.height, edit.left : edit.left + edit.width] = -1
        return CoordinateTable(out, self.grid_shape, forward)


def trace(edits: Iterable[Edit], source_shape: Size, grid: Size = (224, 224), *, fused: bool = True) -> CoordinateTable:
    """The table of a chain of edits on a picture of ``source_shape`` (height, width) pixels.

    ``grid`` is the source grid that the table leads to: the source scaled to the model's input. The table has the size of
    the picture after the last edit. ``fused=False`` runs :func:`trace_stepwise`, the twin.
    """
    if not fused:
        return trace_stepwise(edits, source_shape, grid)
    plan = compose(edits, source_shape, grid)
    return trace_plan(plan, grid)


def trace_plan(plan: RenderPlan, grid: Size) -> CoordinateTable:
    """The table of a composed view."""
    index = np.empty(plan.output_shape, np.int32)
    forward = plan.trace(grid, index)
    return CoordinateTable(index, grid, forward)


def trace_stepwise(edits: Iterable[Edit], source_shape: Size, grid: Size = (224, 224)) -> CoordinateTable:
    """Definition 1, literally: T0 at the source's resolution, one update per edit, scaled to the grid in the end."""
    table = CoordinateTable.identity(source_shape)
    for edit in edits:
        for concrete in edit.at(*table.shape, grid):
            table = table.update(concrete)
    y, x = table.coordinates()
    # The grid pixel in which the source pixel's centre lies.
    rows = ((2 * np.arange(source_shape[0]) + 1) * grid[0]) // (2 * source_shape[0])
    columns = ((2 * np.arange(source_shape[1]) + 1) * grid[1]) // (2 * source_shape[1])
    index = np.where(y < 0, -1, rows[y] * grid[1] + columns[x]).astype(np.int32)
    scaled = np.diag([source_shape[1] / grid[1], source_shape[0] / grid[0], 1.0])
    return CoordinateTable(index, grid, None if table.forward is None else table.forward @ scaled)


def bridge(query_table: CoordinateTable, reference_table: CoordinateTable) -> CoordinateTable:
    """q -> r through the source that both views copy; :meth:`CoordinateTable.reverse` of it is r -> q.

    With projective tables each query centre is mapped through the composed map (no holes, no rounding in between) and
    kept if both views show the source there; otherwise ``query_table.then(reference_table.reverse())``.
    """
    if query_table.grid_shape != reference_table.grid_shape:
        raise ValueError(
            "query_table and reference_table must lead to the same source grid, "
            f"got {query_table.grid_shape} and {reference_table.grid_shape}"
        )
    if query_table.forward is None or reference_table.forward is None:
        return query_table.then(reference_table.reverse())
    matrix = reference_table.forward @ np.linalg.inv(query_table.forward)
    out = np.empty(query_table.shape, np.int32)
    kernels.project(np.ascontiguousarray(matrix), query_table.index, True, reference_table.index, out)
    return CoordinateTable(out, reference_table.shape, np.linalg.inv(matrix))


def patch_overlap(table: CoordinateTable, patch_size: int = 16) -> np.ndarray:
    """float32 [Lq, Lr] (eq. 4): share of view patch i's pixels whose source lies in grid patch j; rows sum to <= 1."""
    (height, width), (grid_height, grid_width) = table.shape, table.grid_shape
    if patch_size < 1 or any(side % patch_size for side in (height, width, grid_height, grid_width)):
        raise ValueError(
            f"patch_size must divide the view {table.shape} and the grid {table.grid_shape}, got {patch_size}"
        )
    rows = (height // patch_size) * (width // patch_size)
    columns = (grid_height // patch_size) * (grid_width // patch_size)
    counts = np.zeros((rows, columns), np.int32)
    kernels.count_overlap(table.index, patch_size, grid_width, counts)
    return counts.astype(np.float32) / np.float32(patch_size * patch_size)


def trace_pairs(
    plans: Sequence[tuple[RenderPlan, RenderPlan] | None],
    grid: Size,
    query_to_reference: np.ndarray,
    reference_to_query: np.ndarray,
) -> None:
    """Fill int32 [B, H, W] tables of both directions for a batch of (query plan, reference plan); None gives all -1."""
    for i, plan in enumerate(plans):
        if plan is None:
            query_to_reference[i] = -1
            reference_to_query[i] = -1
            continue
        query = trace_plan(plan[0], grid)
        reference = CoordinateTable.identity(grid) if plan[1].plain else trace_plan(plan[1], grid)
        bridged = query if plan[1].plain else bridge(query, reference)
        query_to_reference[i] = bridged.index
        reference_to_query[i] = bridged.reverse().index


