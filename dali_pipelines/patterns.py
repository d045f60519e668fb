"""Patterns that edits draw by a number: noise, rain, shuffled pixels; the same for a number on every machine."""

from __future__ import annotations

import functools

import numpy as np

from copynce.pixtrace import Rain
from copynce.pixtrace.view.composed_view import Empty

#: Offsets of the noise texture per axis; an Erase's ``noise_seed`` chooses one of their square. To cut a window out of
#: one texture costs a fraction of drawing as many normal numbers.
_NOISE_OFFSETS = 256

#: Pixels that a drop of Rain is high, and so many pixels of the view have one drop (Albumentations' defaults).
_DROP, _PIXELS_A_DROP = 20, 600

#: Share of the pixels that ShufflePixels moves.
_SHUFFLED = 0.1


def drops(rain: Rain, size: int) -> np.ndarray:
    """uint8 0/1 [size, size]: drops that begin where Albumentations 1.3.1 would let them."""
    random = np.random.Generator(np.random.PCG64(rain.noise_seed))
    count = size * size // _PIXELS_A_DROP
    length = min(_DROP, size - 1)
    x = random.integers(min(rain.slant, 0), max(size - max(rain.slant, 0), 0) + 1, count)
    y = random.integers(0, size - length + 1, count)
    along = np.arange(length + 1)
    rows = y[:, None] + along
    columns = x[:, None] + np.floor(rain.slant * along / length + 0.5).astype(np.int64)
    inside = (rows < size) & (columns >= 0) & (columns < size)
    pattern = np.zeros((size, size), np.uint8)
    pattern[rows[inside], columns[inside]] = 1
    return pattern


@functools.lru_cache(maxsize=4)
def shuffled(size: int) -> np.ndarray:
    """float32 [size, size, 2]: where each pixel comes from, (x, y) of its centre."""
    random = np.random.Generator(np.random.PCG64(10))
    moved = np.flatnonzero(random.random(size * size) < _SHUFFLED)
    places = np.arange(size * size)
    places[moved] = random.permutation(moved)
    return np.stack([places % size + 0.5, places // size + 0.5], axis=-1).reshape(size, size, 2).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _noise_texture(size: int) -> np.ndarray:
    """N(0, 1) on the [0, 1] colour scale, times 255; the seed is arbitrary but fixed."""
    side = size + _NOISE_OFFSETS
    return 255.0 * np.random.Generator(np.random.PCG64(0)).standard_normal((side, side, 3), dtype=np.float32)


def noise(number: int, size: int, empty: Empty = np.empty) -> np.ndarray:
    """float32 [size, size, 3]: the window of the texture that ``number`` chooses."""
    y, x = number % _NOISE_OFFSETS, number // _NOISE_OFFSETS % _NOISE_OFFSETS
    window = empty((size, size, 3), np.float32)
    window[:] = _noise_texture(size)[y : y + size, x : x + size]
    return window
