"""Numba functions of exact search: rows in bfloat16, the best of a block of products, and cosines of pairs.

Products are bfloat16, and come as the whole numbers of their bits [N, M], int16, which `_in_order` maps to numbers of
the same order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from copynce.compiled_cache import njit

_STEP = 64  # products that are looked at together before one by one
LEAST = -(2**15)  # below every number


@njit(nogil=True, cache=True, forceinline=True)
def _in_order(bits):  # type: ignore[no-untyped-def]
    """A bfloat16's bits as int16 -> int16 that grows with it; its own inverse."""
    return bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF))


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def round_rows(rows, bits, rounded):  # type: ignore[no-untyped-def]
    """The longest way that rounding to bfloat16 moves one of `rows` [N, D], float32 whose `bits` are uint32.

    rounded: [N, D] uint16, receives the bits of the bfloat16 numbers, to nearest, ties to even; all are finite.
    """
    kept = np.empty(rows.shape[1], np.uint32)
    numbers = kept.view(np.float32)
    longest = 0.0
    for i in range(len(rows)):
        for j in range(rows.shape[1]):
            upper = (bits[i, j] + np.uint32(0x7FFF) + ((bits[i, j] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            rounded[i, j] = upper
            kept[j] = upper << np.uint32(16)
        square = 0.0
        for j in range(rows.shape[1]):
            moved = np.float64(rows[i, j]) - np.float64(numbers[j])
            square += moved * moved
        longest = max(longest, square)
    return np.sqrt(longest)


@njit(nogil=True, cache=True)
def cut(found, at, count):  # type: ignore[no-untyped-def]
    """Move the `count` highest of `found` [n >= count], with their places `at`, to the front; the least of them."""
    last = np.partition(found, len(found) - count)[len(found) - count]
    equal = count
    for score in found:
        equal -= score > last
    kept = 0
    for i in range(len(found)):
        score = found[i]
        if score > last or (score == last and equal > 0):
            equal -= score == last
            found[kept], at[kept] = score, at[i]
            kept += 1
    return last


@njit(nogil=True, cache=True)
def keep_best(bits, first, count, found, at, filled, least):  # type: ignore[no-untyped-def]
    """Take the products `bits` [N, M] with references from `first` on into what was `found` so far.

    found, at: [N, room > count], of which the first `filled` [N] are taken. What was left out of a row is at most its
    `least` [N], and at least `count` products above or equal to that are kept.
    """
    for row in range(len(bits)):
        bound, taken = least[row], filled[row]
        for start in range(0, bits.shape[1], _STEP):
            stop = min(start + _STEP, bits.shape[1])
            most = np.int16(LEAST)
            for j in range(start, stop):
                most = max(most, _in_order(bits[row, j]))
            if most <= bound:
                continue
            for j in range(start, stop):
                score = _in_order(bits[row, j])
                if score > bound:
                    if taken == found.shape[1]:
                        bound, taken = cut(found[row], at[row], count), count
                        if score <= bound:
                            continue
                    found[row, taken], at[row, taken] = score, first + j
                    taken += 1
        least[row], filled[row] = bound, taken


def as_float32(found: NDArray[np.int16]) -> NDArray[np.float32]:
    """The numbers that `keep_best` found, as they were."""
    bits = found ^ ((found >> 15) & 0x7FFF)
    return (bits.astype(np.int32) << 16).view(np.float32)


# The sums may be taken in any order, but it is that of the number of columns and the processor: equal rows, equal sums.
@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def cosines(query, query_rows, reference, reference_rows):  # type: ignore[no-untyped-def]
    """float64 cosines [P] of P pairs of rows of [Nq, D] and [Nr, D]; no number where one is zero or not finite."""
    found = np.empty(len(query_rows))
    for i in range(len(query_rows)):
        first, second = query[query_rows[i]], reference[reference_rows[i]]
        product = own = other = 0.0
        for j in range(query.shape[1]):
            a, b = np.float64(first[j]), np.float64(second[j])
            product += a * b
            own += a * a
            other += b * b
        lengths = np.sqrt(own) * np.sqrt(other)
        found[i] = product / lengths if lengths > 0 and np.isfinite(lengths) else np.nan
    return found
