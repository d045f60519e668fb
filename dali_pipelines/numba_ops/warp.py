"""Bilinear pictures at places that a homography or a dense map gives.

Twins: ``fn.experimental.warp_perspective``, and ``fn.experimental.remap``, which has no CPU backend.
"""

from __future__ import annotations

import numpy as np

from copynce.compiled_cache import njit
from dali_pipelines.numba_ops.memory import load_four, store_four

_BYTES = "uint8[:, :, ::1]"


@njit(
    f"void({_BYTES}, float32[:, ::1], int32[::1], uint8[:, ::1], float32[:, ::1], uint8[::1])", nogil=True, cache=True
)
def _interpolate(picture, places, at, corners, shares, line):  # type: ignore[no-untyped-def]
    """Fill a ``line`` [3 W] with ``picture`` at the columns ``places[0]`` and rows ``places[1]``, held at the border.

    ``picture`` has two columns or more. ``at``, ``corners`` [4, 3 W + 1] and ``shares`` are scratch. Only fetching the
    four pixels around a place is done one by one: each from left to right, for its fourth byte lies where the next
    one's first will, and behind the last there is a byte more than pixels need.
    """
    height, width, _ = picture.shape
    size = at.size
    zero, half = np.float32(0.0), np.float32(0.5)
    last_x, last_y = np.float32(width - 1), np.float32(height - 1)
    most_x, most_y = np.int32(width - 2), np.int32(max(height - 2, 0))
    for j in range(size):
        x, y = places[0, j] - half, places[1, j] - half
        # In this form what is no number becomes 0.
        x = x if x > zero else zero
        y = y if y > zero else zero
        x = x if x < last_x else last_x
        y = y if y < last_y else last_y
        x0, y0 = min(np.int32(x), most_x), min(np.int32(y), most_y)
        places[0, j], places[1, j] = x - np.float32(x0), y - np.float32(y0)
        at[j] = 3 * (y0 * np.int32(width) + x0)
    for axis in range(2):
        for j in range(size):
            shares[axis, 3 * j] = shares[axis, 3 * j + 1] = shares[axis, 3 * j + 2] = places[axis, j]
    source, down = np.uint64(picture.ctypes.data), np.uint64(3 * width if height > 1 else 0)
    to, across = np.uint64(corners.ctypes.data), np.uint64(corners.shape[1])
    for j in range(size):
        pixel = source + np.uint64(at[j])
        for _ in range(2):
            store_four(to, load_four(pixel))
            # The right one's first byte is the fourth from two bytes on: nothing is read behind the picture's end.
            store_four(to + across, load_four(pixel + np.uint64(2)) >> np.uint32(8))
            pixel += down
            to += across + across
        to += np.uint64(3) - across * np.uint64(4)
    for i in range(3 * size):
        above, below = np.float32(corners[0, i]), np.float32(corners[2, i])
        above += shares[0, i] * (np.float32(corners[1, i]) - above)
        below += shares[0, i] * (np.float32(corners[3, i]) - below)
        line[i] = np.int32(above + shares[1, i] * (below - above) + half)


@njit(f"{_BYTES}({_BYTES})", nogil=True, cache=True)
def _two_columns(picture):  # type: ignore[no-untyped-def]
    """``picture``, or its only column twice."""
    if picture.shape[1] > 1:
        return picture
    doubled = np.empty((picture.shape[0], 2, 3), np.uint8)
    doubled[:, 0] = doubled[:, 1] = picture[:, 0]
    return doubled


@njit(f"void({_BYTES}, float32[:, :, ::1], {_BYTES})", nogil=True, cache=True, error_model="numpy")
def remap_bilinear(picture, points, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` [H, W, 3] with ``picture`` [h, w, 3] at ``points`` [H, W, 2], (x, y) in its pixels, held at the
    border."""
    picture = _two_columns(picture)
    height, width, _ = out.shape
    places, shares = np.empty((2, width), np.float32), np.empty((2, 3 * width), np.float32)
    at, corners = np.empty(width, np.int32), np.empty((4, 3 * width + 1), np.uint8)
    for i in range(height):
        for j in range(width):
            places[0, j], places[1, j] = points[i, j, 0], points[i, j, 1]
        _interpolate(picture, places, at, corners, shares, out[i].reshape(3 * width))


@njit(f"void({_BYTES}, float32[:, ::1], {_BYTES})", nogil=True, cache=True, error_model="numpy")
def warp_bilinear(picture, matrix, out):  # type: ignore[no-untyped-def]
    """As :func:`remap_bilinear`, at the points to which the homography ``matrix`` [3, 3] takes those of ``out``."""
    picture = _two_columns(picture)
    height, width, _ = out.shape
    places, shares = np.empty((2, width), np.float32), np.empty((2, 3 * width), np.float32)
    at, corners = np.empty(width, np.int32), np.empty((4, 3 * width + 1), np.uint8)
    half, one = np.float32(0.5), np.float32(1.0)
    a, b, c = matrix[0, 0], matrix[1, 0], matrix[2, 0]
    for i in range(height):
        v = np.float32(i) + half
        x, y, z = matrix[:, 1] * v + matrix[:, 2]
        for j in range(width):
            u = np.float32(j) + half
            far = one / (c * u + z)
            places[0, j], places[1, j] = (a * u + x) * far, (b * u + y) * far
        _interpolate(picture, places, at, corners, shares, out[i].reshape(3 * width))
