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
