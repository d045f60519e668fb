"""The Numba leaves as DALI operators of the CPU backend.

They go through DALI's Numba operator, which calls C callbacks. These are our own, at the end of
:mod:`dali_pipelines.leaves`: the plugin's wrappers take seconds to compile in every process and cannot be cached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nvidia import dali
from nvidia.dali.plugin.numba import NumbaFunction

import dali_pipelines.leaves as leaves

_UINT8, _INT32, _FLOAT = dali.types.UINT8, dali.types.INT32, dali.types.FLOAT  # type: ignore[attr-defined]
_FLOAT64 = dali.types.FLOAT64  # type: ignore[attr-defined]


@functools.cache
def resize_operator() -> Callable[..., Any]:
    """``operator(like, image uint8 [h, w, 3]) -> uint8 [H, W, 3]``, with ``like`` an empty uint8 [H, W, 0].

    A DALI operator may know shapes, not values, before it runs, hence the size travels as a shape.
    """
    return _operator(leaves.run_resize, [_UINT8, _UINT8], [3, 3], _UINT8)


@functools.cache
def blend_operator() -> Callable[..., Any]:
    """``operator(image, first, second, weight, layer_weights, painted) -> uint8 [H, W, 3]``; see ``blend_pictures``."""
    return _operator(leaves.run_blend, [_UINT8] * 6, [3] * 6, _UINT8)


@functools.cache
def colour_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], steps float [K, 3, 4]) -> uint8 [H, W, 3]``; see ``jitter_colours``."""
    return _operator(leaves.run_colour, [_UINT8, _FLOAT], [3, 3], _UINT8)


@functools.cache
def blur_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], taps float [K]) -> uint8 [H, W, 3]``; see ``blur_gaussian``."""
    return _operator(leaves.run_blur, [_UINT8, _FLOAT], [3, 1], _UINT8)


@functools.cache
def finish_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], mask uint8 [H, W, 1], noise float [H, W, 3], scale float [2, 3]) -> float [3,
    H, W]``; see ``finish_view``."""
    return _operator(leaves.run_finish, [_UINT8, _UINT8, _FLOAT, _FLOAT], [3, 3, 3, 2], _FLOAT, leaves.planes_of_first)


@functools.cache
def remap_operator() -> Callable[..., Any]:
    """``operator(points float [H, W, 2], image uint8 [h, w, 3]) -> uint8 [H, W, 3]``; see ``remap_bilinear``."""
    return _operator(leaves.run_remap, [_FLOAT, _UINT8], [3, 3], _UINT8)


@functools.cache
def warp_operator() -> Callable[..., Any]:
    """``operator(like, image uint8 [h, w, 3], matrix float [3, 3]) -> uint8 [H, W, 3]``, ``like`` as above; see
    ``warp_bilinear``."""
    return _operator(leaves.run_warp, [_UINT8, _UINT8, _FLOAT], [3, 3, 2], _UINT8)


@functools.cache
def curve_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], levels uint8 [256]) -> uint8 [H, W, 3]``; see ``apply_curve``."""
    return _operator(leaves.run_curve, [_UINT8, _UINT8], [3, 1], _UINT8)


@functools.cache
def median_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], window int32 [1]) -> uint8 [H, W, 3]``; see ``median``."""
    return _operator(leaves.run_median, [_UINT8, _INT32], [3, 1], _UINT8)


@functools.cache
def cut_operator() -> Callable[..., Any]:
    """``operator(like [V * S, S, 0], image uint8 [h, w, 3], rows float64 [V, 8]) -> uint8 [V * S, S, 3]``;
    see ``cut_views``."""
    return _operator(leaves.run_cut, [_UINT8, _UINT8, _FLOAT64], [3, 3, 2], _UINT8)


def _operator(
    run: Any, in_types: list[Any], in_dims: list[int], out_type: Any, shape: Any = leaves.shape_of_first
) -> Callable[..., Any]:
    class Operator(NumbaFunction):
        def _get_setup_fn_cpu(self, setup_fn: object) -> Any:
            return shape.address

        def _get_run_fn_cpu(self, *_: object) -> Any:
            return run.address

    operator: Callable[..., Any] = Operator(
        run_fn=run, setup_fn=shape, out_types=[out_type], in_types=in_types, outs_ndim=[3], ins_ndim=in_dims
    )
    return operator
