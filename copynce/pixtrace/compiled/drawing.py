"""Curves for the strokes of a brush: points of them, and bitmaps."""

from __future__ import annotations

import numpy as np

from copynce.compiled_cache import njit
from copynce.pixtrace.compiled.maps import OPTIONS


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


@njit("void(float64[:, ::1], float64, uint8[:, ::1])", **OPTIONS)
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
