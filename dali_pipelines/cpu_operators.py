"""What is compiled in :mod:`dali_pipelines.numba_ops`, as DALI operators of the CPU backend.

They go through DALI's Numba operator, which calls C callbacks. These are our own
(:mod:`dali_pipelines.numba_ops.callbacks`): the plugin's wrappers take seconds to compile in every process and cannot
be cached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nvidia import dali
from nvidia.dali.plugin.numba import NumbaFunction

from dali_pipelines.numba_ops import callbacks

_UINT8, _FLOAT = dali.types.UINT8, dali.types.FLOAT  # type: ignore[attr-defined]
_FLOAT64 = dali.types.FLOAT64  # type: ignore[attr-defined]


@functools.cache
def resize_operator() -> Callable[..., Any]:
    """``operator(like, image uint8 [h, w, 3]) -> uint8 [H, W, 3]``, with ``like`` an empty uint8 [H, W, 0].

    A DALI operator may know shapes, not values, before it runs, hence the size travels as a shape.
    """
    return _operator(callbacks.run_resize, [_UINT8, _UINT8], [3, 3], _UINT8)


@functools.cache
def compose_operator() -> Callable[..., Any]:
    """``operator(picture, first, second, numbers, planes, maps) -> uint8 [S, S, 3]``; see ``compose_view``."""
    kinds, dims = [_UINT8, _UINT8, _UINT8, _FLOAT, _UINT8, _FLOAT], [3, 3, 3, 1, 3, 3]
    return _operator(callbacks.run_compose, kinds, dims, _UINT8, callbacks.square_of_planes)


@functools.cache
def mix_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], numbers) -> uint8 [H, W, 3]``; see ``mix_channels``."""
    return _operator(callbacks.run_mix, [_UINT8, _FLOAT], [3, 1], _UINT8)


@functools.cache
def curve_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], numbers) -> uint8 [H, W, 3]``; see ``apply_curve``."""
    return _operator(callbacks.run_curve, [_UINT8, _FLOAT], [3, 1], _UINT8)


@functools.cache
def median_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], numbers) -> uint8 [H, W, 3]``; see ``median``."""
    return _operator(callbacks.run_median, [_UINT8, _FLOAT], [3, 1], _UINT8)


@functools.cache
def remap_operator() -> Callable[..., Any]:
    """``operator(points float [H, W, 2], image uint8 [h, w, 3]) -> uint8 [H, W, 3]``; see ``remap_bilinear``."""
    return _operator(callbacks.run_remap, [_FLOAT, _UINT8], [3, 3], _UINT8)


@functools.cache
def blur_operator() -> Callable[..., Any]:
    """``operator(image uint8 [H, W, 3], numbers) -> uint8 [H, W, 3]``; see ``blur_gaussian``."""
    return _operator(callbacks.run_blur, [_UINT8, _FLOAT], [3, 1], _UINT8)


@functools.cache
def finish_operator() -> Callable[..., Any]:
    """``operator(image uint8 [S, S, 3], numbers, planes, noises, scale float [2, 3]) -> float [3, S, S]``; see
    ``finish_view``."""
    kinds, dims = [_UINT8, _FLOAT, _UINT8, _FLOAT, _FLOAT], [3, 1, 3, 3, 2]
    return _operator(callbacks.run_finish, kinds, dims, _FLOAT, callbacks.planes_of_first)


@functools.cache
def cut_operator() -> Callable[..., Any]:
    """``operator(like [V * S, S, 0], image uint8 [h, w, 3], rows float64 [V, 8]) -> uint8 [V * S, S, 3]``;
    see ``cut_views``."""
    return _operator(callbacks.run_cut, [_UINT8, _UINT8, _FLOAT64], [3, 3, 2], _UINT8)


def _operator(
    run: Any, in_types: list[Any], in_dims: list[int], out_type: Any, shape: Any = callbacks.shape_of_first
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
