"""Bytes at addresses, for compiled code: what arrays of Numba cannot say."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _load_four_bytes(_context, address):  # type: ignore[no-untyped-def]
    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()), align=1)

    return types.uint32(address), generate


def _store_four_bytes(_context, address, _value):  # type: ignore[no-untyped-def]
    def generate(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(address, types.uint32), generate


def _as_pointer(_context, address):  # type: ignore[no-untyped-def]
    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


# Four bytes from and to any address, aligned or not. Pixels of three bytes are moved so, at a third of the cost of byte
# by byte: arrays have no such elements.
load_four: Any = intrinsic(_load_four_bytes)
store_four: Any = intrinsic(_store_four_bytes)

#: An integer address as a pointer for ``carray``.
as_pointer: Any = intrinsic(_as_pointer)
