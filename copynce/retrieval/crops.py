"""The views that local matching looks at: boxes and rotations of PROTOCOLS 4.2 and 4.3, as named tables.

Each function of (width, height) gives the views of a picture of that size, in the released order, for
:class:`dali_pipelines.CropLoader`. ``//`` is the released code's integer division; a box has at least one pixel.
"""

from __future__ import annotations

from dali_pipelines.cuts import Cut, Cuts

_WHOLE = Cut()


def one_of_one(width: int, height: int) -> list[Cut]:
    """The whole picture."""
    return [_WHOLE]


def one_of_two(width: int, height: int, *, released: bool = True) -> list[Cut]:
    """10 boxes: three halves across, three halves down, four corners of 0.707 of both sides.

    ``released``: the middle half across ends at 3W // 2, beyond the picture and black there, as in the released code;
    else at 3W // 4, as was surely meant.
    """
    w, h = width, height
    near_x, near_y, far_x, far_y = int(0.293 * w), int(0.293 * h), int(0.707 * w), int(0.707 * h)
    return [
        _box(0, 0, w // 2, h),
        _box(w // 4, 0, 3 * w // (2 if released else 4), h),
        _box(w // 2, 0, w, h),
        _box(0, 0, w, h // 2),
        _box(0, h // 4, w, 3 * h // 4),
        _box(0, h // 2, w, h),
        _box(0, 0, far_x, far_y),
        _box(near_x, 0, w, far_y),
        _box(0, near_y, far_x, h),
        _box(near_x, near_y, w, h),
    ]


def one_of_four(width: int, height: int) -> list[Cut]:
    """9 boxes of half the sides, in steps of a quarter."""
    return _grid(width, height, parts=4, span=2)


def one_of_nine(width: int, height: int) -> list[Cut]:
    """25 boxes of a third of the sides, in steps of a sixth."""
    return _grid(width, height, parts=6, span=2)


#: Groups of query views for candidates, and how many references are kept for each group (or view).
CANDIDATE_QUERY: dict[str, tuple[Cuts, int]] = {
    "one_of_one": (one_of_one, 100),
    "one_of_two": (one_of_two, 10),
    "one_of_four": (one_of_four, 10),
    "one_of_nine": (one_of_nine, 4),
}


def candidate_query(width: int, height: int, *, released: bool = True) -> list[Cut]:
    """All 45 query views for candidates: the groups of :data:`CANDIDATE_QUERY`, one after the other.

    ``released``: as in :func:`one_of_two`.
    """
    views = [cut for cuts, _ in CANDIDATE_QUERY.values() for cut in cuts(width, height)]
    if not released:
        two = one_of_two(width, height, released=False)
        views[1 : 1 + len(two)] = two
    return views


def candidate_reference(width: int, height: int) -> list[Cut]:
    """9 reference views for candidates: whole, the middle 2/3, four halves near the middle, three quarter turns."""
    w, h = width, height
    middle = [
        _box(left, top, left + w // 2, top + h // 2) for top in (h // 8, 3 * h // 8) for left in (w // 8, 3 * w // 8)
    ]
    return [_WHOLE, _box(w // 6, h // 6, 5 * w // 6, 5 * h // 6), *middle, *(Cut(angle=a) for a in (90, 180, 270))]


def lce_query(width: int, height: int) -> list[Cut]:
    """26 query views of local crops ensembling: 1 whole, 5 central, 4 quadrants, 9 tiles, 7 rotations by 45 degrees."""
    turned = [Cut(angle=45 * k) for k in range(1, 8)]
    return [*lce_reference(width, height), *_grid(width, height, parts=3, span=1), *turned]


def lce_reference(width: int, height: int) -> list[Cut]:
    """10 reference views of local crops ensembling: the whole picture, 5 central boxes and 4 quadrants."""
    w, h = width, height
    central = [
        _box(w // 3, h // 3, 2 * w // 3, 2 * h // 3),
        _box(w // 6, h // 6, w // 2, h // 2),
        _box(w // 2, h // 6, 5 * w // 6, h // 2),
        _box(w // 6, h // 2, w // 2, 5 * h // 6),
        _box(w // 2, h // 2, 5 * w // 6, 5 * h // 6),
    ]
    return [_WHOLE, *central, *_grid(w, h, parts=2, span=1)]


def lce_forwards(queries: int = 26, references: int = 10) -> list[tuple[int, int]]:
    """(query view, reference view) of each forward pass of a pair: all against the whole one of the other side.

    35 of them; 34 are distinct, for the central box is the middle tile.
    """
    return [*((q, 0) for q in range(queries)), *((0, r) for r in range(1, references))]


def _grid(width: int, height: int, *, parts: int, span: int) -> list[Cut]:
    """All boxes of ``span`` of ``parts`` parts of the sides, row by row."""
    steps = range(parts - span + 1)
    return [
        _box(x * width // parts, y * height // parts, (x + span) * width // parts, (y + span) * height // parts)
        for y in steps
        for x in steps
    ]


def _box(left: int, top: int, right: int, bottom: int) -> Cut:
    return Cut((left, top, max(right, left + 1), max(bottom, top + 1)))
