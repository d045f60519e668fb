"""Colours of a view: the jitter's clipped steps, mixed channels, a tone curve, and the last stage: erased, normalised.

Twins: ``colour``, ``mix_twin`` and ``finish_twin`` of :mod:`dali_pipelines.graph`; of the curve
``fn.experimental.remap``, which has no CPU backend.
"""

from __future__ import annotations

import numpy as np

from copynce.compiled_cache import njit
from dali_pipelines.numba_ops.layout import LEVELS, LEVELS_END, LUMA, MASK, MIXING, MIXING_END

#: Pixels that are worked on at a time, so that what is between two steps stays in the first-level cache.
RUN = 1024

_RED, _GREEN, _BLUE = (np.float32(share) for share in LUMA)
_IDLE = np.eye(3, 4, dtype=np.float32)
_BYTES = "uint8[:, :, ::1]"


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
    free = False  # whether the last one of ``merged`` needs no clipping: no share is negative, none adds up to over 1
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
            free = free and last[i].sum() <= np.float32(1.000001)  # 1 up to the rounding of float32
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
    runs = np.empty((3, RUN), np.float32)
    lumas = np.zeros(count, np.float32)
    for k in range(count):
        if steps[k, 0, 3] == 0.0:
            continue
        total = np.zeros(RUN, np.float32)
        for at in range(0, size, RUN):
            end = min(at + RUN, size)
            red, green, blue = runs[0, : end - at], runs[1, : end - at], runs[2, : end - at]
            _changed(flat[3 * at : 3 * end], steps, lumas[:k], red, green, blue)
            for x in range(red.size):
                total[x] += _RED * red[x] + _GREEN * green[x] + _BLUE * blue[x]
        lumas[k] = np.float32(total.sum() / size)
    half = np.float32(0.5)
    for at in range(0, size, RUN):
        end = min(at + RUN, size)
        red, green, blue = runs[0, : end - at], runs[1, : end - at], runs[2, : end - at]
        _changed(flat[3 * at : 3 * end], steps, lumas, red, green, blue)
        line = to[3 * at : 3 * end]
        for x in range(red.size):
            line[3 * x] = np.int32(red[x] + half)
            line[3 * x + 1] = np.int32(green[x] + half)
            line[3 * x + 2] = np.int32(blue[x] + half)


@njit(f"void({_BYTES}, float32[::1], {_BYTES})", nogil=True, cache=True)
def mix_channels(pixels, numbers, out):  # type: ignore[no-untyped-def]
    """out [H, W, 3] = the matrix [3, 4] of ``numbers`` times (red, green, blue, 1), clipped and rounded."""
    mixing, half = numbers[MIXING:MIXING_END].reshape(3, 4), np.float32(0.5)
    a, b, c, d = mixing[0, 0], mixing[0, 1], mixing[0, 2], mixing[0, 3] + half
    e, f, g, h = mixing[1, 0], mixing[1, 1], mixing[1, 2], mixing[1, 3] + half
    i, j, k, m = mixing[2, 0], mixing[2, 1], mixing[2, 2], mixing[2, 3] + half
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
    levels = numbers[LEVELS:LEVELS_END].astype(np.uint8)
    flat = pixels.reshape(-1)
    to = out.reshape(-1)
    for i in range(flat.size):
        to[i] = levels[flat[i]]


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
    mask = int(numbers[MASK])
    if mask < 0:
        return
    where = planes.reshape(-1)[mask * size : (mask + 1) * size]
    instead = noises.reshape(-1)
    for x in range(size):
        if where[x]:
            red[x] = a * instead[3 * x] + e
            green[x] = b * instead[3 * x + 1] + f
            blue[x] = c * instead[3 * x + 2] + g
