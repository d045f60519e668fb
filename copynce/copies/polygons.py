"""Convex polygons and projective maps in the plane. Polygons: float64 [n, 2] of (x, y); maps: float64 [3, 3]."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]

_EPS = 1e-9


def rectangle(width: float, height: float, left: float = 0.0, top: float = 0.0) -> Points:
    """The corners of an upright rectangle, clockwise in a picture from the top left."""
    right, bottom = left + width, top + height
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)


def mapped(matrix: ArrayLike, points: ArrayLike) -> Points:
    """Points [n, 2] under a projective map."""
    xy = np.asarray(points, np.float64).reshape(-1, 2)
    out = np.column_stack([xy, np.ones(len(xy))]) @ np.asarray(matrix, np.float64).T
    return out[:, :2] / out[:, 2:]


def area(polygon: ArrayLike) -> float:
    """Area of a polygon, 0 for fewer than three corners.

    >>> area(rectangle(3, 2))
    6.0
    """
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    return abs(_signed(points)) if len(points) > 2 else 0.0


def clipped(polygon: ArrayLike, window: ArrayLike) -> Points:
    """The part of a convex polygon that lies in a convex window [m, 2]; [0, 2] if there is none.

    >>> area(clipped(rectangle(2, 2), rectangle(2, 2, left=1, top=1)))
    1.0
    """
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    frame = np.asarray(window, np.float64).reshape(-1, 2)
    turn = 1.0 if _signed(frame) > 0 else -1.0
    for start, end in zip(frame, np.roll(frame, -1, axis=0), strict=True):
        if not len(points):
            break
        edge = end - start
        side = turn * (edge[0] * (points[:, 1] - start[1]) - edge[1] * (points[:, 0] - start[0]))
        kept = []
        for k in range(len(points)):
            here, there = side[k - 1], side[k]
            if (here >= -_EPS) != (there >= -_EPS):
                kept.append(points[k - 1] + (points[k] - points[k - 1]) * (here / (here - there)))
            if there >= -_EPS:
                kept.append(points[k])
        points = np.array(kept, np.float64).reshape(-1, 2)
    return points


def simplified(polygon: ArrayLike, tolerance: float) -> Points:
    """A convex polygon without the corners that lie within `tolerance` of the line between their neighbours.

    >>> simplified([[0, 0], [1, 0.001], [2, 0], [2, 2]], 0.01).tolist()
    [[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]]
    """
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    while len(points) > 3:
        before, after = np.roll(points, 1, axis=0), np.roll(points, -1, axis=0)
        line, away = after - before, points - before
        length = np.maximum(np.linalg.norm(line, axis=1), _EPS)
        off = np.abs(line[:, 0] * away[:, 1] - line[:, 1] * away[:, 0]) / length
        least = int(off.argmin())
        if off[least] > tolerance:
            break
        points = np.delete(points, least, axis=0)
    return points


def contains(polygon: ArrayLike, points: ArrayLike) -> NDArray[np.bool_]:
    """Whether each of the points [n, 2] lies in a convex polygon, [n]; in none of fewer than three corners.

    >>> contains(rectangle(2, 2), [[1, 1], [3, 1]])
    array([ True, False])
    """
    corners, xy = (np.asarray(given, np.float64).reshape(-1, 2) for given in (polygon, points))
    if len(corners) < 3:
        return np.zeros(len(xy), np.bool_)
    edges, away = np.roll(corners, -1, axis=0) - corners, xy[:, None] - corners
    side = edges[:, 0] * away[..., 1] - edges[:, 1] * away[..., 0]
    return np.all(side >= -_EPS, axis=1) | np.all(side <= _EPS, axis=1)


def overlap(one: ArrayLike, other: ArrayLike) -> float:
    """Intersection over union of two convex polygons, 0 where both are empty.

    >>> round(overlap(rectangle(2, 2), rectangle(2, 2, left=1)), 3)
    0.333
    """
    shared = area(clipped(one, other)) if area(one) > 0 and area(other) > 0 else 0.0
    union = area(one) + area(other) - shared
    return shared / union if union > 0 else 0.0


def _signed(points: Points) -> float:
    x, y = points[:, 0], points[:, 1]
    return 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
