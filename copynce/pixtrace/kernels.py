"""Numba leaves of PixTrace: every loop over pixels.

Regions are intersections of half-planes ``planes [K, 3] float64`` in homogeneous output coordinates, scaled so that a
plane's value is a distance in pixels: the pixel centre ``(x, y, 1)`` belongs to the region if ``planes @ (x, y, 1) >=
0`` for every plane. A convex region meets a row in one span, so each row costs K divisions and the inner loops test
nothing. A centre that lies on an edge belongs to the region right of or below the edge, as with :func:`math.floor`.

A composed view travels as one array ``code [R, 3] float64`` (see :func:`write_code`): rows 0 to 2 map the source's unit
square to the view; row 3 is (height, width, 1 if the view is the plain resized source); row 4 is (C covers, 1 if
covers hide only together, 1 if noise covers a part); then regions: first the source's own, then those of the covers,
then the grounds that covers fill. A region is a row (K planes, M bitmaps, kept weight 0 to 255), a row (layer that the
cover shows or -1 for noise, its ground's number among the grounds or -1, 0), K planes and M bitmaps of four rows each:
the map from the view to points of the bitmap, and (its first place in ``bits``, rows, columns). ``bits`` uint8 [N]
holds the bitmaps one after the other, row by row. A pixel belongs to a region if its centre is inside of all planes
and falls on a 1 of all bitmaps.

All functions release the GIL, draw on nothing global and write into arrays that the caller owns.
``error_model="numpy"`` drops the test for division by zero, which would keep the loops from vectorising; int32
throughout for the same reason.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from copynce.compiled_cache import njit

#: Up to this distance in pixels a point counts as lying on an edge. Above the rounding of composed matrices, below
#: sight.
TIE = 1e-7

#: A pixel is a copy if at least this share of its colour (of 255) comes from the source.
LEAST_SOURCE_WEIGHT = 127

_FIXED = 2.0**32
_HALF = np.uint64(32)
_SIGN = np.int32(31)
_INSIDE = 1e-9  # above the rounding of a coordinate, below TIE

# "contract" only lets a product and a sum become one instruction; it assumes nothing about NaN, infinity or order.
_options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}


class _Scratch(NamedTuple):
    """What tracing and blending a view of H x W need beside their result; made once for any number of views."""

    first: Any  # float64 [H]
    last: Any  # float64 [H]
    spans: Any  # int64 [H, 2]
    columns: Any  # int32 [W]
    drawn: Any  # uint8 [H, W]
    weight: Any  # uint8 [H, W]
    maps: Any  # float64 [3, 3, 3]
    planes: Any  # float64 [9, 3]


@njit(**_options)
def _scratch(height, width):  # type: ignore[no-untyped-def]
    return _Scratch(
        np.empty(height, np.float64),
        np.empty(height, np.float64),
        np.empty((height, 2), np.int64),
        np.empty(width, np.int32),
        np.empty((height, width), np.uint8),
        np.empty((height, width), np.uint8),
        np.empty((3, 3, 3), np.float64),
        np.empty((9, 3), np.float64),
    )


@njit(**_options)
def _spans(planes, start, stop, scratch):  # type: ignore[no-untyped-def]
    """int64 [height, 2]: columns [first, last) of each row that lie in the region of planes[start:stop]."""
    height = scratch.first.size
    width = scratch.columns.size
    first = scratch.first
    last = scratch.last
    first[:] = 0.0
    last[:] = float(width)
    for k in range(start, stop):
        a, b, c = planes[k]
        # The plane's edge crosses the row with centre y at x = slope * y + offset; half a pixel makes it a column.
        if a > 1e-12:
            slope = -b / a
            offset = -(c + TIE) / a - 0.5
            for i in range(height):
                edge = np.ceil(slope * (np.float64(np.int32(i)) + 0.5) + offset)
                first[i] = edge if edge > first[i] else first[i]
        elif a < -1e-12:
            slope = -b / a
            offset = (TIE - c) / a - 0.5
            for i in range(height):
                edge = np.ceil(slope * (np.float64(np.int32(i)) + 0.5) + offset)
                last[i] = edge if edge < last[i] else last[i]
        else:
            for i in range(height):
                inside = b * (i + 0.5) + c
                if inside < -TIE or (inside < TIE and b < 0.0):
                    last[i] = 0.0
    spans = scratch.spans
    for i in range(height):
        spans[i, 0] = int(min(first[i], float(width)))
        spans[i, 1] = max(spans[i, 0], int(max(last[i], 0.0)))
    return spans


@njit(**_options)
def _pull_row(m, first, y, width, height, out):  # type: ignore[no-untyped-def]
    """out[j] = row-major pixel of a ``height`` x ``width`` grid that centre (first + j + 0.5, y) maps to.

    The centres lie inside of the grid up to rounding, so clamping replaces a test (and whatever comes, nan included,
    no index leaves the grid). TIE puts a point that lies on the border of two pixels, up to rounding, into the right
    or lower one.
    """
    start = first + 0.5
    u0 = m[0, 1] * y + m[0, 2]
    v0 = m[1, 1] * y + m[1, 2]
    w0 = m[2, 1] * y + m[2, 2]
    a = m[0, 0]
    d = m[1, 0]
    g = m[2, 0]
    right = float(width - 1)
    bottom = float(height - 1)
    pitch = np.int32(width)
    if g == 0.0:
        # A line in 32.32 fixed point: two integer additions a pixel. Off by less than TIE over 800 pixels.
        scale = _FIXED / w0
        steps = float(max(out.size - 1, 0))
        u1 = (a * start + u0) * scale + TIE * _FIXED
        v1 = (d * start + v0) * scale + TIE * _FIXED
        a = math.floor(a * scale + 0.5)
        d = math.floor(d * scale + 0.5)
        # The ends decide whether the line stays inside; only rounding at a border ever takes it out.
        if (
            min(u1, u1 + a * steps) >= 0.0
            and max(u1, u1 + a * steps) < width * _FIXED - 1.0
            and min(v1, v1 + d * steps) >= 0.0
            and max(v1, v1 + d * steps) < height * _FIXED - 1.0
        ):
            fixed_u = np.uint64(np.int64(u1))
            fixed_v = np.uint64(np.int64(v1))
            step_u = np.uint64(np.int64(a))
            step_v = np.uint64(np.int64(d))
            fixed_pitch = np.uint64(width)
            for j in range(out.size):
                out[j] = np.int32((fixed_v >> _HALF) * fixed_pitch + (fixed_u >> _HALF))
                fixed_u += step_u
                fixed_v += step_v
            return
        for j in range(out.size):
            column = (u1 + j * a) / _FIXED
            row = (v1 + j * d) / _FIXED
            column = column if column > 0.0 else 0.0
            column = column if column < right else right
            row = row if row > 0.0 else 0.0
            row = row if row < bottom else bottom
            out[j] = np.int32(row) * pitch + np.int32(column)
    else:
        stop = start + max(out.size - 1, 0)
        w1 = g * start + w0
        w2 = g * stop + w0
        u1 = (a * start + u0) / w1 + TIE
        u2 = (a * stop + u0) / w2 + TIE
        v1 = (d * start + v0) / w1 + TIE
        v2 = (d * stop + v0) / w2 + TIE
        # Along a row both coordinates rise or fall throughout, so here too the ends decide for all.
        if (
            min(w1, w2) > 0.0
            and min(u1, u2) > _INSIDE
            and max(u1, u2) < width - _INSIDE
            and min(v1, v2) > _INSIDE
            and max(v1, v2) < height - _INSIDE
        ):
            for j in range(out.size):
                x = np.float64(np.int32(j)) + start
                s = 1.0 / (g * x + w0)
                out[j] = np.int32((d * x + v0) * s + TIE) * pitch + np.int32((a * x + u0) * s + TIE)
            return
        for j in range(out.size):
            x = np.float64(np.int32(j)) + start
            s = 1.0 / (g * x + w0)
            u = (a * x + u0) * s + TIE
            v = (d * x + v0) * s + TIE
            u = u if u > 0.0 else 0.0
            u = u if u < right else right
            v = v if v > 0.0 else 0.0
            v = v if v < bottom else bottom
            out[j] = np.int32(v) * pitch + np.int32(u)


@njit("void(float64[:, ::1], float64[:, ::1])", **_options)
def invert(m, out):  # type: ignore[no-untyped-def]
    """out = inverse of the 3x3 matrix ``m``."""
    x = m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1]
    y = m[1, 2] * m[2, 0] - m[1, 0] * m[2, 2]
    z = m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0]
    s = 1.0 / (m[0, 0] * x + m[0, 1] * y + m[0, 2] * z)
    out[0, 0] = s * x
    out[0, 1] = s * (m[0, 2] * m[2, 1] - m[0, 1] * m[2, 2])
    out[0, 2] = s * (m[0, 1] * m[1, 2] - m[0, 2] * m[1, 1])
    out[1, 0] = s * y
    out[1, 1] = s * (m[0, 0] * m[2, 2] - m[0, 2] * m[2, 0])
    out[1, 2] = s * (m[0, 2] * m[1, 0] - m[0, 0] * m[1, 2])
    out[2, 0] = s * z
    out[2, 1] = s * (m[0, 1] * m[2, 0] - m[0, 0] * m[2, 1])
    out[2, 2] = s * (m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0])


@njit(**_options)
def _multiply(p, q, out):  # type: ignore[no-untyped-def]
    """out = p @ q, all 3x3."""
    for i in range(3):
        for j in range(3):
            out[i, j] = p[i, 0] * q[0, j] + p[i, 1] * q[1, j] + p[i, 2] * q[2, j]


@njit(**_options)
def _next_region(code, head):  # type: ignore[no-untyped-def]
    """Row of the region after the one at row ``head``."""
    return head + 2 + int(code[head, 0]) + 4 * int(code[head, 1])


@njit(**_options)
def _on_bitmaps(code, head, bits, y, first, last, place, hit):  # type: ignore[no-untyped-def]
    """hit[j] = 1 if centre (j + 0.5, y) falls on a 1 of every bitmap of the region, else 0, for j in [first, last).

    The centres lie inside of the region's planes, so on every bitmap, up to rounding. ``place`` int32 is scratch.
    """
    places = place[first:last]
    inside = hit[first:last]
    row = head + 2 + int(code[head, 0])
    for k in range(int(code[head, 1])):
        at = int(code[row + 3, 0])
        rows = int(code[row + 3, 1])
        columns = int(code[row + 3, 2])
        _pull_row(code[row : row + 3], first, y, columns, rows, places)
        bitmap = bits[at : at + rows * columns]
        row += 4
        for j in range(places.size):
            one = bitmap[np.uint32(places[j])]
            inside[j] = one if k == 0 else inside[j] & one


@njit(**_options)
def _draw(code, head, bits, scratch):  # type: ignore[no-untyped-def]
    """The region at row ``head``, as the columns [first, last) of each row, int64 [height, 2].

    Where bitmaps cut it, ``scratch.drawn`` says in these columns what is inside (1) and what is not (0).
    """
    spans = _spans(code, head + 2, head + 2 + int(code[head, 0]), scratch)
    if code[head, 1] > 0.0:
        for i in range(len(spans)):
            first, last = spans[i]
            if first < last:
                _on_bitmaps(code, head, bits, i + 0.5, first, last, scratch.columns, scratch.drawn[i])
    return spans


@njit(**_options)
def _fade(spans, cut, drawn, kept, weight):  # type: ignore[no-untyped-def]
    """Multiply ``weight`` by ``kept / 255`` inside of a region drawn by :func:`_draw`, rounding to nearest.

    ``cut``: bitmaps cut the region. n // 255 is (n + 1 + (n >> 8)) >> 8 below 65,535, which vectorises.
    """
    if kept == 0:
        _fill(spans, cut, drawn, 0, weight)
        return
    share = np.uint32(kept)
    one = np.uint32(1)
    half = np.uint32(127)
    eight = np.uint32(8)
    for i in range(len(weight)):
        first, last = spans[i]
        row = weight[i, first:last]
        if cut:
            shown = drawn[i, first:last]
            for j in range(row.size):
                n = np.uint32(np.uint32(row[j]) * share + half)
                row[j] = np.uint8((n + one + (n >> eight)) >> eight) if shown[j] != 0 else row[j]
        else:
            for j in range(row.size):
                n = np.uint32(np.uint32(row[j]) * share + half)
                row[j] = np.uint8((n + one + (n >> eight)) >> eight)


@njit(**_options)
def _fill(spans, cut, drawn, value, weight):  # type: ignore[no-untyped-def]
    """Set ``weight`` to ``value`` inside of a region drawn by :func:`_draw`; ``cut``: bitmaps cut it."""
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


@njit(
    "Tuple((float64[:, ::1], float64[:, :, ::1]))"
    "(float64[::1], int64, int64, int64, int64, int64, int64, boolean, boolean)",
    **_options,
)
def write_code(numbers, moves, clips, covers, layers, height, width, plain, together):  # type: ignore[no-untyped-def]
    """The code of a view, and float64 [layers, 3, 3], the maps from the unit squares of the layers to the view.

    ``numbers`` holds ``moves`` maps of nine numbers, from the source's unit square to its pixels, from these to the
    next canvas and so on up to the view; then parts of twelve, each a box: left, top, right, bottom on its canvas; how
    many of the maps lead to that canvas; the first of the clips that cut it; first place, rows and columns of its
    bitmap, stretched over the box (-1 without); kept weight; layer; ground. The first ``clips`` parts are those clips,
    the next is the source, then come the ``covers`` and their grounds.
    """
    maps = numbers[: 9 * moves].reshape(-1, 3, 3)
    parts = numbers[9 * moves :].reshape(-1, 12)
    stages = np.empty((moves + 1, 3, 3))  # the maps from the unit square to each canvas, and to itself
    stages[0] = np.eye(3)
    for k in range(moves):
        _multiply(maps[k], stages[k], stages[k + 1])
    regions = len(parts) - clips
    code = np.empty((5 + regions * (2 + 9 * (1 + clips)), 3))
    code[:3] = stages[moves]
    code[3, 0] = height
    code[3, 1] = width
    code[3, 2] = 1.0 if plain else 0.0
    code[4, 0] = covers
    code[4, 1] = 1.0 if together else 0.0
    code[4, 2] = 0.0
    back = np.empty((3, 3))
    invert(code[:3], back)
    far_x = width - 0.5
    far_y = height - 0.5
    m = np.empty((3, 3))
    inverse = np.empty((3, 3))
    back_and_on = np.empty((3, 3))
    bitmaps = np.empty((4 * (1 + clips), 3))
    places = np.empty((layers, 3, 3))
    row = 5
    for region in range(clips, len(parts)):
        head = row
        row += 2
        found = 0
        own = int(parts[region, 5])
        for step in range(own - 1, clips):
            part = parts[region] if step < own else parts[step]
            _multiply(stages[int(part[4])], back, m)
            if part[6] >= 0.0:
                x = part[8] / (part[2] - part[0])
                y = part[7] / (part[3] - part[1])
                for j in range(3):
                    bitmaps[found, j] = x * (m[0, j] - part[0] * m[2, j])
                    bitmaps[found + 1, j] = y * (m[1, j] - part[1] * m[2, j])
                    bitmaps[found + 2, j] = m[2, j]
                    bitmaps[found + 3, j] = part[6 + j]
                found += 4
            tilted = abs(m[2, 0]) * width + abs(m[2, 1]) * height > 1e-12 * abs(m[2, 2])
            for side in range(5 if tilted else 4):
                for j in range(3):
                    if side == 4:  # in front of the viewer
                        code[row, j] = m[2, j]
                    elif side < 2:  # right of the left edge, below the top edge
                        code[row, j] = m[side, j] - part[side] * m[2, j]
                    else:
                        code[row, j] = part[side] * m[2, j] - m[side - 2, j]
                a = code[row, 0]
                b = code[row, 1]
                c = code[row, 2]
                norm = math.hypot(a, b)
                if norm <= 1e-12 * abs(c):
                    norm = abs(c) if c != 0.0 else 1.0
                for j in range(3):
                    code[row, j] /= norm
                # A plane that no pixel centre of the view lies outside of is left out.
                nearest = (a * (0.5 if a > 0.0 else far_x) + b * (0.5 if b > 0.0 else far_y) + c) / norm
                if nearest < 2.0 * TIE:
                    row += 1
        code[head, 0] = row - head - 2
        code[head, 1] = found // 4
        code[head, 2] = parts[region, 9]
        code[head + 1, 0] = parts[region, 10]
        code[head + 1, 1] = parts[region, 11]
        code[head + 1, 2] = 0.0
        if region > clips and region <= clips + covers:
            layer = int(parts[region, 10])
            if layer < 0:
                code[4, 2] = 1.0
            else:  # it fills the canvas that it brings along, or the region's own box
                ground = int(parts[region, 11])
                box = parts[region if ground < 0 else clips + 1 + covers + ground]
                m[:] = 0.0
                m[0, 0] = box[2] - box[0]
                m[0, 2] = box[0]
                m[1, 1] = box[3] - box[1]
                m[1, 2] = box[1]
                m[2, 2] = 1.0
                invert(stages[int(box[4])], inverse)
                _multiply(code[:3], inverse, back_and_on)
                _multiply(back_and_on, m, places[layer - 1])
        for i in range(found):
            for j in range(3):
                code[row + i, j] = bitmaps[i, j]
        row += found
    return code[:row].copy(), places


@njit("void(float64[:, ::1], uint8[::1], boolean, float32[:, ::1], uint8[:, :, ::1], uint8[:, :, ::1])", **_options)
def blend(code, bits, noise, colours, weights, painted):  # type: ignore[no-untyped-def]
    """Blending weights of a view, and its flat colours painted.

    ``weights`` uint8 [1 + L (+ 1), H, W]: the share (of 255) of the source, of each layer and, last, of the noise if
    some erases; if not ``noise``, the others are as if nothing were erased. ``colours`` float32 [L, 3]: red, green and
    blue in [0, 1] of the layers that are a colour, -1 for pictures. ``painted`` uint8 [H, W, 3]: the sum of the
    colours, each times its weight, rounded; empty to leave it out.
    """
    count, height, width = weights.shape
    weights[:] = 0
    painted[:] = 0
    scratch = _scratch(height, width)
    drawn = scratch.drawn
    shown = np.zeros(count, np.bool_)
    shown[0] = True
    _fill(_draw(code, 5, bits, scratch), code[5, 1] > 0.0, drawn, 255, weights[0])
    covers = int(code[4, 0])
    first_cover = _next_region(code, 5)
    first_ground = first_cover
    for _ in range(covers):
        first_ground = _next_region(code, first_ground)
    head = first_cover
    for _ in range(covers):
        kept = int(code[head, 2])
        number = int(code[head + 1, 0])
        own = weights[number]  # of the noise the last
        ground = first_ground
        for _ in range(int(code[head + 1, 1])):
            ground = _next_region(code, ground)
        if code[head + 1, 1] >= 0.0:
            _fill(_draw(code, ground, bits, scratch), code[ground, 1] > 0.0, drawn, 255, own)
        cut = code[head, 1] > 0.0
        spans = _draw(code, head, bits, scratch)
        if number >= 0 or noise:
            for k in range(count):
                if shown[k]:
                    _fade(spans, cut, drawn, kept, weights[k])
        if code[head + 1, 1] >= 0.0:
            _fade(spans, cut, drawn, 255 - kept, own)
        else:
            _fill(spans, cut, drawn, 255 - kept, own)
        shown[number] = True
        head = _next_region(code, head)
    if painted.size == 0:
        return
    head = first_cover
    for _ in range(covers):
        layer = int(code[head + 1, 0])
        if layer > 0 and colours[layer - 1, 0] >= 0.0:
            red = colours[layer - 1, 0]
            green = colours[layer - 1, 1]
            blue = colours[layer - 1, 2]
            # A colour shows nowhere but in the region that it was laid on.
            spans = _spans(code, head + 2, head + 2 + int(code[head, 0]), scratch)
            for i in range(height):
                for j in range(spans[i, 0], spans[i, 1]):
                    if weights[layer, i, j] != 0:
                        share = np.float32(weights[layer, i, j])
                        painted[i, j, 0] = min(255, painted[i, j, 0] + int(share * red + 0.5))
                        painted[i, j, 1] = min(255, painted[i, j, 1] + int(share * green + 0.5))
                        painted[i, j, 2] = min(255, painted[i, j, 2] + int(share * blue + 0.5))
        head = _next_region(code, head)


@njit(**_options)
def _trace_view(code, bits, grid_height, grid_width, index, bounds, scratch):  # type: ignore[no-untyped-def]
    height, width = index.shape
    if code[3, 2] != 0.0 and height == grid_height and width == grid_width:
        for i in range(height):
            bounds[i, 0] = 0
            bounds[i, 1] = width
            for j in range(width):
                index[i, j] = np.int32(i) * np.int32(width) + np.int32(j)
        return
    masked = code[5, 1] > 0.0
    drawn = scratch.drawn
    spans = _draw(code, 5, bits, scratch)
    bounds[:] = spans
    m = scratch.maps[0]
    invert(code[:3], m)
    for j in range(3):
        m[0, j] *= grid_width
        m[1, j] *= grid_height
    straight = m[0, 1] == 0.0 and m[1, 0] == 0.0 and m[2, 0] == 0.0 and m[2, 1] == 0.0
    columns = scratch.columns
    if straight:  # rows of the view are rows of the grid: one multiple of the grid's width plus the same columns
        _pull_row(m, 0, 0.5, grid_width, 1, columns)
    for i in range(height):
        y = i + 0.5
        first, last = spans[i]
        index[i, :first] = -1
        index[i, last:] = -1
        row = index[i, first:last]
        if straight:
            v = (m[1, 1] * y + m[1, 2]) / m[2, 2] + TIE
            base = np.int32(min(max(v, 0.0), grid_height - 1.0)) * np.int32(grid_width)
            shown = columns[first:last]
            for j in range(row.size):
                row[j] = base + shown[j]
        else:
            _pull_row(m, first, y, grid_width, grid_height, row)
        if masked:
            inside = drawn[i, first:last]
            for j in range(row.size):
                row[j] = row[j] if inside[j] != 0 else -1
    together = code[4, 1] != 0.0
    weight = scratch.weight
    if together:
        weight[:] = 255
    head = _next_region(code, 5)
    for _ in range(int(code[4, 0])):
        kept = int(code[head, 2])
        if together or kept < LEAST_SOURCE_WEIGHT:
            spans = _draw(code, head, bits, scratch)
            if together:
                _fade(spans, code[head, 1] > 0.0, drawn, kept, weight)
            else:
                _fill(spans, code[head, 1] > 0.0, drawn, -1, index)
        head = _next_region(code, head)
    if together:
        for i in range(height):
            for j in range(width):
                if weight[i, j] < LEAST_SOURCE_WEIGHT:
                    index[i, j] = -1


@njit(**_options)
def _from_grid(code, grid_height, grid_width, forward):  # type: ignore[no-untyped-def]
    for i in range(3):
        forward[i, 0] = code[i, 0] * (1.0 / grid_width)
        forward[i, 1] = code[i, 1] * (1.0 / grid_height)
        forward[i, 2] = code[i, 2]


@njit(
    "void(float64[:, ::1], uint8[::1], int64, int64, int32[:, ::1], int64[:, ::1], float64[:, ::1])",
    **_options,
)
def trace_view(code, bits, grid_height, grid_width, index, bounds, forward):  # type: ignore[no-untyped-def]
    """index[i, j] = row-major pixel of the source grid that centre (j + 0.5, i + 0.5) of the view shows, or -1.

    ``bounds [H, 2]``: see :func:`bounds_of`. ``forward [3, 3]``: the map from the grid to the view.
    """
    _trace_view(code, bits, grid_height, grid_width, index, bounds, _scratch(index.shape[0], index.shape[1]))
    _from_grid(code, grid_height, grid_width, forward)


@njit("void(int32[:, ::1], int64[:, ::1])", **_options)
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


@njit(**_options)
def _outline(bounds, width, planes):  # type: ignore[no-untyped-def]
    """planes [8, 3]: an octagon around all of ``bounds``, one pixel wider but for the picture's borders."""
    height = len(bounds)
    least = np.full(4, 2**31)  # of x, y, x + y, x - y
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


@njit(**_options)
def _project(matrix, own, own_bounds, use_own, other, other_bounds, index, bounds, scratch):  # type: ignore[no-untyped-def]
    height = len(index)
    other_height, other_width = other.shape
    # Only centres are looked up that fall in front of the viewer and near to what the other picture shows.
    planes = scratch.planes
    _outline(other_bounds, other_width, planes)
    planes[8, 0] = 0.0
    planes[8, 1] = 0.0
    planes[8, 2] = 1.0
    for k in range(9):
        a, b, c = planes[k]
        for j in range(3):
            planes[k, j] = a * matrix[0, j] + b * matrix[1, j] + c * matrix[2, j]
        norm = math.hypot(planes[k, 0], planes[k, 1])
        if norm < 1e-12 * abs(planes[k, 2]) or norm == 0.0:
            norm = abs(planes[k, 2])
        for j in range(3):
            planes[k, j] /= norm
    flat = other.reshape(-1)
    spans = _spans(planes, 0, 9, scratch)
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
        _pull_row(matrix, first, i + 0.5, other_width, other_height, row)
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
    **_options,
)
def reverse(matrix, other, other_bounds, index, bounds, inverse):  # type: ignore[no-untyped-def]
    """index[i, j] = row-major pixel of ``other`` that centre (j + 0.5, i + 0.5) falls on through ``matrix``.

    -1 where it falls outside, behind the viewer or on an ``other`` of -1. ``other_bounds``, ``bounds``: see
    :func:`bounds_of`; ``inverse`` is that of ``matrix``.
    """
    scratch = _scratch(index.shape[0], index.shape[1])
    invert(matrix, inverse)
    _project(matrix, index, bounds, False, other, other_bounds, index, bounds, scratch)


@njit(**_options)
def _bridge(forward, own, own_bounds, other_forward, other, other_bounds, index, bounds, back, scratch):  # type: ignore[no-untyped-def]
    inverse = scratch.maps[1]
    matrix = scratch.maps[2]
    invert(forward, inverse)
    _multiply(other_forward, inverse, matrix)
    invert(matrix, back)
    _project(matrix, own, own_bounds, True, other, other_bounds, index, bounds, scratch)


@njit(
    "void(float64[:, ::1], int32[:, ::1], int64[:, ::1], float64[:, ::1], int32[:, ::1], int64[:, ::1], "
    "int32[:, ::1], int64[:, ::1], float64[:, ::1])",
    **_options,
)
def bridge(forward, own, own_bounds, other_forward, other, other_bounds, index, bounds, back):  # type: ignore[no-untyped-def]
    """index[i, j] = row-major pixel of ``other`` that shows the point of the source that ``own`` shows at [i, j].

    -1 where one of them is. ``forward`` and ``other_forward`` lead from the source to the two, ``back`` from ``other``
    to ``own``; bounds: see :func:`bounds_of`.
    """
    scratch = _scratch(index.shape[0], index.shape[1])
    _bridge(forward, own, own_bounds, other_forward, other, other_bounds, index, bounds, back, scratch)


@njit("void(int32[:, ::1], int32[::1], int32[:, ::1])", **_options)
def gather(index, other, out):  # type: ignore[no-untyped-def]
    """out = other[index], -1 where index is -1."""
    height, width = index.shape
    for i in range(height):
        for j in range(width):
            k = index[i, j]
            out[i, j] = other[k] if k >= 0 else -1


@njit("void(int32[:, ::1], int32[::1])", **_options)
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
    **_options,
)
def trace_pairs(codes, bits, starts, begin, end, grid_height, grid_width, there, back, spare):  # type: ignore[no-untyped-def]
    """there[b] = index of the query's table of the reference, back[b] = the opposite, for begin <= b < end.

    ``starts [B, 6]``: first and last row of the query's and of the reference's code, first places of their bitmaps; -1
    for a pair without copy. ``spare [2, H, W]``: the two views' own tables are put there.
    """
    shape = there.shape[1:]
    query = spare[0]
    reference = spare[1]
    bounds = np.empty((3, shape[0], 2), np.int64)
    scratch = _scratch(shape[0], shape[1])
    maps = np.empty((3, 3, 3))
    for b in range(begin, end):
        if starts[b, 0] < 0:
            there[b] = -1
            back[b] = -1
            continue
        code = codes[starts[b, 0] : starts[b, 1]]
        other = codes[starts[b, 2] : starts[b, 3]]
        drawn = bits[starts[b, 4] :]
        other_drawn = bits[starts[b, 5] :]
        _from_grid(code, grid_height, grid_width, maps[0])
        if other[3, 2] != 0.0 and shape[0] == grid_height and shape[1] == grid_width:
            # The reference is the source itself, resized.
            _trace_view(code, drawn, grid_height, grid_width, there[b], bounds[0], scratch)
            _project(maps[0], query, bounds[1], False, there[b], bounds[0], back[b], bounds[2], scratch)
            continue
        _trace_view(code, drawn, grid_height, grid_width, query, bounds[0], scratch)
        _trace_view(other, other_drawn, grid_height, grid_width, reference, bounds[1], scratch)
        _from_grid(other, grid_height, grid_width, maps[1])
        _bridge(maps[0], query, bounds[0], maps[1], reference, bounds[1], there[b], bounds[2], maps[2], scratch)
        _bridge(maps[1], reference, bounds[1], maps[0], query, bounds[0], back[b], bounds[2], maps[2], scratch)


# Without "contract": an edit program holds what is drawn from these numbers, and has the same bits everywhere.
@njit("void(float64[:, ::1], float64[::1], float64[:, ::1])", nogil=True, cache=True)
def bezier(controls, t, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` [2, T] with the (x, y) at ``t`` [T] in [0, 1] of the Bezier curve of ``controls`` [N, 2].

    De Casteljau's way.
    """
    rest = np.empty((len(controls), t.size))
    for axis in range(2):
        for i in range(len(controls)):
            rest[i] = controls[i, axis]
        for left in range(len(controls) - 1, 0, -1):
            for i in range(left):
                for k in range(t.size):
                    rest[i, k] += t[k] * (rest[i + 1, k] - rest[i, k])
        out[axis] = rest[0]


@njit("void(float64[:, ::1], float64, uint8[:, ::1])", **_options)
def draw_stroke(points, radius, drawn):  # type: ignore[no-untyped-def]
    """Set ``drawn`` to 1 where a pixel's centre lies within ``radius`` of the line through points (x, y) [N, 2]."""
    height, width = drawn.shape
    for k in range(len(points) - 1):
        ax = points[k, 0]
        ay = points[k, 1]
        dx = points[k + 1, 0] - ax
        dy = points[k + 1, 1] - ay
        length = max(dx * dx + dy * dy, 1e-12)
        top = max(int(min(ay, ay + dy) - radius - 1.0), 0)
        bottom = min(int(max(ay, ay + dy) + radius + 1.0), height)
        left = max(int(min(ax, ax + dx) - radius - 1.0), 0)
        right = min(int(max(ax, ax + dx) + radius + 1.0), width)
        for i in range(top, bottom):
            for j in range(left, right):
                x = j + 0.5 - ax
                y = i + 0.5 - ay
                along = min(max((x * dx + y * dy) / length, 0.0), 1.0)
                x -= along * dx
                y -= along * dy
                if x * x + y * y <= radius * radius:
                    drawn[i, j] = 1


@njit("void(int32[:, ::1], int64[:, ::1], int64, uint16[::1], uint16[:, ::1])", **_options)
def count_overlap(index, bounds, patch, numbers, counts):  # type: ignore[no-untyped-def]
    """counts[p, q] = number of pixels of view patch p whose source lies in grid patch q (``numbers`` says which).

    Rows of a patch that lie outside of ``bounds`` (see :func:`bounds_of`) are passed over. The length of a run of equal
    sources is kept in a register: memory would make every increment wait for the last.
    """
    height, width = index.shape
    cells = counts.shape[1]
    found = np.empty(cells + 1, np.uint16)
    flat = index.reshape(-1)
    p = 0
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            found[:] = 0
            current = np.uint16(0)
            length = np.uint16(0)
            for i in range(top, top + patch):
                if bounds[i, 0] >= left + patch or bounds[i, 1] <= left:
                    continue
                start = np.uint64(i * width + left)
                for j in range(patch):
                    number = numbers[np.uint32(flat[start + np.uint64(j)] + np.int32(1))]
                    if number == current:
                        length += np.uint16(1)
                    else:
                        found[current] += length
                        current = number
                        length = np.uint16(1)
            found[current] += length
            out = counts[p]
            for q in range(cells):
                out[q] = found[q + 1]
            p += 1
