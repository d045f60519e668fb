"""Numba leaves of PixTrace: every loop over pixels.

Regions are intersections of half-planes ``planes [K, 3] float64`` in homogeneous output coordinates: the pixel centre
``(x, y, 1)`` belongs to the region if ``planes @ (x, y, 1) >= 0`` for every plane. A convex region meets a row in one
span, so each row costs K divisions and the inner loops test nothing.

All functions release the GIL and write into arrays that the caller owns.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

# A centre that lies on a region's edge up to rounding belongs to the pixel on whose side the exact value would lie.
_TIE = 1e-7


@njit(nogil=True, cache=True, inline="always")
def _span(planes, y, width):  # type: ignore[no-untyped-def]
    """Columns [first, last) of row centre ``y`` that lie in the region."""
    first = 0
    last = width
    for k in range(planes.shape[0]):
        slope = planes[k, 0]
        rest = planes[k, 1] * y + planes[k, 2]
        if slope > 1e-15:
            edge = math.ceil(-rest / slope - 0.5 - _TIE)
            if edge > first:
                first = int(min(edge, width))
        elif slope < -1e-15:
            edge = math.ceil(-rest / slope - 0.5 - _TIE)
            if edge < last:
                last = int(max(edge, 0))
        elif rest < 0.0:
            return 0, 0
    return first, max(first, last)


@njit("void(float64[:, ::1], float64[:, ::1], int64, int64, int32[:, ::1])", nogil=True, cache=True)
def trace_projective(to_grid, planes, grid_height, grid_width, index):  # type: ignore[no-untyped-def]
    """index[i, j] = row-major grid pixel that centre (j+0.5, i+0.5) comes from through ``to_grid``; -1 outside."""
    height, width = index.shape
    affine = to_grid[2, 0] == 0.0 and to_grid[2, 1] == 0.0
    for i in range(height):
        y = i + 0.5
        first, last = _span(planes, y, width)
        for j in range(first):
            index[i, j] = -1
        for j in range(last, width):
            index[i, j] = -1
        u0 = to_grid[0, 1] * y + to_grid[0, 2]
        v0 = to_grid[1, 1] * y + to_grid[1, 2]
        w0 = to_grid[2, 1] * y + to_grid[2, 2]
        if affine:
            for j in range(first, last):
                x = j + 0.5
                # The region lies inside of the grid up to rounding, so clamping replaces a test.
                u = min(max(int((to_grid[0, 0] * x + u0) / w0), 0), grid_width - 1)
                v = min(max(int((to_grid[1, 0] * x + v0) / w0), 0), grid_height - 1)
                index[i, j] = v * grid_width + u
        else:
            for j in range(first, last):
                x = j + 0.5
                inverse = 1.0 / (to_grid[2, 0] * x + w0)
                u = min(max(int((to_grid[0, 0] * x + u0) * inverse), 0), grid_width - 1)
                v = min(max(int((to_grid[1, 0] * x + v0) * inverse), 0), grid_height - 1)
                index[i, j] = v * grid_width + u


@njit("void(float64[:, ::1], int32[:, ::1], boolean, int32[:, ::1], int32[:, ::1])", nogil=True, cache=True)
def project(matrix, own, use_own, other, index):  # type: ignore[no-untyped-def]
    """index[i, j] = row-major pixel of ``other`` that centre (j+0.5, i+0.5) falls on through ``matrix``.

    -1 where it falls outside, behind the viewer, on an ``other`` of -1, or where ``own`` (if used) is -1.
    """
    height, width = index.shape
    other_height, other_width = other.shape
    for i in range(height):
        y = i + 0.5
        u0 = matrix[0, 1] * y + matrix[0, 2]
        v0 = matrix[1, 1] * y + matrix[1, 2]
        w0 = matrix[2, 1] * y + matrix[2, 2]
        for j in range(width):
            found = -1
            if not use_own or own[i, j] >= 0:
                x = j + 0.5
                w = matrix[2, 0] * x + w0
                if w > 0.0:
                    u = math.floor((matrix[0, 0] * x + u0) / w)
                    v = math.floor((matrix[1, 0] * x + v0) / w)
                    if 0 <= u < other_width and 0 <= v < other_height and other[int(v), int(u)] >= 0:
                        found = int(v) * other_width + int(u)
            index[i, j] = found


@njit("void(int32[:, ::1], int32[::1], int32[:, ::1])", nogil=True, cache=True)
def gather(index, other, out):  # type: ignore[no-untyped-def]
    """out = other[index], -1 where index is -1."""
    height, width = index.shape
    for i in range(height):
        for j in range(width):
            k = index[i, j]
            out[i, j] = other[k] if k >= 0 else -1


@njit("void(int32[:, ::1], int32[::1])", nogil=True, cache=True)
def scatter(index, out):  # type: ignore[no-untyped-def]
    """out[index[i, j]] = i * width + j, in raster order: the last of several pixels wins. ``out`` starts at -1."""
    height, width = index.shape
    for i in range(height):
        for j in range(width):
            k = index[i, j]
            if k >= 0:
                out[k] = i * width + j


@njit("void(float64[:, ::1], float64, uint8[:, ::1])", nogil=True, cache=True)
def fade(planes, factor, weight):  # type: ignore[no-untyped-def]
    """Multiply ``weight`` by ``factor`` inside of the region, rounding to nearest."""
    height, width = weight.shape
    scale = int(round(factor * 255.0))
    for i in range(height):
        first, last = _span(planes, i + 0.5, width)
        for j in range(first, last):
            weight[i, j] = np.uint8((int(weight[i, j]) * scale + 127) // 255)


@njit("void(float64[:, ::1], uint8, uint8[:, ::1])", nogil=True, cache=True)
def fill(planes, value, weight):  # type: ignore[no-untyped-def]
    """Set ``weight`` to ``value`` inside of the region."""
    height, width = weight.shape
    for i in range(height):
        first, last = _span(planes, i + 0.5, width)
        for j in range(first, last):
            weight[i, j] = value


@njit("void(uint8[:, ::1], uint8, int32[:, ::1])", nogil=True, cache=True)
def hide(weight, least, index):  # type: ignore[no-untyped-def]
    """index = -1 wherever the picture's blending weight is below ``least``."""
    height, width = index.shape
    for i in range(height):
        for j in range(width):
            if weight[i, j] < least:
                index[i, j] = -1


@njit("void(int32[:, ::1], int64, int64, int32[:, ::1])", nogil=True, cache=True)
def count_overlap(index, patch, grid_width, counts):  # type: ignore[no-untyped-def]
    """counts[p, q] += 1 for every pixel of patch p whose source lies in grid patch q; ``counts`` starts at 0."""
    height, width = index.shape
    columns = width // patch
    grid_columns = grid_width // patch
    for i in range(height):
        row = (i // patch) * columns
        for j in range(width):
            k = index[i, j]
            if k >= 0:
                y = k // grid_width
                x = k - y * grid_width
                counts[row + j // patch, (y // patch) * grid_columns + x // patch] += 1
