"""The passes between the CPU path's products, compiled by Numba: samples from first to last, forward and backward.

``forward_samples`` and ``backward_samples`` are the equations of ``copynce.losses.cpu`` line by line. All matrices are
float32 and C-contiguous. Loops are written out where slices could stand: they compile in half the time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from copynce.compiled_cache import njit
from copynce.losses.cpu import FAST
from copynce.losses.cpu.prior import append_prior
from copynce.losses.cpu.tiles import ROWS, WIDTH, multiply_rows, pack_columns, pack_rows, panels_for

_SMALLEST_NORM = 1e-12  # as torch.nn.functional.normalize


@njit(nogil=True, cache=True, fastmath=FAST, inline="always")
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


@njit(nogil=True, cache=True, fastmath=FAST, forceinline=True)
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


@njit(nogil=True, cache=True, fastmath=FAST, forceinline=True)
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


@njit(nogil=True, cache=True, fastmath=FAST, forceinline=True)
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
    entry_weight = np.empty(entries, np.float32)
    for b in range(batch):
        # The priors first: they tell which patches have a copy, and whether the tables are sound.
        stored = append_prior(
            query_to_reference[b],
            reference_grid,
            np.uint32(reference_to_query[b].size),
            patch_size,
            gamma,
            released,
            entry_query,
            entry_reference,
            entry_weight,
            nothing,
            query_mass,
        )
        if stored < 0:
            return b
        stored = append_prior(
            reference_to_query[b],
            query_grid,
            np.uint32(query_to_reference[b].size),
            patch_size,
            gamma,
            released,
            entry_reference,
            entry_query,
            entry_weight,
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
        # Affinities, and both softmaxes from one exponential while a block of rows is in cache. A block whose first row
        # has a copy takes all columns; sums that are so complete without need meet a mass of 0.
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
        # The loss, and T taken off E at its few entries.
        total = 0 * squares  # NaN if a token is not finite, though no product may have met it
        total += _logarithms(query_mass, order, row_sum, row_ratio)
        total += _logarithms(reference_mass, other_order, column_sum, column_ratio)
        for e in range(stored):
            if entry_weight[e] == 0:  # under a large gamma: its patches may not count as copied
                continue
            i, j = query_rank[entry_query[e]], reference_rank[entry_reference[e]]
            total -= entry_weight[e] * matrix[i, j]
            ratio = row_ratio[i] + column_ratio[j]
            if ratio > 0:  # as _gradient_row wants it; below the smallest float32 there is no gradient
                exponential[i, j] -= entry_weight[e] / ratio
        loss[b] = weight * total / 2
        if not needs_gradient:
            continue
        # G over S in place; the corner that no copy reaches is 0.
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
        for r in range(ROWS):  # beyond the last one it repeats, and is not read
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
