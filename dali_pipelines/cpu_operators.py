"""The Numba leaves as DALI operators of the CPU backend.

They go through DALI's Numba operator, which calls C callbacks with addresses of arrays of addresses. The callbacks are
compiled here: the plugin's own wrappers take seconds to compile in every process and cannot be cached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic
from nvidia import dali
from nvidia.dali.plugin.numba import NumbaFunction

from dali_pipelines.leaves import (
    apply_curve,
    blend_pictures,
    blur_gaussian,
    cut_views,
    finish_view,
    jitter_colours,
    median,
    remap_bilinear,
    resize_bicubic,
    warp_bilinear,
)

_ADDRESS, _COUNT = types.uint64, types.int32
_SHAPE_SIGNATURE = types.void(_ADDRESS, _ADDRESS, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _COUNT)
_RUN_SIGNATURE = types.void(_ADDRESS, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS, _ADDRESS, _ADDRESS, _COUNT)
_UINT8, _INT32, _FLOAT = dali.types.UINT8, dali.types.INT32, dali.types.FLOAT  # type: ignore[attr-defined]
_FLOAT64 = dali.types.FLOAT64  # type: ignore[attr-defined]


@functools.cache
def resize_operator() -> Callable[..., Any]:
    """``operator(like, image uint8 [h, w, 3]) -> uint8 [H, W, 3]``, with ``like`` an empty uint8 [H, W, 0].

    A DALI operator may know shapes, not values, before it runs, hence the size travels as a shape.
    """
    return _operator(_run_resize, [_UINT8, _UINT8], [3, 3], _UINT8)


@functools.cache
def blend_operator() -> Callable[..., Any]:
    """``operator(image, first, second, weight, layer_weights, painted) -> uint8 [H, W, 3]``; see ``blend_pictures``."""
    return _operator(_run_blend, [_UINT8] * 6, [3] * 6, _UINT8)


@functools.cache
def colour_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], steps float [K, 3, 4]) -> uint8 [H, W, 3]``; see ``jitter_colours``."""
    return _operator(_run_colour, [_UINT8, _FLOAT], [3, 3], _UINT8)


@functools.cache
def blur_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], taps float [K]) -> uint8 [H, W, 3]``; see ``blur_gaussian``."""
    return _operator(_run_blur, [_UINT8, _FLOAT], [3, 1], _UINT8)


@functools.cache
def finish_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], mask uint8 [H, W, 1], noise float [H, W, 3], scale float [2, 3]) -> float [3,
    H, W]``; see ``finish_view``."""
    return _operator(_run_finish, [_UINT8, _UINT8, _FLOAT, _FLOAT], [3, 3, 3, 2], _FLOAT, _planes)


@functools.cache
def remap_operator() -> Callable[..., Any]:
    """``operator(points float [H, W, 2], image uint8 [h, w, 3]) -> uint8 [H, W, 3]``; see ``remap_bilinear``."""
    return _operator(_run_remap, [_FLOAT, _UINT8], [3, 3], _UINT8)


@functools.cache
def warp_operator() -> Callable[..., Any]:
    """``operator(like, image uint8 [h, w, 3], matrix float [3, 3]) -> uint8 [H, W, 3]``, ``like`` as above; see
    ``warp_bilinear``."""
    return _operator(_run_warp, [_UINT8, _UINT8, _FLOAT], [3, 3, 2], _UINT8)


@functools.cache
def curve_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], levels uint8 [256]) -> uint8 [H, W, 3]``; see ``apply_curve``."""
    return _operator(_run_curve, [_UINT8, _UINT8], [3, 1], _UINT8)


@functools.cache
def median_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], window int32 [1]) -> uint8 [H, W, 3]``; see ``median``."""
    return _operator(_run_median, [_UINT8, _INT32], [3, 1], _UINT8)


@functools.cache
def cut_operator() -> Callable[..., Any]:
    """``operator(like [V * S, S, 0], image uint8 [h, w, 3], rows float64 [V, 8]) -> uint8 [V * S, S, 3]``;
    see ``cut_views``."""
    return _operator(_run_cut, [_UINT8, _UINT8, _FLOAT64], [3, 3, 2], _UINT8)


def _operator(
    run: Any, in_types: list[Any], in_dims: list[int], out_type: Any, shape: Any = None
) -> Callable[..., Any]:
    shape = shape or _shape

    class Operator(NumbaFunction):
        def _get_setup_fn_cpu(self, setup_fn: object) -> Any:
            return shape.address

        def _get_run_fn_cpu(self, *_: object) -> Any:
            return run.address

    operator: Callable[..., Any] = Operator(
        run_fn=run, setup_fn=shape, out_types=[out_type], in_types=in_types, outs_ndim=[3], ins_ndim=in_dims
    )
    return operator


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
def _picture(data, shapes, k, dtype):  # type: ignore[no-untyped-def]
    """The ``k``-th array, of three dimensions."""
    shape = carray(_entry(shapes, k), (3,), np.int64)
    return carray(_entry(data, k), (shape[0], shape[1], shape[2]), dtype)


@cfunc(_SHAPE_SIGNATURE, cache=True)
def _shape(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, samples):  # type: ignore[no-untyped-def]
    """Output shape of every sample: height and width of the first input, three channels."""
    for i in range(samples):
        out = carray(_entry(out_shapes, i), (3,), np.int64)
        first = carray(_entry(in_shapes, i), (3,), np.int64)
        out[0] = first[0]
        out[1] = first[1]
        out[2] = 3


@cfunc(_SHAPE_SIGNATURE, cache=True)
def _planes(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, samples):  # type: ignore[no-untyped-def]
    """As :func:`_shape`, channels first."""
    for i in range(samples):
        out = carray(_entry(out_shapes, i), (3,), np.int64)
        first = carray(_entry(in_shapes, i), (3,), np.int64)
        out[0] = 3
        out[1] = first[0]
        out[2] = first[1]


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_resize(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    resize_bicubic(_picture(ins, in_shapes, 1, np.uint8), _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_blend(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    blend_pictures(
        _picture(ins, in_shapes, 0, np.uint8),
        _picture(ins, in_shapes, 1, np.uint8),
        _picture(ins, in_shapes, 2, np.uint8),
        _picture(ins, in_shapes, 3, np.uint8),
        _picture(ins, in_shapes, 4, np.uint8),
        _picture(ins, in_shapes, 5, np.uint8),
        _picture(outs, out_shapes, 0, np.uint8),
    )


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_colour(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    steps = _picture(ins, in_shapes, 1, np.float32)
    jitter_colours(_picture(ins, in_shapes, 0, np.uint8), steps, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_blur(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    count = carray(_entry(in_shapes, 1), (1,), np.int64)[0]
    taps = carray(_entry(ins, 1), (count,), np.float32)
    blur_gaussian(_picture(ins, in_shapes, 0, np.uint8), taps, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_finish(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    mask, noise = _picture(ins, in_shapes, 1, np.uint8), _picture(ins, in_shapes, 2, np.float32)
    scale = carray(_entry(ins, 3), (2, 3), np.float32)
    finish_view(_picture(ins, in_shapes, 0, np.uint8), mask, noise, scale, _picture(outs, out_shapes, 0, np.float32))


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_remap(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    points = _picture(ins, in_shapes, 0, np.float32)
    remap_bilinear(_picture(ins, in_shapes, 1, np.uint8), points, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_warp(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    matrix = carray(_entry(ins, 2), (3, 3), np.float32)
    warp_bilinear(_picture(ins, in_shapes, 1, np.uint8), matrix, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_curve(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    levels = carray(_entry(ins, 1), (256,), np.uint8)
    apply_curve(_picture(ins, in_shapes, 0, np.uint8), levels, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_median(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    window = carray(_entry(ins, 1), (1,), np.int32)[0]
    median(_picture(ins, in_shapes, 0, np.uint8), window, _picture(outs, out_shapes, 0, np.uint8))


@cfunc(_RUN_SIGNATURE, cache=True)
def _run_cut(outs, out_shapes, _out_dims, _n_outs, ins, in_shapes, _in_dims, _n_ins):  # type: ignore[no-untyped-def]
    shape = carray(_entry(in_shapes, 2), (2,), np.int64)
    rows = carray(_entry(ins, 2), (shape[0], shape[1]), np.float64)
    cut_views(_picture(ins, in_shapes, 1, np.uint8), rows, _picture(outs, out_shapes, 0, np.uint8))
