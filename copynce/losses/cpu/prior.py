"""The prior of the overlap on the CPU, compiled by Numba: from a table to the entries of T and the patches' masses.

Pixels become bins (patches of the other picture, 0 for none), bins become counts, and counts the prior of
``copynce.kernels.patch_overlap_reference``, of which only entries that are not 0 are kept. Loops are written out where
slices could stand: they compile in half the time.
"""

from __future__ import annotations

import functools

import numpy as np

from copynce.compiled_cache import njit
from copynce.losses.cpu import FAST


@functools.lru_cache(maxsize=16)
def grid_of(shape: tuple[int, int], patch_size: int) -> np.ndarray:
    """What ``bins_of_line`` needs to know of a picture of height x width pixels, in float32 where that is exact.

    The quotient of a pixel's centre, index + 1/2, and a number of pixels n lies at least 1/(2n) off every integer and
    is wrong by two roundings, index / n * 2^-23 in all: rounding it down is exact for up to 2^22 pixels.
    """
    height, width = shape
    numbers = 0.5, width, width // patch_size, 1 / width, 1 / (width * patch_size), 1 / patch_size
    return np.array(numbers, np.float32 if height * width <= 1 << 22 else np.float64)


@njit(nogil=True, cache=True, fastmath=FAST, forceinline=True)
def bins_of_line(entries: np.ndarray, grid: np.ndarray, centres: np.ndarray, bins: np.ndarray) -> np.uint32:
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
    and int64 [C]; ``since`` int64 [C] and ``lines`` (see ``append_prior``) are scratch.
    Returns False if an entry lies outside of the other picture, which has so many ``pixels``.
    """
    centres, bins, held, differs = lines
    words = differs.view(np.uint64)  # eight pixels at a glance
    used[:] = 0
    since[:] = 0
    for y in range(patch_size):
        if bins_of_line(strip[y], grid, centres, bins if y else held) > pixels:
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
def append_prior(
    table: np.ndarray,
    grid: np.ndarray,
    pixels: np.uint32,
    patch_size: int,
    gamma: float,
    released: bool,
    patches: np.ndarray,
    other_patches: np.ndarray,
    weights: np.ndarray,
    stored: int,
    mass: np.ndarray,
) -> int:
    """Append one direction's prior over its number of patches to the list of T's entries; row sums go to ``mass``.

    table int32 [H, W]; pixels: of the other picture; entry e of T is weights[e], float32, at patches[e] of this
    picture and other_patches[e], int32; ``stored`` entries are there already; mass float32 [L].
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
    powers = np.empty(all_bins, np.float64)
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
                    count_of[0] = 0  # the next row of patches finds counts of 0
                    continue
            else:
                copied += 1
            if gamma == 0:  # 0^0 = 1: every bin weighs the same
                number = all_bins
                for k in range(number):
                    bin_at[k] = k
            largest = 1  # not 0, where gamma 0 lists bins without a count
            for k in range(number):
                if released or bin_at[k] > 0:
                    largest = max(largest, count_of[bin_at[k]])
            total = inside = 0.0
            for k in range(number):
                # Over the largest, as in the twin: no power underflows, and gamma infinity leaves the largest bins.
                ratio = count_of[bin_at[k]] / largest
                powers[k] = 1.0 if ratio == 1 else ratio**whole if whole >= 0 else ratio**gamma
                if bin_at[k] > 0:
                    inside += powers[k]
                if released or bin_at[k] > 0:
                    total += powers[k]
            for k in range(number):
                if bin_at[k] > 0:
                    patches[stored], other_patches[stored] = i, bin_at[k] - 1
                    weights[stored] = powers[k] / total
                    stored += 1
                count_of[bin_at[k]] = 0
            mass[i] = inside / total
    averaged = np.float32(mass.size if released else max(copied, 1))
    for i in range(mass.size):
        mass[i] /= averaged
    for e in range(first, stored):
        weights[e] /= averaged
    return stored
