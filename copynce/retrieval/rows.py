"""Rows of features that need not lie in one array: what search reads, and files joined to one table.

A table of a million descriptors is some files, each memory-mapped. Whatever has a shape, a type and gives rows by slice
or by indices can be searched; NumPy's arrays do.
"""

from __future__ import annotations

import mmap
import operator
import os
from collections.abc import Sequence
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray


class Rows(Protocol):
    """Float rows [N, D]: a NumPy array, :class:`FileRows` or :class:`JoinedRows`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Any: ...


class FileRows:
    """float32 rows [N, D] in a file from byte `offset` on, mapped anew whenever some are asked for: no file stays open,
    so there may be thousands. What it gives are views of the file."""

    dtype = np.dtype(np.float32)

    def __init__(self, path: str | os.PathLike[str], offset: int, shape: tuple[int, int]) -> None:
        self._path, self._offset = path, offset
        self.shape: tuple[int, ...] = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        return self._mapped()[rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        rows: NDArray[Any] = self._mapped()
        if dtype is not None and np.dtype(dtype) != self.dtype:
            return rows.astype(dtype)
        return rows.copy() if copy else rows

    def _mapped(self) -> NDArray[np.float32]:
        if 0 in self.shape:  # nothing can be mapped
            return np.empty(self.shape, np.float32)
        with open(self._path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(content, np.float32, self.shape[0] * self.shape[1], self._offset).reshape(self.shape)


class JoinedRows:
    """Tables [N_i, D] one after the other, read as one table [N, D]; nothing is copied but the rows that are asked for.

    A slice inside of one of them is a view of it. ``np.asarray`` copies the whole table into memory.

    >>> rows = JoinedRows([np.zeros((2, 3), np.float32), np.ones((1, 3), np.float32)])
    >>> rows.shape, rows[1:3].tolist(), rows[[2, 0]][:, 0].tolist()
    ((3, 3), [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [1.0, 0.0])
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        if not parts:
            raise ValueError("parts must hold at least one table")
        kinds = {(part.shape[1:], part.dtype) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"parts must agree in columns and type, got {sorted(map(str, kinds))}")
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._parts[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, rows: int) -> NDArray[np.floating]: ...
    @overload
    def __getitem__(self, rows: slice | NDArray[np.integer] | Sequence[int]) -> NDArray[np.floating]: ...
    def __getitem__(self, rows: int | slice | NDArray[np.integer] | Sequence[int]) -> NDArray[np.floating]:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return self._between(start, max(start, stop)) if step == 1 else self._at(np.arange(start, stop, step))
        if isinstance(rows, Sequence | np.ndarray):
            return self._at(np.asarray(rows, np.int64))
        row = operator.index(rows)
        return self._at(np.array([row]))[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.floating]:
        if copy is False:
            raise ValueError("rows of several files cannot become one array without a copy")
        whole = np.concatenate([np.asarray(part) for part in self._parts])
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _between(self, start: int, stop: int) -> NDArray[np.floating]:
        first = int(np.searchsorted(self._ends, start, "right"))
        found = []
        while start < stop:
            begin = int(self._ends[first - 1]) if first else 0
            end = min(stop, int(self._ends[first]))
            if end > start:
                found.append(self._parts[first][start - begin : end - begin])
            start, first = end, first + 1
        if not found:
            return self._parts[0][:0]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _at(self, rows: NDArray[np.int64]) -> NDArray[np.floating]:
        count = len(self)
        if len(rows) and not (-count <= rows.min() and rows.max() < count):
            raise IndexError(f"rows must lie in [{-count}, {count - 1}], got {rows.min()} to {rows.max()}")
        rows = np.where(rows < 0, rows + count, rows)
        part_of = np.searchsorted(self._ends, rows, "right")
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part in np.unique(part_of):
            here = part_of == part
            found[here] = self._parts[part][rows[here] - (self._ends[part - 1] if part else 0)]
        return found


def joined(parts: Sequence[Rows]) -> Rows:
    """The tables as one, empty ones left out: the table itself where it is one."""
    full = [part for part in parts if len(part)] or list(parts[:1])
    return full[0] if len(full) == 1 else JoinedRows(full)
