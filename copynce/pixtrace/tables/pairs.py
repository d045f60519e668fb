"""Tables of a whole batch of pairs in one compiled call, shared out among threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

import copynce.pixtrace.compiled.tracing as tracing
from copynce.pixtrace.compiled.tracing import PAIR_SIZE
from copynce.pixtrace.edits.base import Size
from copynce.pixtrace.tables.table import bridge
from copynce.pixtrace.tables.trace import trace_view
from copynce.pixtrace.view.composed_view import ComposedView

#: Pairs that a thread takes at once: few enough that threads end together, enough that taking them costs nothing.
_RUN = 4


def trace_pairs(
    views: Sequence[tuple[ComposedView, ComposedView] | None],
    grid: Size,
    query_to_reference: NDArray[np.int32],
    reference_to_query: NDArray[np.int32],
    *,
    threads: int = 1,
) -> None:
    """Fill int32 [B, H, W] tables of both directions for a batch of (query view, reference view); None gives all -1.

    Equal to ``bridge`` of the two traced views in both directions. The work releases the GIL and allocates nothing per
    pair; the caller and ``threads - 1`` plain threads (started here, gone on return, so safe beside forks and other
    thread pools) deal the pairs out among them. The result does not depend on their number.
    """
    shape = (len(views), *grid)
    for name, array in (("query_to_reference", query_to_reference), ("reference_to_query", reference_to_query)):
        if array.shape != shape or array.dtype != np.int32 or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be a contiguous int32 array {list(shape)}, got {array.dtype} {array.shape}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    codes, bits, starts, dense = _pack(views, grid)
    runs = deque(range(0, len(views), _RUN))

    def work() -> None:
        """Take the next run of pairs until none is left: pairs differ in cost, and cores in what else they do."""
        spare = np.empty((2, *grid), np.int32)
        while runs:
            try:
                first = runs.popleft()
            except IndexError:  # another thread took the last one
                return
            end = min(first + _RUN, len(views))
            tracing.trace_pairs(
                codes, bits, starts, first, end, *grid, query_to_reference, reference_to_query, spare
            )  # fmt: skip
            # The compiled call has filled those of dense maps with -1.
            for i in range(first, end):
                pair = views[i]
                if pair is not None and i in dense:
                    _trace_pair(*pair, grid, query_to_reference[i], reference_to_query[i])

    threads = min(threads, max(len(runs), 1))
    if threads == 1:
        work()
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        done = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for future in done:
            future.result()


def _pack(
    views: Sequence[tuple[ComposedView, ComposedView] | None], grid: Size
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.int64], set[int]]:
    """Codes and bitmaps of all views, one after the other; where each pair's are; and the pairs of dense maps."""
    codes: list[NDArray[np.float64]] = [np.empty((0, 3))]
    bits: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)]
    starts = np.full((len(views), PAIR_SIZE), -1, np.int64)
    row = bit = 0
    dense: set[int] = set()
    for i, pair in enumerate(views):
        if pair is None:
            continue
        query, reference = pair
        if query.output_shape != grid or reference.output_shape != grid:
            raise ValueError(
                f"both views of pair {i} must be of the size of the grid {grid}, "
                f"got {query.output_shape} and {reference.output_shape}"
            )
        if query.below is not None or reference.below is not None:
            dense.add(i)
            continue
        middle = row + len(query.code)
        end = middle + len(reference.code)
        starts[i] = row, middle, middle, end, bit, bit + query.bits.size  # QUERY_CODE to REFERENCE_BITS
        codes += (query.code, reference.code)
        bits += (query.bits, reference.bits)
        row = end
        bit += query.bits.size + reference.bits.size
    return np.concatenate(codes), np.concatenate(bits), starts, dense


def _trace_pair(
    query: ComposedView,
    reference: ComposedView,
    grid: Size,
    query_to_reference: NDArray[np.int32],
    reference_to_query: NDArray[np.int32],
) -> None:
    """Both tables of one pair, for views that the compiled call cannot trace: those of dense maps."""
    query_table, reference_table = trace_view(query, grid), trace_view(reference, grid)
    query_to_reference[:] = bridge(query_table, reference_table).index
    reference_to_query[:] = bridge(reference_table, query_table).index
