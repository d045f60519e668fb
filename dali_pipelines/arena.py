"""Memory for the large arrays of batches, used again and again.

A batch of 64 pairs has some 20 MB of weights, masks and noise. Freed, the C library gives such
amounts back to the system, and the next batch's fresh pages would cost more time than what is written into them.
"""

from __future__ import annotations

import math
import mmap
import os
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

#: Arrays begin at multiples of so many bytes, as cache lines do, so that no two share one.
_LINE = 64


class Arena:
    """One block of memory for the arrays of one batch; after :meth:`clear` for those of another."""

    def __init__(self) -> None:
        self._block: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = 0

    def clear(self) -> None:
        """Arrays made so far will be overwritten; nobody may read them any more."""
        if self._used > self._block.size:
            # A quarter more, for the next batches differ: else each that is a little larger would make a new block.
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


class SharedArena(Arena):
    """An arena of ``size`` bytes that another process maps by its descriptor; not in /dev/shm, which often is small."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.is_new = False
        self._descriptor: int | None = None
        if size:
            self._block = self._make(size)

    @property
    def size(self) -> int:
        return self._block.size

    def start_of(self, array: NDArray[Any]) -> int | None:
        """The byte at which a contiguous array lies in the arena; None if it lies elsewhere."""
        start = array.ctypes.data - self._block.ctypes.data
        inside = start >= 0 and start + array.nbytes <= self._block.size
        return start if inside and array.flags.c_contiguous else None

    def send(self, pipe: Connection, number: int, owner: int) -> None:
        """Tell the owner of which block the next message speaks, and hand it over if it has not seen it."""
        is_new, self.is_new = self.is_new, False
        pipe.send((number, self._block.size, is_new))
        if is_new:
            assert self._descriptor is not None, "made by _make"
            reduction.send_handle(pipe, self._descriptor, owner)

    def _make(self, size: int) -> NDArray[np.uint8]:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = os.memfd_create("dali_pipelines", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, size)
        self.is_new = True
        return np.frombuffer(mmap.mmap(self._descriptor, size), np.uint8)
