"""Bicubic resize, equal to Pillow's to the bit, so that evaluation pictures are the protocol's.

Pillow's integer arithmetic: cubic kernel with a = -0.5, widened by the scale when shrinking; 22 fractional bits;
columns first, rounded to 8 bits between the two passes. The GPU's twin is ``fn.resize``.
"""

from __future__ import annotations

import numpy as np

from copynce.compiled_cache import njit
from dali_pipelines.numba_ops.memory import load_four, store_four

#: Pillow's fixed point: 32 bits less 8 of the pixel and 2 of head room for the kernel's negative lobes.
_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))
#: Taps that are summed at a time, and rows that are turned at a time: a band fits into the second-level cache.
_GROUP, _BAND = 4, 64


@njit("Tuple((int32[::1], int32[::1], int32[:, ::1]))(int64, int64)", nogil=True, cache=True)
def _taps(size_in, size_out):  # type: ignore[no-untyped-def]
    """First input pixel, number of taps and fixed-point weights of each output pixel of one axis.

    The table of weights is padded with zeros to whole groups of ``_GROUP`` taps.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    first = np.empty(size_out, np.int32)
    count = np.empty(size_out, np.int32)
    weight = np.zeros((size_out, int(np.ceil(support)) * 2 + _GROUP), np.int32)
    raw = np.empty(weight.shape[1])
    for o in range(size_out):
        centre = (o + 0.5) * scale
        low = max(0, int(centre - support + 0.5))
        high = min(size_in, int(centre + support + 0.5))
        total = 0.0
        for k in range(high - low):
            x = abs((k + low - centre + 0.5) / stretch)
            if x < 1.0:
                raw[k] = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                raw[k] = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            else:
                raw[k] = 0.0
            total += raw[k]
        first[o] = low
        count[o] = high - low
        for k in range(high - low):
            value = raw[k] / total * (1 << _BITS)
            weight[o, k] = int(value - 0.5) if value < 0 else int(value + 0.5)
    return first, count, weight


@njit("void(uint8[:, ::1], int32[::1], int32[::1], int32[:, ::1], uint8[:, ::1])", nogil=True, cache=True)
def _combine(lines, first, count, weight, out):  # type: ignore[no-untyped-def]
    """Fill each line of ``out`` [N, m] with the weighted sum of its taps among ``lines`` [n, m or more].

    Sums lie along the lines, where vector registers fill; several taps at a time, as the sums pass through memory. The
    last one to four taps go from registers into ``out``.
    """
    last = lines.shape[0] - 1
    size = out.shape[1]
    total = np.empty(size, np.int32)
    for o in range(out.shape[0]):
        line = out[o]
        before = (count[o] - 1) // _GROUP * _GROUP
        total[:] = _HALF
        for k in range(0, before + 1, _GROUP):
            at = first[o] + k
            p, q, r, s = weight[o, k], weight[o, k + 1], weight[o, k + 2], weight[o, k + 3]
            a, b = lines[at], lines[min(at + 1, last)]
            c, d = lines[min(at + 2, last)], lines[min(at + 3, last)]
            if k < before:
                for i in range(size):
                    total[i] += np.int32(a[i]) * p + np.int32(b[i]) * q + np.int32(c[i]) * r + np.int32(d[i]) * s
            elif count[o] - k == 4:
                for i in range(size):
                    part = np.int32(a[i]) * p + np.int32(b[i]) * q + np.int32(c[i]) * r + np.int32(d[i]) * s
                    line[i] = min(max(np.int32(total[i] + part) >> _BITS, 0), 255)
            elif count[o] - k == 3:
                for i in range(size):
                    part = np.int32(a[i]) * p + np.int32(b[i]) * q + np.int32(c[i]) * r
                    line[i] = min(max(np.int32(total[i] + part) >> _BITS, 0), 255)
            elif count[o] - k == 2:
                for i in range(size):
                    part = np.int32(a[i]) * p + np.int32(b[i]) * q
                    line[i] = min(max(np.int32(total[i] + part) >> _BITS, 0), 255)
            else:
                for i in range(size):
                    line[i] = min(max(np.int32(total[i] + np.int32(a[i]) * p) >> _BITS, 0), 255)


@njit("void(uint8[:, ::1], uint8[:, ::1])", nogil=True, cache=True)
def _turn(lines, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` [m or more, 3 n or more] with the transpose of ``lines`` [n, 3 m], three bytes to an element.

    A fourth byte is copied with each; the next copies write over it. The last column has no next one.
    """
    count, columns = lines.shape[0], lines.shape[1] // 3
    source, to = np.uint64(lines.ctypes.data), np.uint64(out.ctypes.data)
    down, across = np.uint64(lines.shape[1]), np.uint64(out.shape[1])
    three = np.uint64(3)
    for j in range(columns - 1):
        for k in range(count):
            pixel = load_four(source + np.uint64(k) * down + np.uint64(j) * three)
            store_four(to + np.uint64(j) * across + np.uint64(k) * three, pixel)
    last = lines[:, 3 * (columns - 1) :]
    for k in range(count):
        for channel in range(3):
            out[columns - 1, 3 * k + channel] = last[k, channel]


@njit("void(uint8[:, :, ::1], uint8[:, :, ::1])", nogil=True, cache=True, error_model="numpy")
def resize_bicubic(source, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` uint8 [H, W, 3] with ``source`` uint8 [h, w, 3], resized as Pillow's ``Image.BICUBIC`` does.

    Both axes are shrunk by sums of whole lines; for the first, bands of rows are turned, and back.
    """
    height, width, _ = out.shape
    columns = source.shape[1]
    first, count, weight = _taps(source.shape[0], height)
    first_x, count_x, weight_x = _taps(columns, width)
    top = first[0]
    bottom = first[height - 1] + count[height - 1]
    for o in range(height):
        first[o] -= top
    upright = np.empty((columns, 3 * _BAND), np.uint8)
    shrunk = np.empty((width, 3 * _BAND), np.uint8)
    bands = -(-(bottom - top) // _BAND)
    narrow = np.empty((bands * _BAND, 3 * width), np.uint8)
    for k in range(bands):
        rows = source[top + k * _BAND : min(top + (k + 1) * _BAND, bottom)]
        _turn(rows.reshape(rows.shape[0], 3 * columns), upright)
        _combine(upright, first_x, count_x, weight_x, shrunk)
        _turn(shrunk, narrow[k * _BAND : (k + 1) * _BAND])
    _combine(narrow, first, count, weight, out.reshape(height, 3 * width))
