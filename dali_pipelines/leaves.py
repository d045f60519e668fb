"""Numba leaves of the CPU backend: what DALI's CPU operators do several times slower. No DALI here.

``resize_bicubic`` does Pillow's integer arithmetic (cubic kernel with a = -0.5, widened by the scale when shrinking; 22
fractional bits; columns first, rounded to 8 bits between the two passes), so evaluation pictures equal the protocol's
to the bit; its twin is ``fn.resize``. ``warp_bilinear``, ``compose_view``, ``jitter_colours``, ``blur_gaussian`` and
``finish_view`` are what the functions ``..._twin`` of :mod:`dali_pipelines.graph` write in operators. For
``remap_bilinear`` and ``apply_curve`` that is ``fn.experimental.remap``, for ``median`` it is
``fn.experimental.median_blur``, which have no CPU backend.

``compose_view`` does all geometry, blending and colour jitter of a view at once: an operator, an input or a branch of
DALI costs 0.1 to 0.5 ms a batch, whatever it does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from copynce.compiled_cache import cfunc, njit

#: Pillow's fixed point: 32 bits less 8 of the pixel and 2 of head room for the kernel's negative lobes.
_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))
#: Taps that are summed at a time, and rows that are turned at a time: a band fits into the second-level cache.
_GROUP, _BAND = 4, 64

#: ITU-R 601 luma of R, G, B.
_RED, _GREEN, _BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)
_IDLE = np.eye(3, 4, dtype=np.float32)
_SHARE = np.float32(1.0 / 255.0)
_BYTES = "uint8[:, :, ::1]"

#: Pixels that are worked on at a time, so that what is between two steps stays in the first-level cache.
_RUN = 1024

#: Clipped steps of the colour jitter: its four, then a grayscale.
COLOUR_STEPS = 5

#: What a view's vector of numbers (float32) holds, in this order, and the shape of each. The first four are of the
#: picture and of two layers: how each comes to its place (``AS_IS``, ``BY_MATRIX``, or the number of its dense map),
#: height and width to which it is shrunk before, its matrix (output points to its pixels), and the plane of its
#: weights. Numbers of planes, maps and noises are -1 where there is none. The table stands here, not where it is
#: filled, for the leaves have it compiled in.
NUMBERS: dict[str, tuple[int, ...]] = {
    "way": (3,),
    "working": (3, 2),
    "matrix": (3, 3, 3),
    "weight": (3,),
    "painted": (),  # first of the three planes that hold painted colours
    "steps": (COLOUR_STEPS, 3, 4),
    "mixing": (3, 4),
    "levels": (256,),
    "drops": (),  # plane
    "window": (),
    "cells": (2,),
    "places": (),  # map
    "grain": (),  # noise
    "sigma": (),
    "reach": (),
    "quality": (),
    "mask": (),  # plane; its noise is the first
}
AS_IS, BY_MATRIX = -2, -1


def _places() -> dict[str, slice]:
    ends = np.cumsum([math.prod(shape) for shape in NUMBERS.values()]).tolist()
    return {name: slice(end - math.prod(NUMBERS[name]), end) for name, end in zip(NUMBERS, ends, strict=True)}


#: Where in the vector each of ``NUMBERS`` is.
PLACES = _places()
_WAY, _WORKING, _MATRIX = PLACES["way"].start, PLACES["working"].start, PLACES["matrix"].start
_WEIGHT, _PAINTED, _MASK = PLACES["weight"].start, PLACES["painted"].start, PLACES["mask"].start
_STEPS, _STEPS_END = PLACES["steps"].start, PLACES["steps"].stop
_MIXING, _LEVELS, _WINDOW = PLACES["mixing"].start, PLACES["levels"].start, PLACES["window"].start
_COUNT_OF_NUMBERS = PLACES["mask"].stop
_SIGMA, _REACH = PLACES["sigma"].start, PLACES["reach"].start


def _load_four_bytes(_context, address):  # type: ignore[no-untyped-def]
    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()), align=1)

    return types.uint32(address), generate


def _store_four_bytes(_context, address, _value):  # type: ignore[no-untyped-def]
    def generate(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(address, types.uint32), generate


# Four bytes from and to any address. Pixels of three bytes are moved so, at a third of the cost of byte by byte: arrays
# have no such elements.
_load_four: Any = intrinsic(_load_four_bytes)
_store_four: Any = intrinsic(_store_four_bytes)


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
            pixel = _load_four(source + np.uint64(k) * down + np.uint64(j) * three)
            _store_four(to + np.uint64(j) * across + np.uint64(k) * three, pixel)
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


@njit("float64(float64, float64, float64, float64, float64)", nogil=True, cache=True, inline="always")
def _cubic(a, b, c, d, t):  # type: ignore[no-untyped-def]
    """Between ``b`` and ``c`` at ``t``, as Pillow's transforms do it (a = -1, unlike its resize)."""
    return b + t * (c - a + t * (2.0 * (a - b) + c - d + t * (b - a + d - c)))


@njit("float64(uint8[:, :, ::1], int64, UniTuple(int64, 4), int64, float64)", nogil=True, cache=True, inline="always")
def _along(picture, row, columns, channel, t):  # type: ignore[no-untyped-def]
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
    canvas = np.zeros((int(row[1]), int(row[0]), 3), np.uint8)
    turned = abs(row[2]) + abs(row[3]) != 1.0
    for i in range(canvas.shape[0]):
        for j in range(canvas.shape[1]):
            x = row[2] * (j + 0.5) + row[3] * (i + 0.5) + row[4]
            y = row[5] * (j + 0.5) + row[6] * (i + 0.5) + row[7]
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
                canvas[i, j, k] = int(min(max(value, 0.0), 255.0))
    return canvas


@njit("void(uint8[:, :, ::1], float64[:, ::1], uint8[:, :, ::1])", nogil=True, cache=True)
def cut_views(picture, rows, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` uint8 [V * S, S, 3], one view below the other: each row of ``rows`` [V, 8] is resized."""
    height, width, _ = picture.shape
    side = out.shape[1]
    whole = np.array([width, height, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    for v in range(rows.shape[0]):
        view = out[v * side : (v + 1) * side]
        if (rows[v] == whole).all():
            resize_bicubic(picture, view)
        else:
            resize_bicubic(_canvas(picture, rows[v]), view)


@njit("void(uint8[::1], uint8[::1], float32[::1], float32[::1])", nogil=True, cache=True)
def _add_weighted(pixels, weight, share, total):  # type: ignore[no-untyped-def]
    """Add a run of ``pixels`` times ``weight`` / 255 to ``total``; ``share`` is room for as many numbers."""
    for i in range(weight.size):
        share[3 * i] = share[3 * i + 1] = share[3 * i + 2] = np.float32(weight[i]) * _SHARE
    for i in range(pixels.size):
        total[i] += share[i] * np.float32(pixels[i])


@njit(f"void({_BYTES}, {_BYTES}, {_BYTES}, {_BYTES}, float32[::1])", nogil=True, cache=True)
def _blend(out, first, second, planes, numbers):  # type: ignore[no-untyped-def]
    """Turn ``out`` [S, S, 3] into itself times its weight / 255, plus the layers times theirs, plus what is painted.

    Weights and paint are ``planes`` [N * S, S, 1], one below the other. The sum is rounded.
    """
    size = out.size // 3
    to, source_1, source_2, plane = out.reshape(-1), first.reshape(-1), second.reshape(-1), planes.reshape(-1)
    weight, paint = int(numbers[_WEIGHT]) * size, int(numbers[_PAINTED]) * size
    weight_1, weight_2 = int(numbers[_WEIGHT + 1]) * size, int(numbers[_WEIGHT + 2]) * size
    share, room = np.empty(3 * _RUN, np.float32), np.empty(3 * _RUN, np.float32)
    for at in range(0, size, _RUN):
        end = min(at + _RUN, size)
        line, total = to[3 * at : 3 * end], room[: 3 * (end - at)]
        total[:] = np.float32(0.5)
        _add_weighted(line, plane[weight + at : weight + end], share, total)
        if weight_1 >= 0:
            _add_weighted(source_1[3 * at : 3 * end], plane[weight_1 + at : weight_1 + end], share, total)
        if weight_2 >= 0:
            _add_weighted(source_2[3 * at : 3 * end], plane[weight_2 + at : weight_2 + end], share, total)
        if paint >= 0:
            painted = plane[paint + 3 * at : paint + 3 * end]
            for i in range(line.size):
                total[i] += np.float32(painted[i])
        for i in range(line.size):
            line[i] = np.int32(min(total[i], np.float32(255.0)))


@njit("void(float32[::1], float32[::1], float32[::1], float32[:, ::1], float32)", nogil=True, cache=True)
def _change(red, green, blue, step, luma):  # type: ignore[no-untyped-def]
    """One clipped step on a run of each channel."""
    a, b, c, d = step[0, 0], step[0, 1], step[0, 2], step[0, 3] * luma
    e, f, g, h = step[1, 0], step[1, 1], step[1, 2], step[1, 3] * luma
    i, j, k, m = step[2, 0], step[2, 1], step[2, 2], step[2, 3] * luma
    zero, most = np.float32(0.0), np.float32(255.0)
    for x in range(red.size):
        u, v, w = red[x], green[x], blue[x]
        red[x] = min(max(a * u + b * v + c * w + d, zero), most)
        green[x] = min(max(e * u + f * v + g * w + h, zero), most)
        blue[x] = min(max(i * u + j * v + k * w + m, zero), most)


@njit("void(uint8[::1], float32[:, :, ::1], float32[::1], float32[::1], float32[::1], float32[::1])",
      nogil=True, cache=True)  # fmt: skip
def _changed(pixels, steps, lumas, red, green, blue):  # type: ignore[no-untyped-def]
    """A run of pixels after as many steps as there are ``lumas``."""
    for x in range(red.size):
        red[x], green[x], blue[x] = pixels[3 * x], pixels[3 * x + 1], pixels[3 * x + 2]
    for k in range(lumas.size):
        _change(red, green, blue, steps[k], lumas[k])


@njit("float32[:, :, ::1](float32[:, :, ::1])", nogil=True, cache=True)
def _merged(steps):  # type: ignore[no-untyped-def]
    """The steps that are left when those that cannot leave [0, 255] become part of the next one."""
    merged = np.empty_like(steps)
    count = 0
    free = False  # whether the last one of ``merged`` needs no clipping
    for k in range(steps.shape[0]):
        step = steps[k]
        if (step == _IDLE).all():
            continue
        if free:
            before = merged[count - 1].copy()
            # All steps map the mean luma to a multiple of itself.
            luma = _RED * before[0].sum() + _GREEN * before[1].sum() + _BLUE * before[2].sum()
            for i in range(3):
                for j in range(4):
                    mixed = step[i, 0] * before[0, j] + step[i, 1] * before[1, j] + step[i, 2] * before[2, j]
                    merged[count - 1, i, j] = mixed + (luma * step[i, 3] if j == 3 else np.float32(0.0))
        else:
            merged[count] = step
            count += 1
        last = merged[count - 1]
        free = last.min() >= 0.0
        for i in range(3):
            free = free and last[i].sum() <= np.float32(1.000001)
    return merged[:count]


@njit("void(uint8[:, :, ::1], float32[:, :, ::1], uint8[:, :, ::1])", nogil=True, cache=True, error_model="numpy")
def jitter_colours(pixels, steps, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` uint8 [H, W, 3] with ``pixels`` after ``steps`` [K, 3, 4], one after the other, and rounded.

    A step is ``matrix @ colours + share * mean luma``, clipped; its last column holds the shares. Steps are done in
    registers, a run of pixels at a time; where one needs the picture's mean, those before it are done twice rather than
    kept. ``out`` may be ``pixels``.
    """
    steps = _merged(steps)
    count = steps.shape[0]
    if count == 0 and pixels.ctypes.data == out.ctypes.data:
        return
    flat = pixels.reshape(-1)
    to = out.reshape(-1)
    size = flat.size // 3
    runs = np.empty((3, _RUN), np.float32)
    lumas = np.zeros(count, np.float32)
    for k in range(count):
        if steps[k, 0, 3] == 0.0:
            continue
        total = np.zeros(_RUN, np.float32)
        for at in range(0, size, _RUN):
            end = min(at + _RUN, size)
            red, green, blue = runs[0, : end - at], runs[1, : end - at], runs[2, : end - at]
            _changed(flat[3 * at : 3 * end], steps, lumas[:k], red, green, blue)
            for x in range(red.size):
                total[x] += _RED * red[x] + _GREEN * green[x] + _BLUE * blue[x]
        lumas[k] = np.float32(total.sum() / size)
    half = np.float32(0.5)
    for at in range(0, size, _RUN):
        end = min(at + _RUN, size)
        red, green, blue = runs[0, : end - at], runs[1, : end - at], runs[2, : end - at]
        _changed(flat[3 * at : 3 * end], steps, lumas, red, green, blue)
        line = to[3 * at : 3 * end]
        for x in range(red.size):
            line[3 * x] = np.int32(red[x] + half)
            line[3 * x + 1] = np.int32(green[x] + half)
            line[3 * x + 2] = np.int32(blue[x] + half)


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


@njit("void(uint8[:, :, ::1], float32[::1], uint8[:, :, ::1], float32[:, :, ::1], float32[:, ::1], "
      "float32[:, :, ::1])", nogil=True, cache=True)  # fmt: skip
def finish_view(pixels, numbers, planes, noises, scale, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` [3, S, S] with ``pixels`` [S, S, 3] times ``scale[0]`` plus ``scale[1]``, float [2, 3].

    Where the mask among ``planes`` [N * S, S, 1] is 1, with the first of ``noises`` [M * S, S, 3] instead.
    """
    flat = pixels.reshape(-1)
    size = flat.size // 3
    red, green, blue = out[0].reshape(-1), out[1].reshape(-1), out[2].reshape(-1)
    a, b, c = scale[0]
    e, f, g = scale[1]
    for x in range(size):
        red[x] = a * flat[3 * x] + e
        green[x] = b * flat[3 * x + 1] + f
        blue[x] = c * flat[3 * x + 2] + g
    mask = int(numbers[_MASK])
    if mask < 0:
        return
    where = planes.reshape(-1)[mask * size : (mask + 1) * size]
    instead = noises.reshape(-1)
    for x in range(size):
        if where[x]:
            red[x] = a * instead[3 * x] + e
            green[x] = b * instead[3 * x + 1] + f
            blue[x] = c * instead[3 * x + 2] + g


@njit(
    f"void({_BYTES}, float32[:, ::1], int32[::1], uint8[:, ::1], float32[:, ::1], uint8[::1])", nogil=True, cache=True
)
def _sample(picture, places, at, corners, shares, line):  # type: ignore[no-untyped-def]
    """Fill a ``line`` [3 W] with ``picture`` at the columns ``places[0]`` and rows ``places[1]``, held at the border.

    ``picture`` has two columns or more. ``at``, ``corners`` [4, 3 W + 1] and ``shares`` are room. Only fetching four
    pixels around a place is done one by one.
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
            _store_four(to, _load_four(pixel))
            # The right one's first byte is the fourth from two bytes on: nothing is read behind the picture's end.
            _store_four(to + across, _load_four(pixel + np.uint64(2)) >> np.uint32(8))
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
        _sample(picture, places, at, corners, shares, out[i].reshape(3 * width))


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
        _sample(picture, places, at, corners, shares, out[i].reshape(3 * width))


@njit(f"void({_BYTES}, int64, float32[::1], float32[:, :, ::1], {_BYTES})",
      nogil=True, cache=True, error_model="numpy")  # fmt: skip
def _place(picture, k, numbers, maps, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` [S, S, 3] with a picture of a view at its place: the view's own for ``k`` = 0, or a layer.

    One that is shown as it is has the view's size.
    """
    size = out.shape[0]
    way = int(numbers[_WAY + k])
    if way == AS_IS:
        out[:] = picture
        return
    height, width = int(numbers[_WORKING + 2 * k]), int(numbers[_WORKING + 2 * k + 1])
    working = picture
    if picture.shape[0] != height or picture.shape[1] != width:
        working = np.empty((height, width, 3), np.uint8)
        resize_bicubic(picture, working)
    if way == BY_MATRIX:
        warp_bilinear(working, numbers[_MATRIX + 9 * k : _MATRIX + 9 * k + 9].reshape(3, 3), out)
    else:
        remap_bilinear(working, maps[way * size : (way + 1) * size], out)


@njit(f"void({_BYTES}, {_BYTES}, {_BYTES}, float32[::1], {_BYTES}, float32[:, :, ::1], {_BYTES})",
      nogil=True, cache=True, error_model="numpy")  # fmt: skip
def compose_view(picture, first, second, numbers, planes, maps, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` [S, S, 3] with a view as its ``numbers`` say: pictures at their places, blended, colours jittered.

    ``picture`` and the layers ``first`` and ``second`` uint8 [h, w, 3] (anything where the numbers name no weight);
    ``planes`` uint8 [N * S, S, 1] and ``maps`` float [M * S, S, 2], one below the other.
    """
    _place(picture, 0, numbers, maps, out)
    if numbers[_WEIGHT] >= 0:
        layer_1 = layer_2 = out
        if numbers[_WEIGHT + 1] >= 0:
            layer_1 = np.empty(out.shape, np.uint8)
            _place(first, 1, numbers, maps, layer_1)
        if numbers[_WEIGHT + 2] >= 0:
            layer_2 = np.empty(out.shape, np.uint8)
            _place(second, 2, numbers, maps, layer_2)
        _blend(out, layer_1, layer_2, planes, numbers)
    jitter_colours(out, numbers[_STEPS:_STEPS_END].reshape(COLOUR_STEPS, 3, 4), out)


@njit(f"void({_BYTES}, float32[::1], {_BYTES})", nogil=True, cache=True)
def mix_channels(pixels, numbers, out):  # type: ignore[no-untyped-def]
    """out [H, W, 3] = the matrix [3, 4] of ``numbers`` times (red, green, blue, 1), clipped and rounded."""
    mixing = numbers[_MIXING : _MIXING + 12]
    a, b, c, d = mixing[0], mixing[1], mixing[2], mixing[3] + np.float32(0.5)
    e, f, g, h = mixing[4], mixing[5], mixing[6], mixing[7] + np.float32(0.5)
    i, j, k, m = mixing[8], mixing[9], mixing[10], mixing[11] + np.float32(0.5)
    zero, most = np.float32(0.0), np.float32(255.0)
    flat, to = pixels.reshape(-1), out.reshape(-1)
    for x in range(flat.size // 3):
        red, green, blue = np.float32(flat[3 * x]), np.float32(flat[3 * x + 1]), np.float32(flat[3 * x + 2])
        to[3 * x] = np.int32(min(max(a * red + b * green + c * blue + d, zero), most))
        to[3 * x + 1] = np.int32(min(max(e * red + f * green + g * blue + h, zero), most))
        to[3 * x + 2] = np.int32(min(max(i * red + j * green + k * blue + m, zero), most))


@njit(f"void({_BYTES}, float32[::1], {_BYTES})", nogil=True, cache=True)
def apply_curve(pixels, numbers, out):  # type: ignore[no-untyped-def]
    """out [H, W, 3] = the 256 levels of ``numbers`` at ``pixels``."""
    levels = numbers[_LEVELS : _LEVELS + 256].astype(np.uint8)
    flat = pixels.reshape(-1)
    to = out.reshape(-1)
    for i in range(flat.size):
        to[i] = levels[flat[i]]


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


# ---- the leaves as C callbacks --------------------------------------------------------------------------------------
# DALI's Numba operator calls them with addresses of arrays of addresses. They stand in this file because Numba keeps
# compiled code by the file that it is written in: elsewhere they would go on with the old leaves after a change here.

_ADDRESS, _COUNT = types.uint64, types.int32
_SHAPE_SIGNATURE = types.void(_ADDRESS, _ADDRESS, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _COUNT)
_RUN_SIGNATURE = types.void(_ADDRESS, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS, _ADDRESS, _ADDRESS, _COUNT)


def _as_pointer(_context, address):  # type: ignore[no-untyped-def]
    """An integer address as a pointer for ``carray``."""

    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_as_pointer)


@njit(inline="always")
def _entry(addresses, k):  # type: ignore[no-untyped-def]
    """The ``k``-th of an array of addresses, as a pointer."""
    return _pointer(carray(_pointer(addresses), (k + 1,), np.int64)[k])


@njit(inline="always")
def _shape(shapes, k):  # type: ignore[no-untyped-def]
    """The ``k``-th shape, int64 [3]."""
    return carray(_entry(shapes, k), (3,), np.int64)


@njit(inline="always")
def _picture(data, shapes, k, dtype):  # type: ignore[no-untyped-def]
    """The ``k``-th array, of three dimensions."""
    shape = _shape(shapes, k)
    return carray(_entry(data, k), (shape[0], shape[1], shape[2]), dtype)


@njit(inline="always")
def _numbers(data, k):  # type: ignore[no-untyped-def]
    """The ``k``-th array, a view's numbers."""
    return carray(_entry(data, k), (_COUNT_OF_NUMBERS,), np.float32)


@cfunc(_SHAPE_SIGNATURE, cache=True)
def square_of_planes(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, samples):  # type: ignore[no-untyped-def]
    """Output shape of ``run_compose``: as high and wide as its planes are wide, three channels."""
    for i in range(samples):
        out, planes = _shape(out_shapes, i), _shape(in_shapes, 4 * samples + i)
        out[0], out[1], out[2] = planes[1], planes[1], 3


@cfunc(_SHAPE_SIGNATURE, cache=True)
def shape_of_first(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, samples):  # type: ignore[no-untyped-def]
    """Output shape of every sample: height and width of the first input, three channels."""
    for i in range(samples):
        out, first = _shape(out_shapes, i), _shape(in_shapes, i)
        out[0], out[1], out[2] = first[0], first[1], 3


@cfunc(_SHAPE_SIGNATURE, cache=True)
def planes_of_first(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, samples):  # type: ignore[no-untyped-def]
    """As :func:`shape_of_first`, channels first."""
    for i in range(samples):
        out, first = _shape(out_shapes, i), _shape(in_shapes, i)
        out[0], out[1], out[2] = 3, first[0], first[1]


@cfunc(_RUN_SIGNATURE, cache=True)
def run_resize(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    resize_bicubic(_picture(ins, in_shapes, 1, np.uint8), _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def run_compose(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    compose_view(
        _picture(ins, in_shapes, 0, np.uint8),
        _picture(ins, in_shapes, 1, np.uint8),
        _picture(ins, in_shapes, 2, np.uint8),
        _numbers(ins, 3),
        _picture(ins, in_shapes, 4, np.uint8),
        _picture(ins, in_shapes, 5, np.float32),
        _picture(outs, out_shapes, 0, np.uint8),
    )


@cfunc(_RUN_SIGNATURE, cache=True)
def run_mix(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    mix_channels(_picture(ins, in_shapes, 0, np.uint8), _numbers(ins, 1), _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def run_curve(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    apply_curve(_picture(ins, in_shapes, 0, np.uint8), _numbers(ins, 1), _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def run_median(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    window = int(_numbers(ins, 1)[_WINDOW])
    median(_picture(ins, in_shapes, 0, np.uint8), window, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def run_remap(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    points = _picture(ins, in_shapes, 0, np.float32)
    remap_bilinear(_picture(ins, in_shapes, 1, np.uint8), points, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def run_blur(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    numbers = _numbers(ins, 1)
    sigma, reach = float(numbers[_SIGMA]), int(numbers[_REACH])
    blur_gaussian(_picture(ins, in_shapes, 0, np.uint8), sigma, reach, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def run_finish(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    finish_view(
        _picture(ins, in_shapes, 0, np.uint8),
        _numbers(ins, 1),
        _picture(ins, in_shapes, 2, np.uint8),
        _picture(ins, in_shapes, 3, np.float32),
        carray(_entry(ins, 4), (2, 3), np.float32),
        _picture(outs, out_shapes, 0, np.float32),
    )


@cfunc(_RUN_SIGNATURE, cache=True)
def run_cut(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    shape = carray(_entry(in_shapes, 2), (2,), np.int64)
    rows = carray(_entry(ins, 2), (shape[0], shape[1]), np.float64)
    cut_views(_picture(ins, in_shapes, 1, np.uint8), rows, _picture(outs, out_shapes, 0, np.uint8))
