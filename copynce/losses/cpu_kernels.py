"""What the CPU path of CopyNCE compiles: float32 products in register tiles, and the passes between them.

Loops are written out where slices could stand: they compile in half the time.

**Tiles.** Matrices of a few hundred rows are too small for library calls to reach what the multipliers can do. A
product of rows with a matrix is made of tiles of ``ROWS`` x ``WIDTH`` numbers, which stay in vector registers while
the sum runs over the depth k. The matrix is packed into panels first, so that each step of a tile reads one run of
memory; rows are found by address, so they may be picked and reordered for nothing:

    packed by  pack_rows(matrix, order, panels)         block[r, c] = sum_k row_r[k] matrix[order[k], c]
    packed by  pack_columns(matrix, order, panels)      block[r, c] = sum_k row_r[k] matrix[order[c], k]

Every sum runs over k in order. Tiles are as large as the registers that Numba compiles for allow; ``TILES_PAY`` tells
whether that is worth it.

**Passes.** ``forward_samples`` and ``backward_samples`` take samples from first to last; the equations are those of
``copynce_cpu``. All matrices are float32 and C-contiguous.
"""

from __future__ import annotations

import functools
import math
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

_SMALLEST_NORM = 1e-12  # as torch.nn.functional.normalize

# Sums may be reordered and fused so that they vectorise; NaN and infinity keep their meaning.
# What is compiled so must be inlined: a caller holds its own copy of a function, whose sums may run in another order,
# and which of the two is called depends on whether the code was just compiled or comes from Numba's cache.
_FAST = {"reassoc", "contract", "nsz"}

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


@njit(nogil=True, cache=True, fastmath=_FAST, inline="always")
def _exp(x: np.float32) -> np.float32:
    """exp(x) for x in [-80, 1], within 2 units in the last place (Cephes' expf); unlike libm's, it vectorises."""
    k = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    y = x - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * y + np.float32(1.3981999507e-3)
    p = p * y + np.float32(8.3334519073e-3)
    p = p * y + np.float32(4.1665795894e-2)
    p = p * y + np.float32(1.6666665459e-1)
    p = p * y + np.float32(5.0000001201e-1)
    p = p * y * y + y + np.float32(1)
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(nogil=True, cache=True, fastmath=_FAST, forceinline=True)
def _inverse_lengths(tokens: np.ndarray, order: np.ndarray, inverse: np.ndarray) -> float:
    """``inverse`` float32 [L] becomes one over the Euclidean lengths of ``tokens`` [L, D], in ``order`` int32 [L].

    Returns the sum of the squared lengths: finite where all tokens are.
    """
    squares = 0.0
    for i in range(tokens.shape[0]):
        token = tokens[order[i]]
        total = np.float32(0)
        for channel in range(np.uint64(token.size)):
            total += token[channel] * token[channel]
        inverse[i] = np.float32(1) / max(np.sqrt(total), np.float32(_SMALLEST_NORM))
        squares += float(total)
    return squares


@functools.lru_cache(maxsize=16)
def grid_of(shape: tuple[int, int], patch_size: int) -> np.ndarray:
    """What ``_bins_of_line`` needs to know of a picture of height x width pixels, in float32 where that is exact.

    The quotient of a pixel's centre, index + 1/2, and a number of pixels n lies at least 1/(2n) off every integer and
    is wrong by two roundings, index / n * 2^-23 in all: rounding it down is exact for up to 2^22 pixels.
    """
    height, width = shape
    numbers = 0.5, width, width // patch_size, 1 / width, 1 / (width * patch_size), 1 / patch_size
    return np.array(numbers, np.float32 if height * width <= 1 << 22 else np.float64)


@njit(nogil=True, cache=True, fastmath=_FAST, forceinline=True)
def _bins_of_line(entries: np.ndarray, grid: np.ndarray, centres: np.ndarray, bins: np.ndarray) -> np.uint32:
    """``bins`` int32 [W] become 1 + patch of the other picture for ``entries`` int32 [W], and 0 for entry -1.

    ``grid`` (see ``grid_of``) sets the precision; ``centres`` is scratch of it. Entry -1 falls on the last patch of the
    row of patches above the first, which is number -1.
    Returns the largest entry plus 1; an entry below -1 counts as huge.
    """
    half, line_pixels, row_patches, per_line, per_row_of_patches, per_patch = grid
    largest = np.uint32(0)
    for x in range(np.uint64(entries.size)):
        largest = max(largest, np.uint32(entries[x] + 1))
    for x in range(np.uint64(entries.size)):
        centres[x] = entries[x]
    for x in range(np.uint64(entries.size)):
        centre = centres[x] + half
        column = centre - np.floor(centre * per_line) * line_pixels
        patch = np.floor(centre * per_row_of_patches) * row_patches + np.floor(column * per_patch)
        bins[x] = np.int32(patch + (half + half))
    return largest


@njit(nogil=True, cache=True)
def _count_line(
    line: np.ndarray, start: int, stop: int, times: int, counts: np.ndarray, occupied: np.ndarray, used: int
) -> int:
    """Add a line of a patch, ``line[start:stop]``, int32 bins, to its counts int32 [bins], ``times`` over.

    The ``used`` bins with a count are listed in ``occupied``; returns how many there are then.
    """
    for x in range(start + 1, stop + 1):
        if x == stop or line[x] != line[start]:  # neighbours mostly share their bin
            current = line[start]
            occupied[used] = current
            used += counts[current] == 0
            counts[current] += (x - start) * times
            start = x
    return used


@njit(nogil=True, cache=True)
def _count_strip(
    strip: np.ndarray,
    patch_size: int,
    pixels: np.uint32,
    grid: np.ndarray,
    lines: tuple[np.ndarray, ...],
    counts: np.ndarray,
    occupied: np.ndarray,
    used: np.ndarray,
    since: np.ndarray,
) -> bool:
    """Count the bins of a row of C patches: strip int32 [patch_size, C * patch_size] of a table.

    counts int32 [C, bins], all 0 before; the bins of patch c are listed in occupied[c, : used[c]], int32 [C, bins + 1]
    and int64 [C]; ``since`` int64 [C] and ``lines`` (see ``_append_prior``) are scratch.
    Returns False if an entry lies outside of the other picture, which has so many ``pixels``.
    """
    centres, bins, held, differs = lines
    words = differs.view(np.uint64)  # eight pixels at a glance
    used[:] = 0
    since[:] = 0
    for y in range(patch_size):
        if _bins_of_line(strip[y], grid, centres, bins if y else held) > pixels:
            return False
        if y == 0:
            continue
        # A patch's lines mostly equal each other: one is held, and counted where it ends.
        for x in range(np.uint64(bins.size)):
            differs[x] = bins[x] != held[x]
        for word in range(words.size):
            if words[word] == 0:
                continue
            for x in range(8 * word, min(8 * word + 8, bins.size)):
                if bins[x] != held[x]:
                    c = x // patch_size
                    start, stop = c * patch_size, (c + 1) * patch_size
                    used[c] = _count_line(held, start, stop, y - since[c], counts[c], occupied[c], used[c])
                    for new in range(start, stop):
                        held[new] = bins[new]
                    since[c] = y
    for c in range(used.size):
        start, stop = c * patch_size, (c + 1) * patch_size
        used[c] = _count_line(held, start, stop, patch_size - since[c], counts[c], occupied[c], used[c])
    return True


@njit(nogil=True, cache=True)
def _append_prior(
    table: np.ndarray,
    grid: np.ndarray,
    pixels: np.uint32,
    patch_size: int,
    gamma: float,
    released: bool,
    patches: np.ndarray,
    other_patches: np.ndarray,
    shares: np.ndarray,
    stored: int,
    mass: np.ndarray,
) -> int:
    """Append one direction's prior over its number of patches to the list of T's entries; row sums go to ``mass``.

    table int32 [H, W]; pixels: of the other picture; entry e of T is shares[e], float32, at patches[e] of this picture
    and other_patches[e], int32; ``stored`` entries are there already; mass float32 [L].
    Returns the number of entries then stored, -1 if an entry of the table lies outside of the other picture.
    """
    height, width = table.shape
    columns = width // patch_size
    all_bins = 1 + pixels // patch_size**2
    counts = np.zeros((columns, all_bins), np.int32)
    occupied = np.empty((columns, all_bins + 1), np.int32)
    used, since = np.empty(columns, np.int64), np.empty(columns, np.int64)
    centres, bins, held = np.empty(width, grid.dtype), np.empty(width, np.int32), np.empty(width, np.int32)
    lines = centres, bins, held, np.zeros((width + 7) // 8 * 8, np.uint8)
    weights = np.empty(all_bins, np.float64)
    whole = int(gamma) if gamma <= 16 and gamma == np.floor(gamma) else -1  # raised by products, faster than a power
    first = stored
    copied = 0
    for strip in range(height // patch_size):
        part = table[strip * patch_size : (strip + 1) * patch_size]
        if not _count_strip(part, patch_size, pixels, grid, lines, counts, occupied, used, since):
            return -1
        for column in range(columns):
            i = strip * columns + column
            mass[i] = 0
            count_of = counts[column]
            bin_at = occupied[column]
            number = used[column]
            if number == 1 and bin_at[0] == 0:  # nothing is copied
                if gamma > 0 or not released:
                    count_of[0] = 0
                    continue
            else:
                copied += 1
            if gamma == 0:  # 0^0 = 1: every bin has a share
                number = all_bins
                for k in range(number):
                    bin_at[k] = k
            largest = 1
            for k in range(number):
                if released or bin_at[k] > 0:
                    largest = max(largest, count_of[bin_at[k]])
            total = inside = 0.0
            for k in range(number):
                ratio = count_of[bin_at[k]] / largest
                weights[k] = 1.0 if ratio == 1 else ratio**whole if whole >= 0 else ratio**gamma
                if bin_at[k] > 0:
                    inside += weights[k]
                if released or bin_at[k] > 0:
                    total += weights[k]
            for k in range(number):
                if bin_at[k] > 0:
                    patches[stored], other_patches[stored] = i, bin_at[k] - 1
                    shares[stored] = weights[k] / total
                    stored += 1
                count_of[bin_at[k]] = 0
            mass[i] = inside / total
    averaged = np.float32(mass.size if released else max(copied, 1))
    for i in range(mass.size):
        mass[i] /= averaged
    for e in range(first, stored):
        shares[e] /= averaged
    return stored


@njit(nogil=True, cache=True)
def _in_order(mass: np.ndarray, raster: bool, order: np.ndarray, rank: np.ndarray) -> int:
    """Order patches: those with a ``mass`` [L] first, or all in ``raster`` order. Returns how many count as first.

    ``order`` int32 [L] becomes their indices and ``rank`` int32 [L] its inverse.
    """
    reached = 0
    for i in range(mass.size):
        reached += raster or mass[i] > 0
    first, other = 0, reached
    for i in range(mass.size):
        if raster or mass[i] > 0:
            rank[i] = first
            first += 1
        else:
            rank[i] = other
            other += 1
        order[rank[i]] = i
    return reached


@njit(nogil=True, cache=True)
def _logarithms(mass: np.ndarray, order: np.ndarray, sums: np.ndarray, ratio: np.ndarray) -> float:
    """Sum of mass times log of softmax sum over patches, float64; ``ratio`` [L] becomes mass over sum, in ``order``."""
    total = 0.0
    for i in range(order.size):
        own = mass[order[i]]
        ratio[i] = 0
        if own > 0:  # sums of patches without a copy are incomplete
            total += own * math.log(sums[i])
            ratio[i] = own / sums[i]
    return total


@njit(nogil=True, cache=True, fastmath=_FAST, forceinline=True)
def _softmax_row(
    products: np.ndarray,
    factor: np.float32,
    reference_inverse: np.ndarray,
    scale: np.float32,
    shifted: np.ndarray,
    exponential: np.ndarray,
    column_sum: np.ndarray,
) -> np.float32:
    """A row of raw products, float32 [n], becomes S - 1/tau and E, which is added to the sums. Returns the sum of E."""
    total = np.float32(0)
    for j in range(np.uint64(products.size)):
        x = products[j] * factor * reference_inverse[j] - scale
        shifted[j] = x
        e = _exp(x)
        exponential[j] = e
        total += e
        column_sum[j] += e
    return total


@njit(nogil=True, cache=True, fastmath=_FAST, forceinline=True)
def _gradient_row(
    shifted: np.ndarray,
    exponential: np.ndarray,
    row_ratio: np.float32,
    column_ratio: np.ndarray,
    factor: np.float32,
    reference_inverse: np.ndarray,
    scale: np.float32,
    weight: np.float32,
    radial_reference: np.ndarray,
) -> np.float32:
    """A row of S - 1/tau, float32 [n], becomes G. Returns the sum of dS S, which is also added for each column.

    exponential: E - T / (row_ratio + column_ratio).
    """
    total = np.float32(0)
    for j in range(np.uint64(shifted.size)):
        gradient = weight * (exponential[j] * (row_ratio + column_ratio[j]))
        along = gradient * (shifted[j] + scale)
        total += along
        radial_reference[j] += along
        shifted[j] = gradient * factor * reference_inverse[j]
    return total


@njit(nogil=True, cache=True)
def forward_samples(
    multiplied: bool,
    affinity: np.ndarray,
    query_tokens: np.ndarray,
    reference_tokens: np.ndarray,
    query_to_reference: np.ndarray,
    reference_to_query: np.ndarray,
    query_grid: np.ndarray,
    reference_grid: np.ndarray,
    patch_size: int,
    scale: np.float32,
    gamma: float,
    released: bool,
    weight: float,
    needs_gradient: bool,
    loss: np.ndarray,
    query_order: np.ndarray,
    reference_order: np.ndarray,
    copied: np.ndarray,
    radial_query: np.ndarray,
    radial_reference: np.ndarray,
) -> int:
    """Losses of samples, and with ``needs_gradient`` what ``copynce_cpu_forward`` leaves for backward.

    ``multiplied``: ``affinity`` [B, Lq, pitch] holds the raw products of all patches in raster order; else it is unset.
    Returns the first sample whose tables hold an index outside of the other picture, or -1.
    """
    batch, query_patches, channels = query_tokens.shape
    reference_patches = reference_tokens.shape[1]
    width = panels_for(reference_patches) * WIDTH
    panels = np.empty((panels_for(reference_patches), channels, WIDTH), np.float32)
    block, rows = np.empty((ROWS, width), np.float32), np.empty(ROWS, np.intp)
    exponential = np.empty((query_patches, width), np.float32)
    query_inverse, reference_inverse = np.empty(query_patches, np.float32), np.empty(reference_patches, np.float32)
    query_mass, row_ratio = np.empty(query_patches, np.float32), np.empty(query_patches, np.float32)
    reference_mass, column_ratio = np.empty(reference_patches, np.float32), np.empty(reference_patches, np.float32)
    row_sum, column_sum = np.empty(query_patches, np.float32), np.empty(reference_patches, np.float32)
    query_rank, reference_rank = np.empty(query_patches, np.int32), np.empty(reference_patches, np.int32)
    nothing: Any = np.int64(0)  # for a plain 0 Numba would compile a variant of its own
    # T, entry by entry: most of it is 0. Memory that no entry reaches is never touched.
    entries = 2 * query_patches * reference_patches
    entry_query, entry_reference = np.empty(entries, np.int32), np.empty(entries, np.int32)
    share = np.empty(entries, np.float32)
    for b in range(batch):
        stored = _append_prior(
            query_to_reference[b],
            reference_grid,
            np.uint32(reference_to_query[b].size),
            patch_size,
            gamma,
            released,
            entry_query,
            entry_reference,
            share,
            nothing,
            query_mass,
        )
        if stored < 0:
            return b
        stored = _append_prior(
            reference_to_query[b],
            query_grid,
            np.uint32(query_to_reference[b].size),
            patch_size,
            gamma,
            released,
            entry_reference,
            entry_query,
            share,
            stored,
            reference_mass,
        )
        if stored < 0:
            return b
        order, other_order, matrix = query_order[b], reference_order[b], affinity[b]
        copied[b, 0] = _in_order(query_mass, multiplied, order, query_rank)
        copied[b, 1] = _in_order(reference_mass, multiplied, other_order, reference_rank)
        squares = _inverse_lengths(query_tokens[b], order, query_inverse)
        squares += _inverse_lengths(reference_tokens[b], other_order, reference_inverse)
        if not multiplied:
            pack_columns(reference_tokens[b], other_order, panels)
        column_sum[:] = 0
        for first in range(0, query_patches, ROWS):
            columns = reference_patches if first < copied[b, 0] else copied[b, 1]
            stop = min(first + ROWS, query_patches)
            if not multiplied:
                for r in range(ROWS):
                    rows[r] = query_tokens[b].ctypes.data + 4 * channels * order[min(first + r, query_patches - 1)]
                multiply_rows(rows, 1, panels, panels_for(columns), channels, block)
            for i in range(first, stop):
                if multiplied:
                    for j in range(columns):
                        block[i - first, j] = matrix[i, j]
                row_sum[i] = _softmax_row(
                    block[i - first, :columns],
                    query_inverse[i] * scale,
                    reference_inverse,
                    scale,
                    matrix[i],
                    exponential[i],
                    column_sum,
                )
        total = 0 * squares  # NaN if a token is not finite, though no product may have met it
        total += _logarithms(query_mass, order, row_sum, row_ratio)
        total += _logarithms(reference_mass, other_order, column_sum, column_ratio)
        for e in range(stored):
            if share[e] == 0:  # under a large gamma: its patches may not count as copied
                continue
            i, j = query_rank[entry_query[e]], reference_rank[entry_reference[e]]
            total -= share[e] * matrix[i, j]
            ratio = row_ratio[i] + column_ratio[j]
            if ratio > 0:  # as _gradient_row wants it; below the smallest float32 there is no gradient
                exponential[i, j] -= share[e] / ratio
        loss[b] = weight * total / 2
        if not needs_gradient:
            continue
        along_query, along_reference = radial_query[b], radial_reference[b]
        along_reference[:] = 0
        for i in range(query_patches):
            columns = reference_patches if i < copied[b, 0] else copied[b, 1]
            for j in range(columns, matrix.shape[1]):
                matrix[i, j] = 0
            along_query[i] = _gradient_row(
                matrix[i, :columns],
                exponential[i],
                row_ratio[i],
                column_ratio,
                query_inverse[i] * scale,
                reference_inverse,
                scale,
                np.float32(weight / 2),
                along_reference,
            )
        for i in range(query_patches):
            along_query[i] *= query_inverse[i] * query_inverse[i]
        for j in range(reference_patches):
            along_reference[j] *= reference_inverse[j] * reference_inverse[j]
    return -1


@njit(nogil=True, cache=True)
def _token_gradients(
    matrix: np.ndarray,
    transposed: bool,
    tokens: np.ndarray,
    order: np.ndarray,
    copied: int,
    panels: np.ndarray,
    other_copied: int,
    radial: np.ndarray,
    scale: np.float32,
    gradient: np.ndarray,
) -> None:
    """``gradient`` [L, D] of one side's ``tokens`` [L, D] from G and the other side's tokens in ``panels``.

    matrix: G, whose columns are this side's patches if ``transposed``; order, radial: [L]; copied, other_copied: how
    many patches of this side and of the other come first.
    """
    patches, channels = tokens.shape
    others = panels.shape[1]
    block, rows = np.empty((ROWS, panels.shape[0] * WIDTH), np.float32), np.empty(ROWS, np.intp)
    columns = np.empty((others, ROWS), np.float32)
    for first in range(0, patches, ROWS):
        stop = min(first + ROWS, patches)
        depth = others if first < copied else other_copied
        if transposed:  # ROWS columns of G, close together: one by one they would take a line of cache each
            for k in range(np.uint64(depth)):
                for i in range(np.uint64(first), np.uint64(stop)):
                    columns[k, i - np.uint64(first)] = matrix[k, i]
        for r in range(ROWS):
            if transposed:
                rows[r] = columns.ctypes.data + 4 * r
            else:
                rows[r] = matrix[min(first + r, patches - 1)].ctypes.data
        multiply_rows(rows, ROWS if transposed else 1, panels, panels.shape[0], depth, block)
        for i in range(first, stop):
            own, product, target = tokens[order[i]], block[i - first], gradient[order[i]]
            for c in range(np.uint64(channels)):
                target[c] = scale * (product[c] - radial[i] * own[c])


@njit(nogil=True, cache=True)
def backward_samples(
    affinity: np.ndarray,
    query_tokens: np.ndarray,
    reference_tokens: np.ndarray,
    query_order: np.ndarray,
    reference_order: np.ndarray,
    copied: np.ndarray,
    radial_query: np.ndarray,
    radial_reference: np.ndarray,
    scale: np.float32,
    query_gradient: np.ndarray,
    reference_gradient: np.ndarray,
) -> None:
    """Gradients of samples in tiles, ``scale`` times the loss's; arrays as ``copynce_cpu_forward`` leaves them."""
    batch, query_patches, channels = query_tokens.shape
    reference_patches = reference_tokens.shape[1]
    reference_panels = np.empty((panels_for(channels), reference_patches, WIDTH), np.float32)
    query_panels = np.empty((panels_for(channels), query_patches, WIDTH), np.float32)
    for b in range(batch):
        pack_rows(reference_tokens[b], reference_order[b], reference_panels)
        _token_gradients(
            affinity[b],
            False,
            query_tokens[b],
            query_order[b],
            copied[b, 0],
            reference_panels,
            copied[b, 1],
            radial_query[b],
            scale,
            query_gradient[b],
        )
        pack_rows(query_tokens[b], query_order[b], query_panels)
        _token_gradients(
            affinity[b],
            True,
            reference_tokens[b],
            reference_order[b],
            copied[b, 1],
            query_panels,
            copied[b, 0],
            radial_reference[b],
            scale,
            reference_gradient[b],
        )
