"""A whole view at once, up to its colours: pictures at their places, blended, painted, colours jittered.

One operator instead of a dozen, for an operator, an input or a branch of DALI costs 0.1 to 0.5 ms a batch, whatever it
does. Its twin is ``compose_twin`` of :mod:`dali_pipelines.graph`.
"""

from __future__ import annotations

import numpy as np

from copynce.compiled_cache import njit
from dali_pipelines.numba_ops.colour import RUN, jitter_colours
from dali_pipelines.numba_ops.layout import (
    AS_IS,
    BY_MATRIX,
    COLOUR_STEPS,
    LAYERS,
    MATRIX,
    MATRIX_END,
    PAINTED,
    STEPS,
    STEPS_END,
    WAY,
    WEIGHT,
    WORKING,
    WORKING_END,
)
from dali_pipelines.numba_ops.resize import resize_bicubic
from dali_pipelines.numba_ops.warp import remap_bilinear, warp_bilinear

_SHARE = np.float32(1.0 / 255.0)
_BYTES = "uint8[:, :, ::1]"


@njit("void(uint8[::1], uint8[::1], float32[::1], float32[::1])", nogil=True, cache=True)
def _add_weighted(pixels, weight, share, total):  # type: ignore[no-untyped-def]
    """Add a run of ``pixels`` times ``weight`` / 255 to ``total``; ``share`` is scratch for as many numbers."""
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
    weights = numbers[WEIGHT : WEIGHT + 1 + LAYERS]
    weight, weight_1, weight_2 = int(weights[0]) * size, int(weights[1]) * size, int(weights[2]) * size
    paint = int(numbers[PAINTED]) * size
    share, totals = np.empty(3 * RUN, np.float32), np.empty(3 * RUN, np.float32)
    for at in range(0, size, RUN):
        end = min(at + RUN, size)
        line, total = to[3 * at : 3 * end], totals[: 3 * (end - at)]
        total[:] = np.float32(0.5)  # the sum is cut off below, which so rounds it
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


@njit(f"void({_BYTES}, int64, float32[::1], float32[:, :, ::1], {_BYTES})",
      nogil=True, cache=True, error_model="numpy")  # fmt: skip
def _place(picture, k, numbers, maps, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` [S, S, 3] with a picture of a view at its place: the view's own for ``k`` = 0, or a layer.

    One that is shown as it is has the view's size.
    """
    size = out.shape[0]
    way = int(numbers[WAY + k])
    if way == AS_IS:
        out[:] = picture
        return
    extent = numbers[WORKING:WORKING_END].reshape(1 + LAYERS, 2)[k]
    height, width = int(extent[0]), int(extent[1])
    working = picture
    if picture.shape[0] != height or picture.shape[1] != width:
        working = np.empty((height, width, 3), np.uint8)
        resize_bicubic(picture, working)
    if way == BY_MATRIX:
        warp_bilinear(working, numbers[MATRIX:MATRIX_END].reshape(1 + LAYERS, 3, 3)[k], out)
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
    if numbers[WEIGHT] >= 0:
        layer_1 = layer_2 = out
        if numbers[WEIGHT + 1] >= 0:
            layer_1 = np.empty(out.shape, np.uint8)
            _place(first, 1, numbers, maps, layer_1)
        if numbers[WEIGHT + 2] >= 0:
            layer_2 = np.empty(out.shape, np.uint8)
            _place(second, 2, numbers, maps, layer_2)
        _blend(out, layer_1, layer_2, planes, numbers)
    jitter_colours(out, numbers[STEPS:STEPS_END].reshape(COLOUR_STEPS, 3, 4), out)
