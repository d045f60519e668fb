"""Regions of a view: the columns of each row that lie inside, and weights changed there.

A convex region meets a row in one span, so each row costs K divisions for K planes, and the loops over pixels test
nothing. int32 throughout, so that they vectorise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from copynce.compiled_cache import njit
from copynce.pixtrace.compiled.maps import OPTIONS, TIE, pull_row
from copynce.pixtrace.compiled.slots import (
    BITMAP_ROWS,
    BITMAPS,
    BITS_HEIGHT,
    BITS_START,
    BITS_WIDTH,
    MAP_ROWS,
    REGION_ROWS,
    bitmaps_of,
    is_cut,
)

#: A pixel is a copy if at least this weight of its colour, of 255, comes from the source: half of it, rounded down, so
#: that a cover of opacity 0.5 leaves the copy.
LEAST_SOURCE_WEIGHT = 127

#: Of a plane across the rows, (a, b, c) with a as good as 0, every row lies wholly on one side.
_LEVEL = 1e-12


class Scratch(NamedTuple):
    """What tracing and blending a view of H x W need beside their result; made once for any number of views."""

    first: Any  # float64 [H]
    last: Any  # float64 [H]
    spans: Any  # int64 [H, 2]
    columns: Any  # int32 [W]
    drawn: Any  # uint8 [H, W]
    weight: Any  # uint8 [H, W]
    maps: Any  # float64 [3, 3, 3]
    planes: Any  # float64 [9, 3]


@njit(**OPTIONS)
def new_scratch(height, width):  # type: ignore[no-untyped-def]
    return Scratch(
        np.empty(height, np.float64),
        np.empty(height, np.float64),
        np.empty((height, 2), np.int64),
        np.empty(width, np.int32),
        np.empty((height, width), np.uint8),
        np.empty((height, width), np.uint8),
        np.empty((3, 3, 3), np.float64),
        np.empty((9, 3), np.float64),
    )


@njit(**OPTIONS)
def spans_of(planes, start, stop, scratch):  # type: ignore[no-untyped-def]
    """int64 [height, 2]: columns [first, last) of each row that lie in the region of planes[start:stop]."""
    height = scratch.first.size
    width = scratch.columns.size
    first = scratch.first
    last = scratch.last
    first[:] = 0.0
    last[:] = float(width)
    for k in range(start, stop):
        a, b, c = planes[k]
        # The plane's edge crosses the row with centre y at x = slope * y + offset; half a pixel makes it a column. The
        # first column whose centre is not left of the edge: a centre on it, up to TIE, belongs to the region where the
        # edge is its left border, and not where it is its right one.
        if a > _LEVEL:
            slope = -b / a
            offset = -(c + TIE) / a - 0.5
            for i in range(height):
                edge = np.ceil(slope * (np.float64(np.int32(i)) + 0.5) + offset)
                first[i] = edge if edge > first[i] else first[i]
        elif a < -_LEVEL:
            slope = -b / a
            offset = (TIE - c) / a - 0.5
            for i in range(height):
                edge = np.ceil(slope * (np.float64(np.int32(i)) + 0.5) + offset)
                last[i] = edge if edge < last[i] else last[i]
        else:
            for i in range(height):
                inside = b * (i + 0.5) + c
                if inside < -TIE or (inside < TIE and b < 0.0):  # on the edge: in above, out below, as for columns
                    last[i] = 0.0
    spans = scratch.spans
    for i in range(height):
        spans[i, 0] = int(min(first[i], float(width)))
        spans[i, 1] = max(spans[i, 0], int(max(last[i], 0.0)))
    return spans


@njit(**OPTIONS)
def _on_bitmaps(code, head, bits, y, first, last, place, hit):  # type: ignore[no-untyped-def]
    """hit[j] = 1 if centre (j + 0.5, y) falls on a 1 of every bitmap of the region, else 0, for j in [first, last).

    The centres lie inside of the region's planes, so on every bitmap, up to rounding. ``place`` int32 is scratch.
    """
    places = place[first:last]
    inside = hit[first:last]
    row = bitmaps_of(code, head)
    for k in range(int(code[head, BITMAPS])):
        own = code[row + MAP_ROWS]
        at = int(own[BITS_START])
        rows = int(own[BITS_HEIGHT])
        columns = int(own[BITS_WIDTH])
        pull_row(code[row : row + MAP_ROWS], first, y, columns, rows, places)
        bitmap = bits[at : at + rows * columns]
        row += BITMAP_ROWS
        for j in range(places.size):
            one = bitmap[np.uint32(places[j])]
            inside[j] = one if k == 0 else inside[j] & one


@njit(**OPTIONS)
def draw_region(code, head, bits, scratch):  # type: ignore[no-untyped-def]
    """The region at row ``head``, as the columns [first, last) of each row, int64 [height, 2].

    Where bitmaps cut it, ``scratch.drawn`` says in these columns what is inside (1) and what is not (0).
    """
    spans = spans_of(code, head + REGION_ROWS, bitmaps_of(code, head), scratch)
    if is_cut(code, head):
        for i in range(len(spans)):
            first, last = spans[i]
            if first < last:
                _on_bitmaps(code, head, bits, i + 0.5, first, last, scratch.columns, scratch.drawn[i])
    return spans


@njit(**OPTIONS)
def fade(spans, cut, drawn, kept, weight):  # type: ignore[no-untyped-def]
    """Multiply ``weight`` by ``kept / 255`` inside of a region drawn by :func:`draw_region`, rounding to nearest.

    ``cut``: bitmaps cut the region. n // 255 is (n + 1 + (n >> 8)) >> 8 below 65,535, which vectorises.
    """
    if kept == 0:
        fill(spans, cut, drawn, 0, weight)
        return
    # All of one type: a literal would make the products 64 bits wide.
    kept = np.uint32(kept)
    one = np.uint32(1)
    half = np.uint32(127)
    eight = np.uint32(8)
    for i in range(len(weight)):
        first, last = spans[i]
        row = weight[i, first:last]
        if cut:
            shown = drawn[i, first:last]
            for j in range(row.size):
                n = np.uint32(np.uint32(row[j]) * kept + half)
                row[j] = np.uint8((n + one + (n >> eight)) >> eight) if shown[j] != 0 else row[j]
        else:
            for j in range(row.size):
                n = np.uint32(np.uint32(row[j]) * kept + half)
                row[j] = np.uint8((n + one + (n >> eight)) >> eight)


@njit(**OPTIONS)
def fill(spans, cut, drawn, value, weight):  # type: ignore[no-untyped-def]
    """Set ``weight`` to ``value`` inside of a region drawn by :func:`draw_region`; ``cut``: bitmaps cut it."""
    new = weight.dtype.type(value)
    for i in range(len(weight)):
        first, last = spans[i]
        row = weight[i, first:last]
        if cut:
            shown = drawn[i, first:last]
            for j in range(row.size):
                row[j] = new if shown[j] != 0 else row[j]
        else:
            row[:] = new
