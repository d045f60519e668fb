"""Pillow's bicubic resize as a DALI operator of the CPU backend.

DALI's own ``fn.resize`` is the twin: the same kernel (cubic, a = -0.5, widened by the scale when shrinking), but about
five times slower on the CPU and up to two grey levels away from Pillow. This one does Pillow's integer arithmetic: 22
fractional bits, columns first, rounded to 8 bits between the two passes, so evaluation pictures equal the
protocol's to the bit. The GPU backend uses ``fn.resize``.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

#: Pillow's fixed point: 32 bits less 8 of the pixel and 2 of head room for the kernel's negative lobes.
_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))


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


@functools.cache
def resize_operator() -> Any:
    """The DALI operator ``operator(like, image) -> uint8 [H, W, 3]``: ``like`` is an empty uint8 [H, W, 0].

    A DALI operator may know shapes, not values, before it runs, hence the size travels as a shape. The two C
    callbacks follow the calling convention of DALI's Numba operator; they are compiled here, because the plugin's own
    wrappers take seconds to compile in every process and cannot be cached.
    """
    import nvidia.dali.types as dali_types
    from nvidia.dali.plugin.numba import NumbaFunction, address_as_void_pointer

    address, count = types.uint64, types.int32

    @cfunc(types.void(address, address, count, address, address, count, count), cache=True)
    def shape_callback(out_shapes, _out_ndims, _outs, in_shapes, _in_ndims, _ins, samples):  # type: ignore[no-untyped-def]
        out_rows = carray(address_as_void_pointer(out_shapes), (samples,), np.int64)
        like_rows = carray(address_as_void_pointer(in_shapes), (samples,), np.int64)
        for i in range(samples):
            out = carray(address_as_void_pointer(out_rows[i]), (3,), np.int64)
            like = carray(address_as_void_pointer(like_rows[i]), (3,), np.int64)
            out[0] = like[0]
            out[1] = like[1]
            out[2] = 3

    @cfunc(types.void(address, address, address, count, address, address, address, count), cache=True)
    def run_callback(outs, out_shapes, _out_ndims, _n_outs, ins, in_shapes, _in_ndims, _n_ins):  # type: ignore[no-untyped-def]
        out_row = carray(address_as_void_pointer(out_shapes), (1,), np.int64)
        in_row = carray(address_as_void_pointer(in_shapes), (2,), np.int64)
        out_shape = carray(address_as_void_pointer(out_row[0]), (3,), np.int64)
        image_shape = carray(address_as_void_pointer(in_row[1]), (3,), np.int64)
        out_data = carray(address_as_void_pointer(outs), (1,), np.int64)
        in_data = carray(address_as_void_pointer(ins), (2,), np.int64)
        image = carray(
            address_as_void_pointer(in_data[1]), (image_shape[0], image_shape[1], image_shape[2]), np.uint8
        )
        out = carray(address_as_void_pointer(out_data[0]), (out_shape[0], out_shape[1], out_shape[2]), np.uint8)
        resize_bicubic(image, out)

    class BicubicResize(NumbaFunction):  # type: ignore[misc]
        def _get_setup_fn_cpu(self, setup_fn: object) -> int:
            return int(shape_callback.address)

        def _get_run_fn_cpu(self, *_: object) -> int:
            return int(run_callback.address)

    byte = dali_types.UINT8
    return BicubicResize(
        run_fn=run_callback,
        setup_fn=shape_callback,
        out_types=[byte],
        in_types=[byte, byte],
        outs_ndim=[3],
        ins_ndim=[3, 3],
    )
