"""The compiled functions as C callbacks: DALI's Numba operator calls them with addresses of arrays of addresses."""

from __future__ import annotations

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from copynce.compiled_cache import cfunc, njit
from dali_pipelines.numba_ops.blur import blur_gaussian, median
from dali_pipelines.numba_ops.colour import apply_curve, finish_view, mix_channels
from dali_pipelines.numba_ops.compose import compose_view
from dali_pipelines.numba_ops.cut import cut_views
from dali_pipelines.numba_ops.layout import REACH, SIGMA, WIDTH, WINDOW
from dali_pipelines.numba_ops.memory import as_pointer
from dali_pipelines.numba_ops.resize import resize_bicubic
from dali_pipelines.numba_ops.warp import remap_bilinear

_ADDRESS, _COUNT = types.uint64, types.int32
_SHAPE_SIGNATURE = types.void(_ADDRESS, _ADDRESS, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _COUNT)
_RUN_SIGNATURE = types.void(_ADDRESS, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS, _ADDRESS, _ADDRESS, _COUNT)

#: Which input of ``run_compose`` the planes are.
_PLANES = 4


@njit(inline="always")
def _entry(addresses, k):  # type: ignore[no-untyped-def]
    """The ``k``-th of an array of addresses, as a pointer."""
    return as_pointer(carray(as_pointer(addresses), (k + 1,), np.int64)[k])


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
    return carray(_entry(data, k), (WIDTH,), np.float32)


@cfunc(_SHAPE_SIGNATURE, cache=True)
def square_of_planes(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, count):  # type: ignore[no-untyped-def]
    """Output shape of ``run_compose``: as high and wide as its planes are wide, three channels."""
    for i in range(count):
        out, planes = _shape(out_shapes, i), _shape(in_shapes, _PLANES * count + i)
        out[0], out[1], out[2] = planes[1], planes[1], 3


@cfunc(_SHAPE_SIGNATURE, cache=True)
def shape_of_first(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, count):  # type: ignore[no-untyped-def]
    """Output shape of every entry: height and width of the first input, three channels."""
    for i in range(count):
        out, first = _shape(out_shapes, i), _shape(in_shapes, i)
        out[0], out[1], out[2] = first[0], first[1], 3


@cfunc(_SHAPE_SIGNATURE, cache=True)
def planes_of_first(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, count):  # type: ignore[no-untyped-def]
    """As :func:`shape_of_first`, channels first."""
    for i in range(count):
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
        _picture(ins, in_shapes, _PLANES, np.uint8),
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
    window = int(_numbers(ins, 1)[WINDOW])
    median(_picture(ins, in_shapes, 0, np.uint8), window, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def run_remap(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    points = _picture(ins, in_shapes, 0, np.float32)
    remap_bilinear(_picture(ins, in_shapes, 1, np.uint8), points, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def run_blur(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    numbers = _numbers(ins, 1)
    sigma, reach = float(numbers[SIGMA]), int(numbers[REACH])
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
