"""Float32 products in register tiles, compiled by Numba.

Matrices of a few hundred rows are too small for library calls to reach what the multipliers can do. A product of rows
with a matrix is made of tiles of ``ROWS`` x ``WIDTH`` numbers, which stay in vector registers while the sum runs over
the depth k. The matrix is packed into panels first, so that each step of a tile reads one run of memory; rows are found
by address, so they may be picked and reordered for nothing:

    packed by  pack_rows(matrix, order, panels)         block[r, c] = sum_k row_r[k] matrix[order[k], c]
    packed by  pack_columns(matrix, order, panels)      block[r, c] = sum_k row_r[k] matrix[order[c], k]

Every sum runs over k in order. Tiles are as large as the registers that Numba compiles for allow; ``TILES_PAY`` tells
whether that is worth it. All matrices are float32 and C-contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import extending, types
from numba.core import cgutils, config

from copynce.compiled_cache import njit

intrinsic: Any = extending.intrinsic  # its own type asks callers for the typing context, which Numba passes


def _compiled_features() -> Mapping[str, bool]:
    """Instruction sets that Numba compiles for: those of this processor, or of NUMBA_CPU_FEATURES where it is set."""
    settings: Any = config  # Numba sets its names as it is imported
    if settings.CPU_FEATURES is not None:
        return {name[1:]: name[0] == "+" for name in settings.CPU_FEATURES.split(",") if name}
    try:
        return binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know them on some platforms
        return {}


_FEATURES = _compiled_features()

LANES, ROWS = (16, 14) if _FEATURES.get("avx512f") else (8, 6)  # floats of a vector register; rows of a tile
VECTORS = 2  # of them make a row of a tile
# A tile's sums, the VECTORS of the panel and a factor need 15 of AVX2's 16 registers, 31 of AVX-512's 32.
WIDTH = LANES * VECTORS
TILES_PAY = bool(_FEATURES.get("avx512f") or (_FEATURES.get("avx2") and _FEATURES.get("fma")))

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)


def _integer(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _shuffle(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


def _vector_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _VECTOR.as_pointer())


@intrinsic
def _multiply_tile(typingctx: Any, rows: Any, step: Any, panel: Any, depth: Any, out: Any, pitch: Any) -> Any:
    """One tile: ``out`` [ROWS, WIDTH] = sum over k < depth, at least 1, of row_r[k * step] * panel[k].

    All are integers. rows: address of ROWS addresses; step: bytes from k to k + 1 in each row; panel, out: addresses;
    pitch: bytes from row to row of ``out``.
    """
    signature = types.void(*[types.intp] * 6)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, step, panel, depth, out, pitch = arguments
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        first = builder.inttoptr(rows, _INT64.as_pointer())
        row_addresses = [builder.load(builder.gep(first, [_integer(r)])) for r in range(ROWS)]
        undefined, zero = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_VECTOR, [ir.Constant(_FLOAT, 0.0)] * LANES)
        before, loop, after = builder.block, builder.append_basic_block("depth"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, offset, line = builder.phi(_INT64), builder.phi(_INT64), builder.phi(_INT64)
        sums = [[builder.phi(_VECTOR) for _ in range(VECTORS)] for _ in range(ROWS)]
        vectors = [
            builder.load(_vector_at(builder, builder.add(line, _integer(4 * LANES * v))), align=4)
            for v in range(VECTORS)
        ]
        new: list[list[Any]] = []
        for address in row_addresses:
            factor = builder.load(builder.inttoptr(builder.add(address, offset), _FLOAT.as_pointer()), align=4)
            factors = builder.insert_element(undefined, factor, ir.Constant(_INT32, 0))
            factors = _shuffle(builder, factors, undefined, [0] * LANES)
            new.append([builder.call(multiply_add, [factors, vectors[v], sums[len(new)][v]]) for v in range(VECTORS)])
        next_k = builder.add(k, _integer(1))
        carried = [
            (k, _integer(0), next_k),
            (offset, _integer(0), builder.add(offset, step)),
            (line, panel, builder.add(line, _integer(4 * WIDTH))),
            *((sums[r][v], zero, new[r][v]) for r in range(ROWS) for v in range(VECTORS)),
        ]
        for phi, start, following in carried:
            phi.add_incoming(start, before)
            phi.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", next_k, depth), loop, after)
        builder.position_at_end(after)
        for r in range(ROWS):
            for v in range(VECTORS):
                address = builder.add(out, builder.add(builder.mul(pitch, _integer(r)), _integer(4 * LANES * v)))
                builder.store(new[r][v], _vector_at(builder, address), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _copy_line(typingctx: Any, source: Any, target: Any) -> Any:
    """Copy WIDTH floats from address to address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for v in range(VECTORS):
            source, target = (builder.add(address, _integer(4 * LANES * v)) for address in arguments)
            builder.store(builder.load(_vector_at(builder, source), align=4), _vector_at(builder, target), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def _transpose_square(typingctx: Any, rows: Any, offset: Any, target: Any) -> Any:
    """Transpose LANES x LANES floats: from ``offset`` bytes behind the addresses at ``rows`` to rows WIDTH apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, offset, target = arguments
        first = builder.inttoptr(rows, _INT64.as_pointer())
        square = [
            builder.load(
                _vector_at(builder, builder.add(builder.load(builder.gep(first, [_integer(r)])), offset)), align=4
            )
            for r in range(LANES)
        ]
        distance = LANES // 2
        while distance:  # swap the off-diagonal quarters, then those of each quarter, down to single numbers
            upper = [j if not j & distance else LANES + j - distance for j in range(LANES)]
            lower = [j + distance if not j & distance else LANES + j for j in range(LANES)]
            for r in (r for r in range(LANES) if not r & distance):
                pair = square[r], square[r + distance]
                square[r] = _shuffle(builder, *pair, upper)
                square[r + distance] = _shuffle(builder, *pair, lower)
            distance //= 2
        for r, vector in enumerate(square):
            builder.store(vector, _vector_at(builder, builder.add(target, _integer(4 * WIDTH * r))), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@njit(nogil=True, inline="always")
def panels_for(columns: int) -> int:
    """Panels that hold so many columns."""
    return (columns + WIDTH - 1) // WIDTH


@njit(nogil=True, cache=True)
def pack_rows(matrix: np.ndarray, order: np.ndarray, panels: np.ndarray) -> None:
    """Panels [P, K, WIDTH] of the rows of ``matrix`` [K, C] in ``order`` [K]; what is beyond C becomes 0."""
    depth, columns = matrix.shape
    whole = columns // WIDTH
    for k in range(depth):
        source = matrix.ctypes.data + 4 * columns * order[k]
        target = panels.ctypes.data + 4 * WIDTH * k
        for p in range(whole):
            _copy_line(source + 4 * WIDTH * p, target + 4 * WIDTH * depth * p)
        if whole < panels.shape[0]:
            for c in range(WIDTH):
                column = whole * WIDTH + c
                panels[whole, k, c] = matrix[order[k], column] if column < columns else np.float32(0)


@njit(nogil=True, cache=True)
def pack_columns(matrix: np.ndarray, order: np.ndarray, panels: np.ndarray) -> None:
    """Panels [P, K, WIDTH] whose columns are the rows of ``matrix`` [C, K] in ``order`` [C]; the last one repeats."""
    columns, depth = matrix.shape
    squares = depth // LANES
    rows = np.empty(LANES, np.intp)
    for first in range(0, panels.shape[0] * WIDTH, LANES):
        panel, column = first // WIDTH, first % WIDTH
        for r in range(LANES):
            rows[r] = matrix.ctypes.data + 4 * depth * order[min(first + r, columns - 1)]
        target = panels.ctypes.data + 4 * (panel * depth * WIDTH + column)
        for square in range(squares):
            _transpose_square(rows.ctypes.data, 4 * LANES * square, target + 4 * LANES * WIDTH * square)
        for k in range(squares * LANES, depth):
            for r in range(LANES):
                panels[panel, k, column + r] = matrix[order[min(first + r, columns - 1)], k]


@njit(nogil=True, cache=True)
def multiply_rows(rows: np.ndarray, step: int, panels: np.ndarray, count: int, depth: int, block: np.ndarray) -> None:
    """``block`` [ROWS, at least count * WIDTH] becomes the product of ROWS rows with the first ``count`` panels.

    rows: addresses of ROWS rows, intp; step: floats from one number of a row to its next; panels [P, K, WIDTH]; depth:
    how many numbers of a row are summed over, from 0 to K.
    """
    if depth == 0:
        for r in range(ROWS):
            for c in range(count * WIDTH):
                block[r, c] = 0
        return
    for p in range(count):
        _multiply_tile(
            rows.ctypes.data,
            4 * step,
            panels.ctypes.data + 4 * WIDTH * panels.shape[1] * p,
            depth,
            block.ctypes.data + 4 * WIDTH * p,
            4 * block.shape[1],
        )
