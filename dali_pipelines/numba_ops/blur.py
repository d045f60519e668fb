"""Filters of a neighbourhood: a Gaussian and the median.

Twins: ``fn.gaussian_blur``, and ``fn.experimental.median_blur``, which has no CPU backend.
"""

from __future__ import annotations

import numpy as np

from copynce.compiled_cache import njit


@njit("int64(int64, int64)", nogil=True, cache=True, inline="always")
def _mirrored(k, size):  # type: ignore[no-untyped-def]
    """``k`` reflected at 0 and ``size`` - 1."""
    if size == 1:
        return 0
    while k < 0 or k >= size:
        k = -k if k < 0 else 2 * size - 2 - k
    return k


@njit("float32[::1](float64, int64)", nogil=True, cache=True, error_model="numpy")
def _bell(sigma, reach):  # type: ignore[no-untyped-def]
    """Half a Gaussian, the middle last: ``reach`` + 1 numbers. With their mirror images they sum to 1."""
    bell = np.empty(reach + 1)
    for k in range(reach + 1):
        bell[k] = np.exp(-0.5 * ((reach - k) / sigma) ** 2)
    return (bell / (2.0 * bell.sum() - bell[reach])).astype(np.float32)


@njit("void(uint8[:, :, ::1], float64, int64, uint8[:, :, ::1])", nogil=True, cache=True, error_model="numpy")
def blur_gaussian(pixels, sigma, radius, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` uint8 [H, W, 3] with ``pixels``, each axis convolved with a Gaussian, mirrored.

    ``sigma`` in pixels, cut at ``radius``. Rows first; sums stay float up to the end. The border pixel is not repeated.
    """
    height, width, _ = pixels.shape
    size = 3 * width
    # Taps are taken in pairs of pairs, hence an even reach.
    reach = radius + radius % 2
    weight = np.zeros(reach + 1, np.float32)
    weight[reach - radius :] = _bell(sigma, radius)
    row = np.empty(size + 6 * reach, np.float32)
    narrow = np.empty((height, size), np.float32)
    for y in range(height):
        line = pixels[y].reshape(size)
        inner = row[3 * reach : 3 * reach + size]
        for i in range(size):
            inner[i] = line[i]
        for k in range(1, reach + 1):
            left, right = _mirrored(-k, width), _mirrored(width - 1 + k, width)
            for channel in range(3):
                row[3 * (reach - k) + channel] = line[3 * left + channel]
                row[3 * (reach + width - 1 + k) + channel] = line[3 * right + channel]
        total = narrow[y]
        for i in range(size):
            total[i] = weight[reach] * inner[i]
        for k in range(0, reach, 2):
            a, b = row[3 * k :], row[3 * (2 * reach - k) :]
            c, d = row[3 * (k + 1) :], row[3 * (2 * reach - k - 1) :]
            p, q = weight[k], weight[k + 1]
            for i in range(size):
                total[i] += p * (a[i] + b[i]) + q * (c[i] + d[i])
    total = np.empty(size, np.float32)
    for y in range(height):
        inner = narrow[y]
        for i in range(size):
            total[i] = weight[reach] * inner[i] + np.float32(0.5)
        for k in range(0, reach, 2):
            a, b = narrow[_mirrored(y - reach + k, height)], narrow[_mirrored(y + reach - k, height)]
            c, d = narrow[_mirrored(y - reach + k + 1, height)], narrow[_mirrored(y + reach - k - 1, height)]
            p, q = weight[k], weight[k + 1]
            for i in range(size):
                total[i] += p * (a[i] + b[i]) + q * (c[i] + d[i])
        to = out[y].reshape(size)
        for i in range(size):
            to[i] = np.int32(min(total[i], np.float32(255.0)))


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
