"""The code of a view (:mod:`copynce.pixtrace.compiled.slots`), written from the moves and parts of a chain of edits."""

from __future__ import annotations

import math

import numpy as np

from copynce.compiled_cache import njit
from copynce.pixtrace.compiled.maps import OPTIONS, TIE, invert, multiply
from copynce.pixtrace.compiled.slots import (
    BITMAP_ROWS,
    BITMAPS,
    BITS_HEIGHT,
    BITS_WIDTH,
    COVERS,
    FIRST_REGION,
    GROUND,
    HAS_NOISE,
    HEIGHT,
    HIDES_TOGETHER,
    IS_PLAIN,
    KEPT,
    LAYER,
    MAP_ROWS,
    MOVE_SIZE,
    NO_GROUND,
    NOISE,
    PART_BITS,
    PART_BOTTOM,
    PART_CLIP,
    PART_GROUND,
    PART_KEPT,
    PART_LAYER,
    PART_LEFT,
    PART_MOVES,
    PART_RIGHT,
    PART_SIZE,
    PART_TOP,
    PLANES,
    REGION_ROWS,
    WIDTH,
)

#: Planes of a box: its four sides, and the one in front of the viewer.
_MOST_PLANES = 5


@njit(**OPTIONS)
def _write_bitmap(part, to_canvas, out):  # type: ignore[no-untyped-def]
    """out [4, 3] = the bitmap of a part: the map from the view to its points, and where its bits are."""
    x = part[PART_BITS + BITS_WIDTH] / (part[PART_RIGHT] - part[PART_LEFT])
    y = part[PART_BITS + BITS_HEIGHT] / (part[PART_BOTTOM] - part[PART_TOP])
    for j in range(3):
        out[0, j] = x * (to_canvas[0, j] - part[PART_LEFT] * to_canvas[2, j])
        out[1, j] = y * (to_canvas[1, j] - part[PART_TOP] * to_canvas[2, j])
        out[2, j] = to_canvas[2, j]
        out[MAP_ROWS, j] = part[PART_BITS + j]


@njit(**OPTIONS)
def _write_planes(part, to_canvas, height, width, code, row):  # type: ignore[no-untyped-def]
    """Write the planes of a part's box from ``row`` on; returns the first free row."""
    far_x = width - 0.5
    far_y = height - 0.5
    # Depth that changes over the view may change its sign: then what lies behind the viewer must be cut off.
    tilted = abs(to_canvas[2, 0]) * width + abs(to_canvas[2, 1]) * height > 1e-12 * abs(to_canvas[2, 2])
    for side in range(_MOST_PLANES if tilted else _MOST_PLANES - 1):
        for j in range(3):
            if side == _MOST_PLANES - 1:  # in front of the viewer
                code[row, j] = to_canvas[2, j]
            elif side < PART_RIGHT:  # right of the left edge, below the top edge
                code[row, j] = to_canvas[side, j] - part[side] * to_canvas[2, j]
            else:  # left of the right edge, above the bottom edge
                code[row, j] = part[side] * to_canvas[2, j] - to_canvas[side - PART_RIGHT, j]
        a = code[row, 0]
        b = code[row, 1]
        c = code[row, 2]
        norm = math.hypot(a, b)
        if norm <= 1e-12 * abs(c):  # no edge in sight: the plane holds everywhere or nowhere
            norm = abs(c) if c != 0.0 else 1.0
        for j in range(3):
            code[row, j] /= norm
        # A plane that no pixel centre of the view lies outside of is left out: the next one takes its row.
        nearest = (a * (0.5 if a > 0.0 else far_x) + b * (0.5 if b > 0.0 else far_y) + c) / norm
        if nearest < 2.0 * TIE:
            row += 1
    return row


@njit(**OPTIONS)
def _place_layer(box, canvas, view, scratch, out):  # type: ignore[no-untyped-def]
    """out = the map from the unit square of a layer that fills ``box`` (a part) to the view.

    ``canvas`` and ``view``: the maps from the source's unit square to the part's canvas and to the view. ``scratch``
    float64 [3, 3, 3].
    """
    to_canvas = scratch[0]
    back = scratch[1]
    onwards = scratch[2]
    to_canvas[:] = 0.0
    to_canvas[0, 0] = box[PART_RIGHT] - box[PART_LEFT]
    to_canvas[0, 2] = box[PART_LEFT]
    to_canvas[1, 1] = box[PART_BOTTOM] - box[PART_TOP]
    to_canvas[1, 2] = box[PART_TOP]
    to_canvas[2, 2] = 1.0
    invert(canvas, back)
    multiply(view, back, onwards)
    multiply(onwards, to_canvas, out)


@njit(
    "Tuple((float64[:, ::1], float64[:, :, ::1]))"
    "(float64[::1], int64, int64, int64, int64, int64, int64, boolean, boolean)",
    **OPTIONS,
)
def write_code(numbers, moves, clips, covers, layers, height, width, plain, together):  # type: ignore[no-untyped-def]
    """The code of a view, and float64 [layers, 3, 3], the maps from the unit squares of the layers to the view.

    ``numbers`` holds the ``moves``, from the source's unit square to its pixels, from these to the next canvas and so
    on up to the view; then the parts: first the ``clips`` (canvases that later edits exposed the outside of), then the
    source, then the ``covers`` and their grounds.
    """
    maps = numbers[: MOVE_SIZE * moves].reshape(-1, 3, 3)
    parts = numbers[MOVE_SIZE * moves :].reshape(-1, PART_SIZE)
    stages = np.empty((moves + 1, 3, 3))  # the maps from the unit square to each canvas, and to itself
    stages[0] = np.eye(3)
    for k in range(moves):
        multiply(maps[k], stages[k], stages[k + 1])
    regions = len(parts) - clips
    code = np.empty((FIRST_REGION + regions * (REGION_ROWS + (_MOST_PLANES + BITMAP_ROWS) * (1 + clips)), 3))
    code[:MAP_ROWS] = stages[moves]
    code[HEIGHT] = height
    code[WIDTH] = width
    code[IS_PLAIN] = 1.0 if plain else 0.0
    code[COVERS] = covers
    code[HIDES_TOGETHER] = 1.0 if together else 0.0
    code[HAS_NOISE] = 0.0
    scratch = np.empty((3, 3, 3))
    back = np.empty((3, 3))
    invert(code[:MAP_ROWS], back)
    to_canvas = np.empty((3, 3))
    bitmaps = np.empty((1 + clips, BITMAP_ROWS, 3))
    places = np.empty((layers, 3, 3))
    row = FIRST_REGION
    for region in range(clips, len(parts)):
        own = parts[region]
        head = row
        row += REGION_ROWS
        found = 0
        # Its own box, then those of the clips that came after it.
        first_clip = int(own[PART_CLIP])
        for clip in range(first_clip - 1, clips):
            part = own if clip < first_clip else parts[clip]
            multiply(stages[int(part[PART_MOVES])], back, to_canvas)
            if part[PART_BITS] >= 0.0:
                _write_bitmap(part, to_canvas, bitmaps[found])
                found += 1
            row = _write_planes(part, to_canvas, height, width, code, row)
        code[head, PLANES] = row - head - REGION_ROWS
        code[head, BITMAPS] = found
        code[head, KEPT] = own[PART_KEPT]
        code[head + 1, LAYER] = own[PART_LAYER]
        code[head + 1, GROUND] = own[PART_GROUND]
        code[head + 1, 2] = 0.0
        if region > clips and region <= clips + covers:
            if own[PART_LAYER] == NOISE:
                code[HAS_NOISE] = 1.0
            else:  # it fills the canvas that it brings along, or the region's own box
                box = own if own[PART_GROUND] == NO_GROUND else parts[clips + 1 + covers + int(own[PART_GROUND])]
                place = places[int(own[PART_LAYER]) - 1]
                _place_layer(box, stages[int(box[PART_MOVES])], code[:MAP_ROWS], scratch, place)
        for k in range(found):
            code[row : row + BITMAP_ROWS] = bitmaps[k]
            row += BITMAP_ROWS
    return code[:row].copy(), places
