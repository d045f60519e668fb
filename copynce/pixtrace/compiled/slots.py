"""The form in which a composed view travels to compiled code: one array of numbers, every place in it with a name.

Regions are intersections of half-planes in homogeneous coordinates of the view, scaled so that a plane's value is a
distance in pixels: the pixel centre ``(x, y, 1)`` belongs to the region if ``planes @ (x, y, 1) >= 0`` for every plane
and it falls on a 1 of all of the region's bitmaps. A centre that lies on an edge belongs to the region right of or
below the edge, as with :func:`math.floor`.

``code`` float64 [R, 3] holds, one below the other:

- 3 rows: the map from the source's unit square to the view;
- 2 rows: the head (``HEIGHT`` to ``HAS_NOISE``);
- from row ``FIRST_REGION`` on regions: the source's own, then those of the covers in their order, then the grounds,
  the canvases that some covers fill.

A region is two rows of its own numbers (``PLANES`` to ``GROUND``), its planes, a row each, and its bitmaps, four rows
each: the map from the view to points of the bitmap, one unit a bit, and where its bits are (``BITS_START`` to
``BITS_WIDTH``) in ``bits`` uint8 [N], which holds all bitmaps one after the other, row by row.

One array of one type, because every further one costs a call from Python as much as a hundred pixels, and because the
codes of a batch are joined by one copy.
"""

from __future__ import annotations

from copynce.compiled_cache import njit
from copynce.pixtrace.compiled.maps import OPTIONS

# ------------------------------------------------------------------------------------------ the code of a view

#: Rows of a map.
MAP_ROWS = 3

# The head: (row, column).
HEIGHT = (3, 0)
WIDTH = (3, 1)
IS_PLAIN = (3, 2)  #: 1 if the view is the whole source, resized
COVERS = (4, 0)  #: how many
HIDES_TOGETHER = (4, 1)  #: 1 if covers that each leave the source visible may hide it where they overlap
HAS_NOISE = (4, 2)  #: 1 if noise covers a part

FIRST_REGION = 5

# A region's first row: columns.
PLANES = 0  #: how many
BITMAPS = 1  #: how many
KEPT = 2  #: weight, of 255, that what lies below a cover keeps
# Its second row: columns.
LAYER = 0  #: number of the layer that a cover shows, from 1 on (0 is the source), or NOISE
GROUND = 1  #: number among the grounds of the canvas that the layer fills, or NO_GROUND
REGION_ROWS = 2

NOISE = -1
NO_GROUND = -1

# A bitmap's last row: columns.
BITS_START = 0  #: place of its first bit in ``bits``
BITS_HEIGHT = 1
BITS_WIDTH = 2
BITMAP_ROWS = MAP_ROWS + 1

# ------------------------------------------------------------------------------------------ parts, of which it is made

#: Numbers of a move, a 3x3 map row by row: from one canvas of the chain of edits to the next.
MOVE_SIZE = 9

# A part is a box on one of the canvases, with what a region of the code needs beside it. Its sides come first and in
# this order, for loops run over them.
PART_LEFT = 0
PART_TOP = 1
PART_RIGHT = 2
PART_BOTTOM = 3
PART_MOVES = 4  #: how many of the moves lead to its canvas
PART_CLIP = 5  #: number of the first of the clips that cut it: those that were noted before it do not
PART_BITS = 6  #: here BITS_START, BITS_HEIGHT and BITS_WIDTH of its bitmap, stretched over the box; NO_BITS without one
PART_KEPT = 9
PART_LAYER = 10
PART_GROUND = 11
PART_SIZE = 12

NO_BITS = -1


@njit(**OPTIONS)
def bitmaps_of(code, head):  # type: ignore[no-untyped-def]
    """First row of the bitmaps of the region at row ``head``; its planes lie between ``head + REGION_ROWS`` and it."""
    return head + REGION_ROWS + int(code[head, PLANES])


@njit(**OPTIONS)
def next_region(code, head):  # type: ignore[no-untyped-def]
    """Row of the region after the one at row ``head``."""
    return bitmaps_of(code, head) + BITMAP_ROWS * int(code[head, BITMAPS])


@njit(**OPTIONS)
def is_cut(code, head):  # type: ignore[no-untyped-def]
    """Whether bitmaps cut the region at row ``head``."""
    return code[head, BITMAPS] > 0.0
