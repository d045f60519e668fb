"""Views of one decoded picture for evaluation: boxes and turned wholes, each resized, as Pillow would do it."""

from __future__ import annotations

import numpy as np

from copynce.compiled_cache import njit
from dali_pipelines.numba_ops.layout import CUT_HEIGHT, CUT_MAP, CUT_WIDTH
from dali_pipelines.numba_ops.resize import resize_bicubic


@njit("float64(float64, float64, float64, float64, float64)", nogil=True, cache=True, inline="always")
def _cubic(a, b, c, d, t):  # type: ignore[no-untyped-def]
    """Between ``b`` and ``c`` at ``t``, as Pillow's transforms do it (a = -1, unlike its resize)."""
    return b + t * (c - a + t * (2.0 * (a - b) + c - d + t * (b - a + d - c)))


@njit("float64(uint8[:, :, ::1], int64, UniTuple(int64, 4), int64, float64)", nogil=True, cache=True, inline="always")
def _along(picture, row, columns, channel, t):  # type: ignore[no-untyped-def]
    """One channel of a row of ``picture`` between four ``columns``."""
    line = picture[row]
    return _cubic(
        float(line[columns[0], channel]),
        float(line[columns[1], channel]),
        float(line[columns[2], channel]),
        float(line[columns[3], channel]),
        t,
    )


@njit("uint8[:, :, ::1](uint8[:, :, ::1], float64[::1])", nogil=True, cache=True, error_model="numpy")
def _canvas(picture, row):  # type: ignore[no-untyped-def]
    """uint8 [h, w, 3]: the pixels that :meth:`Cut.row` describes, black where they lie outside of ``picture``."""
    height, width, _ = picture.shape
    canvas = np.zeros((int(row[CUT_HEIGHT]), int(row[CUT_WIDTH]), 3), np.uint8)
    a, b, c = row[CUT_MAP], row[CUT_MAP + 1], row[CUT_MAP + 2]
    d, e, f = row[CUT_MAP + 3], row[CUT_MAP + 4], row[CUT_MAP + 5]
    # Boxes and quarter turns take whole pixels, which nothing may smooth.
    turned = abs(a) + abs(b) != 1.0
    for i in range(canvas.shape[0]):
        for j in range(canvas.shape[1]):
            x = a * (j + 0.5) + b * (i + 0.5) + c
            y = d * (j + 0.5) + e * (i + 0.5) + f
            if not (0.0 <= x < width and 0.0 <= y < height):
                continue
            if not turned:
                canvas[i, j] = picture[int(y), int(x)]
                continue
            x0, y0 = int(np.floor(x - 0.5)), int(np.floor(y - 0.5))
            columns = (max(x0 - 1, 0), max(x0, 0), min(x0 + 1, width - 1), min(x0 + 2, width - 1))
            rows = (max(y0 - 1, 0), max(y0, 0), min(y0 + 1, height - 1), min(y0 + 2, height - 1))
            for k in range(3):
                value = _cubic(
                    _along(picture, rows[0], columns, k, x - 0.5 - x0),
                    _along(picture, rows[1], columns, k, x - 0.5 - x0),
                    _along(picture, rows[2], columns, k, x - 0.5 - x0),
                    _along(picture, rows[3], columns, k, x - 0.5 - x0),
                    y - 0.5 - y0,
                )
                canvas[i, j, k] = int(min(max(value, 0.0), 255.0))  # cut off, not rounded, as Pillow does
    return canvas


@njit("void(uint8[:, :, ::1], float64[:, ::1], uint8[:, :, ::1])", nogil=True, cache=True)
def cut_views(picture, rows, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` uint8 [V * S, S, 3], one view below the other: what each row of ``rows`` [V, 8] shows, resized."""
    height, width, _ = picture.shape
    side = out.shape[1]
    whole = np.array([width, height, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    for v in range(rows.shape[0]):
        view = out[v * side : (v + 1) * side]
        if (rows[v] == whole).all():
            resize_bicubic(picture, view)
        else:
            resize_bicubic(_canvas(picture, rows[v]), view)
