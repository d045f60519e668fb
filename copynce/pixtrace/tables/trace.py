"""Tables of chains of edits: composed first and traced in one pass, or edit by edit as Definition 1 says."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from copynce.pixtrace.compiled.spans import LEAST_SOURCE_WEIGHT
from copynce.pixtrace.edits.base import Edit, Photometric, Size, checked_size
from copynce.pixtrace.tables.released import Mode, check_mode
from copynce.pixtrace.tables.stepwise import moved_map, step
from copynce.pixtrace.tables.table import CoordinateTable, trusted_table
from copynce.pixtrace.view.compose import compose
from copynce.pixtrace.view.composed_view import ComposedView


def trace(
    edits: Iterable[Edit],
    source_shape: Size,
    grid: Size = (224, 224),
    mode: Mode = "exact",
    *,
    fused: bool = True,
) -> CoordinateTable:
    """The table of a chain of edits on a picture of ``source_shape`` (height, width) pixels.

    ``grid`` is the source grid that the table leads to: the source scaled to the model's input. The table has the
    size of the picture after the last edit. ``fused=False`` runs :func:`trace_stepwise`, the twin. Raises
    ``ValueError`` naming the edit that does not fit, or that ``mode="released"`` does not know.
    """
    if check_mode(mode) == "released" or not fused:
        return trace_stepwise(edits, source_shape, grid, mode)
    return trace_view(compose(edits, source_shape, grid), grid)


def trace_view(view: ComposedView, grid: Size) -> CoordinateTable:
    """The table of a composed view."""
    index = np.empty(view.output_shape, np.int32)
    forward, bounds = view.trace(grid, index)
    return trusted_table(index, grid, forward, bounds=bounds)


def trace_stepwise(
    edits: Iterable[Edit], source_shape: Size, grid: Size = (224, 224), mode: Mode = "exact"
) -> CoordinateTable:
    """Definition 1, literally: T0 at the source's resolution, one update per edit, scaled to the grid in the end.

    Where an edit shrinks the picture, what follows knows the source only to the shrunken picture's pixels (so does the
    released code); :func:`trace` has no such loss.
    """
    table = CoordinateTable.identity(checked_size(source_shape, "source_shape"), mode)
    shown = np.full(table.shape, 255.0)
    for edit in edits:
        for absolute in edit.absolute(*table.shape, grid):
            if isinstance(absolute, Photometric):
                continue
            if mode == "exact":
                index, weight = step(absolute, table.shape)
                shown = np.where(index < 0, 0.0, shown.reshape(-1)[index]) * weight / 255.0
                moved = np.where(index < 0, -1, table.index.reshape(-1)[index]).astype(np.int32)
                table = trusted_table(moved, table.grid_shape, moved_map(table.forward, absolute, table.shape))
            else:
                table = table.update(absolute)
    if mode == "exact":
        table.index[shown < LEAST_SOURCE_WEIGHT - 0.5] = -1
    return table.on_grid(grid)
