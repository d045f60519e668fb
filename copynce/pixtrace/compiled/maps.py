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

#: Fixed point: so many bits of a 64-bit number are the fraction, so a pixel is so many units.
_FRACTION_BITS = np.uint64(32)
_UNITS = 2.0**32
#: Distance in pixels from the grid's border within which rounding may put a coordinate beyond it. Below TIE.
_INSIDE = 1e-9

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
def _clamped(value, most):  # type: ignore[no-untyped-def]
    """``value`` held in [0, most]; 0 for nan."""
    value = value if value > 0.0 else 0.0
    return value if value < most else most


@njit(**OPTIONS)
def pull_row(m, first, y, width, height, out):  # type: ignore[no-untyped-def]
    """out[j] = row-major pixel of a ``height`` x ``width`` grid that centre (first + j + 0.5, y) maps to.

    The centres lie inside of the grid up to rounding, so clamping replaces a test (and whatever comes, nan included,
    no index leaves the grid). TIE puts a point that lies on the border of two pixels, up to rounding, into the right
    or lower one.
    """
    if m[2, 0] == 0.0:
        _pull_row_evenly(m, first, y, width, height, out)
    else:
        _pull_row_in_perspective(m, first, y, width, height, out)


# Inlined by Numba: LLVM calls functions of this size, and a call a row shows in the time of a table.
@njit(inline="always", **OPTIONS)
def _pull_row_evenly(m, first, y, width, height, out):  # type: ignore[no-untyped-def]
    """:func:`pull_row` where depth does not change along the row: the points lie evenly on a line.

    In 32.32 fixed point a pixel takes two integer additions. Steps are rounded to a unit, so the line is off by less
    than TIE over 800 pixels.
    """
    start = first + 0.5
    scale = _UNITS / (m[2, 1] * y + m[2, 2])
    steps = float(max(out.size - 1, 0))
    u = (m[0, 0] * start + (m[0, 1] * y + m[0, 2])) * scale + TIE * _UNITS
    v = (m[1, 0] * start + (m[1, 1] * y + m[1, 2])) * scale + TIE * _UNITS
    across = math.floor(m[0, 0] * scale + 0.5)
    down = math.floor(m[1, 0] * scale + 0.5)
    # The ends decide whether the line stays inside; only rounding at a border ever takes it out.
    if (
        min(u, u + across * steps) >= 0.0
        and max(u, u + across * steps) < width * _UNITS - 1.0
        and min(v, v + down * steps) >= 0.0
        and max(v, v + down * steps) < height * _UNITS - 1.0
    ):
        fixed_u = np.uint64(np.int64(u))
        fixed_v = np.uint64(np.int64(v))
        step_u = np.uint64(np.int64(across))  # a negative one wraps around, and so does the sum, back again
        step_v = np.uint64(np.int64(down))
        pitch = np.uint64(width)
        for j in range(out.size):
            out[j] = np.int32((fixed_v >> _FRACTION_BITS) * pitch + (fixed_u >> _FRACTION_BITS))
            fixed_u += step_u
            fixed_v += step_v
        return
    right = float(width - 1)
    bottom = float(height - 1)
    for j in range(out.size):
        column = _clamped((u + j * across) / _UNITS, right)
        row = _clamped((v + j * down) / _UNITS, bottom)
        out[j] = np.int32(row) * np.int32(width) + np.int32(column)


@njit(inline="always", **OPTIONS)
def _pull_row_in_perspective(m, first, y, width, height, out):  # type: ignore[no-untyped-def]
    """:func:`pull_row` where depth changes along the row: a division a pixel."""
    start = first + 0.5
    stop = start + max(out.size - 1, 0)
    u0 = m[0, 1] * y + m[0, 2]
    v0 = m[1, 1] * y + m[1, 2]
    w0 = m[2, 1] * y + m[2, 2]
    a = m[0, 0]
    d = m[1, 0]
    g = m[2, 0]
    pitch = np.int32(width)
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
    right = float(width - 1)
    bottom = float(height - 1)
    for j in range(out.size):
        x = np.float64(np.int32(j)) + start
        s = 1.0 / (g * x + w0)
        column = _clamped((a * x + u0) * s + TIE, right)
        row = _clamped((d * x + v0) * s + TIE, bottom)
        out[j] = np.int32(row) * pitch + np.int32(column)
