"""Tables of composed views: traced, reversed, bridged, one at a time or by the batch.

A convex region meets a row in one span of columns, so the loops over pixels test nothing. int32 throughout, so that
they vectorise.
"""

from __future__ import annotations

import math

import numpy as np

from copynce.compiled_cache import njit
from copynce.pixtrace.compiled.maps import OPTIONS, TIE, invert, multiply, pull_row
from copynce.pixtrace.compiled.slots import (
    COVERS,
    FIRST_REGION,
    HIDES_TOGETHER,
    IS_PLAIN,
    KEPT,
    MAP_ROWS,
    is_cut,
    next_region,
)
from copynce.pixtrace.compiled.spans import (
    LEAST_SOURCE_WEIGHT,
    draw_region,
    fade,
    fill,
    new_scratch,
    spans_of,
)

#: Shifts the sign of an int32 over all of its bits: -1 for a negative number, else 0.
_SIGN = np.int32(31)

#: Planes of an outline: both sides of four directions; and one more in front of the viewer.
_OUTLINE_PLANES = 8

# Where the views of a pair begin and end in those of a batch: columns.
QUERY_CODE = 0  #: rows of its code: first, and the one after the last
QUERY_END = 1
REFERENCE_CODE = 2
REFERENCE_END = 3
QUERY_BITS = 4  #: first place of its bitmaps
REFERENCE_BITS = 5
PAIR_SIZE = 6


@njit(**OPTIONS)
def _trace_view(code, bits, grid_height, grid_width, index, bounds, scratch):  # type: ignore[no-untyped-def]
    """Fill ``index`` and ``bounds`` as :func:`trace_view` does."""
    height, width = index.shape
    if code[IS_PLAIN] != 0.0 and height == grid_height and width == grid_width:
        for i in range(height):
            bounds[i, 0] = 0
            bounds[i, 1] = width
            for j in range(width):
                index[i, j] = np.int32(i) * np.int32(width) + np.int32(j)
        return
    _trace_source(code, bits, grid_height, grid_width, index, bounds, scratch)
    if code[HIDES_TOGETHER] != 0.0:
        _hide_what_fades(code, bits, index, scratch)
    else:
        _hide_what_is_covered(code, bits, index, scratch)


@njit(**OPTIONS)
def _trace_source(code, bits, grid_height, grid_width, index, bounds, scratch):  # type: ignore[no-untyped-def]
    """The table of a view as if nothing covered it."""
    height = len(index)
    cut = is_cut(code, FIRST_REGION)
    spans = draw_region(code, FIRST_REGION, bits, scratch)
    bounds[:] = spans
    to_grid = scratch.maps[0]
    invert(code[:MAP_ROWS], to_grid)
    for j in range(3):
        to_grid[0, j] *= grid_width
        to_grid[1, j] *= grid_height
    # Without turn and tilt rows of the view are rows of the grid: a multiple of its width plus the same columns.
    straight = to_grid[0, 1] == 0.0 and to_grid[1, 0] == 0.0 and to_grid[2, 0] == 0.0 and to_grid[2, 1] == 0.0
    columns = scratch.columns
    if straight:
        pull_row(to_grid, 0, 0.5, grid_width, 1, columns)
    for i in range(height):
        y = i + 0.5
        first, last = spans[i]
        index[i, :first] = -1
        index[i, last:] = -1
        row = index[i, first:last]
        if straight:
            v = (to_grid[1, 1] * y + to_grid[1, 2]) / to_grid[2, 2] + TIE
            base = np.int32(min(max(v, 0.0), grid_height - 1.0)) * np.int32(grid_width)
            shown = columns[first:last]
            for j in range(row.size):
                row[j] = base + shown[j]
        else:
            pull_row(to_grid, first, y, grid_width, grid_height, row)
        if cut:
            inside = scratch.drawn[i, first:last]
            for j in range(row.size):
                row[j] = row[j] if inside[j] != 0 else -1


@njit(**OPTIONS)
def _hide_what_is_covered(code, bits, index, scratch):  # type: ignore[no-untyped-def]
    """-1 where a cover hides the source by itself."""
    head = next_region(code, FIRST_REGION)
    for _ in range(int(code[COVERS])):
        if code[head, KEPT] < LEAST_SOURCE_WEIGHT:
            fill(draw_region(code, head, bits, scratch), is_cut(code, head), scratch.drawn, -1, index)
        head = next_region(code, head)


@njit(**OPTIONS)
def _hide_what_fades(code, bits, index, scratch):  # type: ignore[no-untyped-def]
    """-1 where the covers hide the source, by themselves or together; takes weights, and so more time."""
    height, width = index.shape
    weight = scratch.weight
    weight[:] = 255
    head = next_region(code, FIRST_REGION)
    for _ in range(int(code[COVERS])):
        spans = draw_region(code, head, bits, scratch)
        fade(spans, is_cut(code, head), scratch.drawn, int(code[head, KEPT]), weight)
        head = next_region(code, head)
    for i in range(height):
        for j in range(width):
            if weight[i, j] < LEAST_SOURCE_WEIGHT:
                index[i, j] = -1


@njit(**OPTIONS)
def _from_grid(code, grid_height, grid_width, forward):  # type: ignore[no-untyped-def]
    """forward [3, 3] = the map from the grid to the view."""
    for i in range(3):
        forward[i, 0] = code[i, 0] * (1.0 / grid_width)
        forward[i, 1] = code[i, 1] * (1.0 / grid_height)
        forward[i, 2] = code[i, 2]


@njit(
    "void(float64[:, ::1], uint8[::1], int64, int64, int32[:, ::1], int64[:, ::1], float64[:, ::1])",
    **OPTIONS,
)
def trace_view(code, bits, grid_height, grid_width, index, bounds, forward):  # type: ignore[no-untyped-def]
    """index[i, j] = row-major pixel of the source grid that centre (j + 0.5, i + 0.5) of the view shows, or -1.

    ``bounds [H, 2]``: see :func:`bounds_of`. ``forward [3, 3]``: the map from the grid to the view.
    """
    _trace_view(code, bits, grid_height, grid_width, index, bounds, new_scratch(index.shape[0], index.shape[1]))
    _from_grid(code, grid_height, grid_width, forward)


@njit("void(int32[:, ::1], int64[:, ::1])", **OPTIONS)
def bounds_of(index, bounds):  # type: ignore[no-untyped-def]
    """bounds[i] = columns [first, last) outside of which row i of a table holds nothing but -1."""
    height, width = index.shape
    for i in range(height):
        first = 0
        last = width
        while first < last and index[i, first] < 0:
            first += 1
        while first < last and index[i, last - 1] < 0:
            last -= 1
        bounds[i, 0] = first
        bounds[i, 1] = last


@njit(**OPTIONS)
def _outline(bounds, width, planes):  # type: ignore[no-untyped-def]
    """planes [8, 3]: an octagon around all of ``bounds``, one pixel wider but for the picture's borders.

    Eight sides, for what a turned view shows is a lozenge, of which a box would hold twice as much.
    """
    height = len(bounds)
    least = np.full(4, 2**31)  # of the directions x, y, x + y, x - y, at the corners of the pixels
    most = np.full(4, -(2**31))
    for i in range(height):
        first, last = bounds[i]
        if first < last:
            least[0] = min(least[0], first)
            most[0] = max(most[0], last)
            least[1] = min(least[1], i)
            most[1] = max(most[1], i + 1)
            least[2] = min(least[2], first + i)
            most[2] = max(most[2], last + i + 1)
            least[3] = min(least[3], first - i - 1)
            most[3] = max(most[3], last - i)
    for k in range(4):
        x = 0.0 if k == 1 else 1.0
        y = 0.0 if k == 0 else -1.0 if k == 3 else 1.0
        low = least[k] - 1
        high = most[k] + 1
        if k < 2:
            low = max(low, 0)
            high = min(high, height if k == 1 else width)
        planes[2 * k, 0] = x
        planes[2 * k, 1] = y
        planes[2 * k, 2] = -low
        planes[2 * k + 1, 0] = -x
        planes[2 * k + 1, 1] = -y
        planes[2 * k + 1, 2] = high


@njit(**OPTIONS)
def _project(matrix, own, own_bounds, use_own, other, other_bounds, index, bounds, scratch):  # type: ignore[no-untyped-def]
    """index[i, j] = row-major pixel of ``other`` that centre (j + 0.5, i + 0.5) falls on through ``matrix``.

    -1 where it falls outside, behind the viewer or on an ``other`` of -1; with ``use_own`` also where ``own`` is -1.
    """
    height = len(index)
    other_height, other_width = other.shape
    # Only centres are looked up that fall in front of the viewer and near to what the other picture shows.
    planes = scratch.planes
    _outline(other_bounds, other_width, planes)
    front = planes[_OUTLINE_PLANES]
    front[0] = 0.0
    front[1] = 0.0
    front[2] = 1.0
    for k in range(_OUTLINE_PLANES + 1):
        a, b, c = planes[k]
        for j in range(3):
            planes[k, j] = a * matrix[0, j] + b * matrix[1, j] + c * matrix[2, j]
        norm = math.hypot(planes[k, 0], planes[k, 1])
        if norm < 1e-12 * abs(planes[k, 2]) or norm == 0.0:  # no edge in sight
            norm = abs(planes[k, 2])
        for j in range(3):
            planes[k, j] /= norm
    flat = other.reshape(-1)
    spans = spans_of(planes, 0, _OUTLINE_PLANES + 1, scratch)
    for i in range(height):
        first, last = spans[i]
        if use_own:
            first = max(first, own_bounds[i, 0])
            last = max(first, min(last, own_bounds[i, 1]))
        bounds[i, 0] = first
        bounds[i, 1] = last
        index[i, :first] = -1
        index[i, last:] = -1
        row = index[i, first:last]
        pull_row(matrix, first, i + 0.5, other_width, other_height, row)
        # The sign of -1, spread over all bits, makes any index -1: no branch, so the loop vectorises.
        if use_own:
            mine = own[i, first:last]
            for j in range(row.size):
                row[j] |= (mine[j] >> _SIGN) | (flat[np.uint32(row[j])] >> _SIGN)
        else:
            for j in range(row.size):
                row[j] |= flat[np.uint32(row[j])] >> _SIGN


@njit(
    "void(float64[:, ::1], int32[:, ::1], int64[:, ::1], int32[:, ::1], int64[:, ::1], float64[:, ::1])",
    **OPTIONS,
)
def reverse(matrix, other, other_bounds, index, bounds, inverse):  # type: ignore[no-untyped-def]
    """index[i, j] = row-major pixel of ``other`` that centre (j + 0.5, i + 0.5) falls on through ``matrix``.

    -1 where it falls outside, behind the viewer or on an ``other`` of -1. ``other_bounds``, ``bounds``: see
    :func:`bounds_of`; ``inverse`` is that of ``matrix``.
    """
    scratch = new_scratch(index.shape[0], index.shape[1])
    invert(matrix, inverse)
    _project(matrix, index, bounds, False, other, other_bounds, index, bounds, scratch)


@njit(**OPTIONS)
def _bridge(forward, own, own_bounds, other_forward, other, other_bounds, index, bounds, back, scratch):  # type: ignore[no-untyped-def]
    """Fill ``index``, ``bounds`` and ``back`` as :func:`bridge` does."""
    inverse = scratch.maps[1]
    matrix = scratch.maps[2]
    invert(forward, inverse)
    multiply(other_forward, inverse, matrix)
    invert(matrix, back)
    _project(matrix, own, own_bounds, True, other, other_bounds, index, bounds, scratch)


@njit(
    "void(float64[:, ::1], int32[:, ::1], int64[:, ::1], float64[:, ::1], int32[:, ::1], int64[:, ::1], "
    "int32[:, ::1], int64[:, ::1], float64[:, ::1])",
    **OPTIONS,
)
def bridge(forward, own, own_bounds, other_forward, other, other_bounds, index, bounds, back):  # type: ignore[no-untyped-def]
    """index[i, j] = row-major pixel of ``other`` that shows the point of the source that ``own`` shows at [i, j].

    -1 where one of them is. ``forward`` and ``other_forward`` lead from the source to the two, ``back`` from ``other``
    to ``own``; bounds: see :func:`bounds_of`.
    """
    scratch = new_scratch(index.shape[0], index.shape[1])
    _bridge(forward, own, own_bounds, other_forward, other, other_bounds, index, bounds, back, scratch)


@njit("void(int32[:, ::1], int32[::1], int32[:, ::1])", **OPTIONS)
def gather(index, other, out):  # type: ignore[no-untyped-def]
    """out = other[index], -1 where index is -1."""
    height, width = index.shape
    for i in range(height):
        for j in range(width):
            k = index[i, j]
            out[i, j] = other[k] if k >= 0 else -1


@njit("void(int32[:, ::1], int32[::1])", **OPTIONS)
def scatter(index, out):  # type: ignore[no-untyped-def]
    """out[1 + index[i, j]] = i * width + j in raster order: the last of several pixels wins; -1 where no pixel lands.

    ``out`` has one cell more than the grid: the first takes the pixels without a source, which saves a branch per
    pixel.
    """
    out[:] = -1
    flat = index.reshape(-1)
    for k in range(flat.size):
        out[np.uint32(flat[k] + np.int32(1))] = np.int32(k)


@njit(
    "void(float64[:, ::1], uint8[::1], int64[:, ::1], int64, int64, int64, int64, int32[:, :, ::1], int32[:, :, ::1], "
    "int32[:, :, ::1])",
    **OPTIONS,
)
def trace_pairs(codes, bits, starts, begin, end, grid_height, grid_width, there, back, spare):  # type: ignore[no-untyped-def]
    """there[b] = index of the query's table of the reference, back[b] = the opposite, for begin <= b < end.

    ``codes`` and ``bits``: those of all views, one after the other; ``starts [B, PAIR_SIZE]`` (``QUERY_CODE`` to
    ``REFERENCE_BITS``) says where each pair's are, -1 for a pair without copy. ``spare [2, H, W]``: the two views' own
    tables are put there.
    """
    shape = there.shape[1:]
    query = spare[0]
    reference = spare[1]
    bounds = np.empty((3, shape[0], 2), np.int64)
    query_bounds = bounds[0]
    reference_bounds = bounds[1]
    unread_bounds = bounds[2]
    maps = np.empty((3, 3, 3))
    to_query = maps[0]
    to_reference = maps[1]
    unread_map = maps[2]
    scratch = new_scratch(shape[0], shape[1])
    for b in range(begin, end):
        start = starts[b]
        if start[QUERY_CODE] < 0:
            there[b] = -1
            back[b] = -1
            continue
        code = codes[start[QUERY_CODE] : start[QUERY_END]]
        other = codes[start[REFERENCE_CODE] : start[REFERENCE_END]]
        drawn = bits[start[QUERY_BITS] :]
        other_drawn = bits[start[REFERENCE_BITS] :]
        _from_grid(code, grid_height, grid_width, to_query)
        if other[IS_PLAIN] != 0.0 and shape[0] == grid_height and shape[1] == grid_width:
            # The reference is the source itself, resized: the query's table of the source is the answer.
            _trace_view(code, drawn, grid_height, grid_width, there[b], query_bounds, scratch)
            _project(
                to_query, query, reference_bounds, False, there[b], query_bounds, back[b], unread_bounds, scratch
            )  # fmt: skip
            continue
        _trace_view(code, drawn, grid_height, grid_width, query, query_bounds, scratch)
        _trace_view(other, other_drawn, grid_height, grid_width, reference, reference_bounds, scratch)
        _from_grid(other, grid_height, grid_width, to_reference)
        _bridge(
            to_query, query, query_bounds, to_reference, reference, reference_bounds,
            there[b], unread_bounds, unread_map, scratch,
        )  # fmt: skip
        _bridge(
            to_reference, reference, reference_bounds, to_query, query, query_bounds,
            back[b], unread_bounds, unread_map, scratch,
        )  # fmt: skip
