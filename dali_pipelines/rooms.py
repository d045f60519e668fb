"""Memory for the large arrays of batches, used again and again.

A batch of 64 pairs has some 20 MB of weights, masks and noise. Freed, the C library gives such
amounts back to the system, and the next batch's fresh pages would cost more time than what is written into them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

#: Arrays begin at multiples of so many bytes, as cache lines do.
_LINE = 64


class Room:
    """One block of memory for the arrays of one batch; after :meth:`clear` for those of another."""

    def __init__(self) -> None:
        self._block: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = 0

    def clear(self) -> None:
        """Arrays made so far will be overwritten; nobody may read them any more."""
        if self._used > self._block.size:
            self._block = self._make(self._used + self._used // 4)
        self._used = 0

    def _make(self, size: int) -> NDArray[np.uint8]:
        return np.empty(size, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """As ``np.empty``, in the block; outside of it if it is full, and the block grows when cleared."""
        start = self._used
        self._used += -(-math.prod(shape) * np.dtype(dtype).itemsize // _LINE) * _LINE
        if self._used > self._block.size:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, self._block, start)
