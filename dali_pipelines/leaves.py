"""Numba leaves of the CPU backend: what DALI's CPU operators do several times slower. No DALI here.

``resize_bicubic`` does Pillow's integer arithmetic (cubic kernel with a = -0.5, widened by the scale when shrinking; 22
fractional bits; columns first, rounded to 8 bits between the two passes), so evaluation pictures equal the protocol's
to the bit; its twin is ``fn.resize``. ``jitter_colours`` is one pass of what :func:`dali_pipelines.graph.colour` writes
in operators, its twin. ``remap_bilinear`` and ``apply_curve`` stand for ``fn.experimental.remap`` and
``median`` for ``fn.experimental.median_blur``, which have no CPU backend.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

#: Pillow's fixed point: 32 bits less 8 of the pixel and 2 of head room for the kernel's negative lobes.
_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))

#: RGB to YIQ (NTSC). A turn of the hue by h is  luma + cos(h) * chroma + sin(h) * turned,  in RGB coordinates.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_LUMA = _TO_YIQ[0].astype(np.float32)
_CHROMA = (np.linalg.inv(_TO_YIQ) @ np.diag([0.0, 1.0, 1.0]) @ _TO_YIQ).astype(np.float32)
_TURNED = (np.linalg.inv(_TO_YIQ) @ [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]] @ _TO_YIQ).astype(np.float32)


@njit("Tuple((int32[::1], int32[::1], int32[:, ::1]))(int64, int64)", nogil=True, cache=True)
def _taps(size_in, size_out):  # type: ignore[no-untyped-def]
    """First input pixel, number of taps and fixed-point weights of each output pixel of one axis."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    first = np.empty(size_out, np.int32)
    count = np.empty(size_out, np.int32)
    weight = np.zeros((size_out, int(np.ceil(support)) * 2 + 1), np.int32)
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


@njit("void(uint8[:, :, ::1], uint8[:, :, ::1])", nogil=True, cache=True, error_model="numpy")
def resize_bicubic(source, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` uint8 [H, W, 3] with ``source`` uint8 [h, w, 3], resized as Pillow's ``Image.BICUBIC`` does."""
    height, width, _ = out.shape
    first_x, count_x, weight_x = _taps(source.shape[1], width)
    first_y, count_y, weight_y = _taps(source.shape[0], height)
    top = first_y[0]
    bottom = first_y[height - 1] + count_y[height - 1]
    narrow = np.empty((bottom - top, width * 3), np.uint8)
    # One row as int32 with a fourth, unused channel: four lanes of one vector register.
    row = np.zeros(source.shape[1] * 4, np.int32)
    for y in range(top, bottom):
        for x in range(source.shape[1]):
            row[4 * x] = source[y, x, 0]
            row[4 * x + 1] = source[y, x, 1]
            row[4 * x + 2] = source[y, x, 2]
        for o in range(width):
            a = b = c = d = _HALF
            at = 4 * first_x[o]
            for k in range(count_x[o]):
                w = weight_x[o, k]
                a = np.int32(a + row[at] * w)
                b = np.int32(b + row[at + 1] * w)
                c = np.int32(c + row[at + 2] * w)
                d = np.int32(d + row[at + 3] * w)
                at += 4
            narrow[y - top, 3 * o] = min(max(a >> _BITS, 0), 255)
            narrow[y - top, 3 * o + 1] = min(max(b >> _BITS, 0), 255)
            narrow[y - top, 3 * o + 2] = min(max(c >> _BITS, 0), 255)
    total = np.empty(width * 3, np.int32)
    for o in range(height):
        total[:] = _HALF
        for k in range(count_y[o]):
            w = weight_y[o, k]
            line = narrow[first_y[o] + k - top]
            for i in range(width * 3):
                total[i] = np.int32(total[i] + np.int32(line[i]) * w)
        line = out[o].reshape(width * 3)
        for i in range(width * 3):
            line[i] = min(max(total[i] >> _BITS, 0), 255)


@njit("void(float32[:, :, ::1], float32[::1], float32[:, :, ::1])", nogil=True, cache=True, error_model="numpy")
def jitter_colours(colours, factors, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` float32 [H, W, 3], 0..255: ``factors`` are brightness, contrast, saturation and hue (degrees).

    Brightness, saturation and hue are one matrix: luma kept, the chroma plane of YIQ scaled and turned. Contrast moves
    colours away from the picture's mean luma; the result is clipped once.
    """
    brightness, contrast, saturation, hue = factors[0], factors[1], factors[2], factors[3]
    along = np.float32(saturation * math.cos(math.radians(hue)))
    across = np.float32(saturation * math.sin(math.radians(hue)))
    matrix = np.empty((3, 3), np.float32)
    for i in range(3):
        for j in range(3):
            matrix[i, j] = brightness * (_LUMA[j] + along * _CHROMA[i, j] + across * _TURNED[i, j])
    height, width, _ = colours.shape
    sums = np.zeros(3, np.float64)
    for y in range(height):
        red = green = blue = np.float32(0.0)
        for x in range(width):
            r, g, b = colours[y, x, 0], colours[y, x, 1], colours[y, x, 2]
            u = matrix[0, 0] * r + matrix[0, 1] * g + matrix[0, 2] * b
            v = matrix[1, 0] * r + matrix[1, 1] * g + matrix[1, 2] * b
            w = matrix[2, 0] * r + matrix[2, 1] * g + matrix[2, 2] * b
            out[y, x, 0] = u
            out[y, x, 1] = v
            out[y, x, 2] = w
            red += u
            green += v
            blue += w
        sums[0] += red
        sums[1] += green
        sums[2] += blue
    luma = (_LUMA[0] * sums[0] + _LUMA[1] * sums[1] + _LUMA[2] * sums[2]) / (height * width)
    shift = np.float32((1.0 - contrast) * luma)
    flat = out.reshape(height * width * 3)
    for i in range(flat.size):
        flat[i] = min(max(flat[i] * contrast + shift, np.float32(0.0)), np.float32(255.0))


@njit(["void(uint8[:, :, ::1], float32[:, :, ::1], uint8[:, :, ::1])",
       "void(float32[:, :, ::1], float32[:, :, ::1], float32[:, :, ::1])"],
      nogil=True, cache=True, error_model="numpy")  # fmt: skip
def remap_bilinear(picture, points, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` [H, W, 3] with ``picture`` [h, w, 3] at ``points`` [H, W, 2], (x, y) in its pixels, held at the
    border."""
    height, width, _ = out.shape
    right = np.float32(picture.shape[1] - 1)
    bottom = np.float32(picture.shape[0] - 1)
    last_x = max(picture.shape[1] - 2, 0)
    last_y = max(picture.shape[0] - 2, 0)
    rounding = np.float32(0.5) if out.itemsize == 1 else np.float32(0.0)
    for i in range(height):
        for j in range(width):
            x = min(max(points[i, j, 0] - np.float32(0.5), np.float32(0.0)), right)
            y = min(max(points[i, j, 1] - np.float32(0.5), np.float32(0.0)), bottom)
            x0 = min(int(x), last_x)
            y0 = min(int(y), last_y)
            x1 = min(x0 + 1, picture.shape[1] - 1)
            y1 = min(y0 + 1, picture.shape[0] - 1)
            fx = x - np.float32(x0)
            fy = y - np.float32(y0)
            for c in range(3):
                above = np.float32(picture[y0, x0, c])
                above += fx * (np.float32(picture[y0, x1, c]) - above)
                below = np.float32(picture[y1, x0, c])
                below += fx * (np.float32(picture[y1, x1, c]) - below)
                out[i, j, c] = above + fy * (below - above) + rounding


@njit("void(float32[:, :, ::1], float32[::1], float32[:, :, ::1])", nogil=True, cache=True, error_model="numpy")
def apply_curve(colours, curve, out):  # type: ignore[no-untyped-def]
    """out = ``curve`` [256] at ``colours`` [H, W, 3] (0..255, held at both ends), linear between its entries."""
    flat = colours.reshape(-1)
    to = out.reshape(-1)
    for i in range(flat.size):
        x = min(max(flat[i], np.float32(0.0)), np.float32(255.0))
        k = min(int(x), 254)
        to[i] = curve[k] + (x - np.float32(k)) * (curve[k + 1] - curve[k])


@njit("void(uint8[:, :, ::1], int64, uint8[:, :, ::1])", nogil=True, cache=True, error_model="numpy")
def median(picture, window, out):  # type: ignore[no-untyped-def]
    """out [H, W, 3] = median of each channel over ``window`` x ``window`` pixels, held at the border.

    A histogram slides along the row; ``below`` counts what lies below the median so far (Huang 1979).
    """
    height, width, _ = picture.shape
    reach = window // 2
    half = window * window // 2
    for c in range(3):
        for i in range(height):
            counts = np.zeros(256, np.int32)
            for y in range(i - reach, i + reach + 1):
                for x in range(-reach, reach + 1):
                    counts[picture[min(max(y, 0), height - 1), min(max(x, 0), width - 1), c]] += 1
            middle = 0
            below = 0
            for j in range(width):
                while below > half:
                    middle -= 1
                    below -= counts[middle]
                while below + counts[middle] <= half:
                    below += counts[middle]
                    middle += 1
                out[i, j, c] = middle
                gone = min(max(j - reach, 0), width - 1)
                come = min(max(j + reach + 1, 0), width - 1)
                for y in range(i - reach, i + reach + 1):
                    row = min(max(y, 0), height - 1)
                    old = picture[row, gone, c]
                    new = picture[row, come, c]
                    counts[old] -= 1
                    counts[new] += 1
                    below += (1 if new < middle else 0) - (1 if old < middle else 0)
