"""3x3 maps, and the pixels that a row of a view is mapped to.

A point that lies on the border of two pixels belongs to the right or lower one, as with :func:`math.floor`, and so does
one that rounding has put up to ``TIE`` before it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from copynce.compiled_cache import njit

#: Up to this distance in pixels a point counts as lying on an edge. Above the rounding of composed matrices, below
#: sight.
TIE = 1e-7

_FIXED = 2.0**32
_HALF = np.uint64(32)
_INSIDE = 1e-9  # above the rounding of a coordinate, below TIE

# How all of this folder is compiled. Functions release the GIL, draw on nothing global and write into arrays that the
# caller owns. The error model drops the test for division by zero, which would keep the loops from vectorising.
# "contract" only lets a product and a sum become one instruction; it assumes nothing about NaN, infinity or order.
OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit("void(float64[:, ::1], float64[:, ::1])", **OPTIONS)
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


@njit(**OPTIONS)
def multiply(p, q, out):  # type: ignore[no-untyped-def]
    """out = p @ q, all 3x3."""
    for i in range(3):
        for j in range(3):
            out[i, j] = p[i, 0] * q[0, j] + p[i, 1] * q[1, j] + p[i, 2] * q[2, j]


@njit(**OPTIONS)
def pull_row(m, first, y, width, height, out):  # type: ignore[no-untyped-def]
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
