"""Names and paths of millions of pictures in a few arrays, which worker processes map instead of copying.

A list of a million paths is a gigabyte of objects, and by pickle every worker would get its own. Here the text lies in
one array and another says where each string ends; a string or path is made when it is asked for.
"""

from __future__ import annotations

import itertools
import mmap
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.sources import AnyPath, ShardMember

T = TypeVar("T")

#: Elements of a table that its text shows; strings that an iteration decodes at once.
_SHOWN, _CHUNK = 10, 65_536


class SharedArray:
    """An array ``values`` that does not change; a process that is being started maps its memory, or its file."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values if _is_file(values) else np.ascontiguousarray(values)
        self._descriptor: int | None = None

    def __reduce__(self) -> tuple[Callable[..., SharedArray], tuple[Any, ...]]:
        if _is_file(self.values):
            table = self.values
            order = "C" if table.flags.c_contiguous else "F"
            return _open, (os.path.abspath(str(table.filename)), table.dtype.str, table.offset, table.shape, order)
        if get_spawning_popen() is None or self.values.nbytes == 0:  # nothing cannot be mapped
            return SharedArray, (self.values,)
        if self._descriptor is None:
            self._descriptor = os.memfd_create("copynce", os.MFD_CLOEXEC)  # not in /dev/shm, which often is small
            with open(self._descriptor, "wb", closefd=False) as file:
                file.write(self.values.data)
            self.values = _map(self._descriptor, self.values.dtype.str, self.values.shape)
        return _attach, (reduction.DupFd(self._descriptor), self.values.dtype.str, self.values.shape)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _is_file(values: NDArray[Any]) -> TypeGuard[np.memmap]:
    """Whether an array is a file as ``np.load(mmap_mode="r")`` maps it, and no part of it."""
    return isinstance(values, np.memmap) and isinstance(values.base, mmap.mmap) and values.filename is not None


def _open(path: str, dtype: str, offset: int, shape: tuple[int, ...], order: Any) -> SharedArray:
    return SharedArray(np.memmap(path, dtype, "r", offset, shape, order))


def _map(descriptor: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), dtype).reshape(shape)


def _attach(handle: Any, dtype: str, shape: tuple[int, ...]) -> SharedArray:
    descriptor = handle.detach()
    try:
        return SharedArray(_map(descriptor, dtype, shape))
    finally:
        os.close(descriptor)


class _Column(Sequence[T]):
    """What the tables share: they compare, add and print as lists of their elements; a slice is a list."""

    def _at(self, index: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        if isinstance(at, slice):
            return [self._at(i) for i in range(*at.indices(len(self)))]
        index = operator.index(at)
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} elements, got index {index}")
        return self._at(index % len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[T]) -> list[T]:
        return [*self, *other]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:_SHOWN]))
        return f"[{shown}]" if len(self) <= _SHOWN else f"[{shown}, ... {len(self)} in all]"


class Strings(_Column[str]):
    """A sequence of strings, whatever is in them.

    >>> Strings(["a", "", "b c"])
    ['a', '', 'b c']
    """

    def __init__(self, strings: Iterable[str]) -> None:
        # surrogatepass gives back every string, of bytes that are no UTF-8 too.
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        ends = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=ends[1:])
        self._ends = SharedArray(ends)
        self._text = SharedArray(np.frombuffer(b"".join(encoded), np.uint8))

    def __len__(self) -> int:
        return len(self._ends.values) - 1

    def _at(self, index: int) -> str:
        start, end = self._ends.values[index : index + 2]
        return self._text.values[start:end].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _CHUNK):
            ends = self._ends.values[first : first + _CHUNK + 1]
            text = self._text.values[ends[0] : ends[-1]].tobytes()
            places = (ends - ends[0]).tolist()
            for start, end in itertools.pairwise(places):
                yield text[start:end].decode("utf-8", "surrogatepass")

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """As of a list, without making its strings."""
        wanted = value.encode("utf-8", "surrogatepass")
        starts, ends = self._ends.values[:-1][start:stop], self._ends.values[1:][start:stop]
        fitting = np.flatnonzero(ends - starts == len(wanted))
        for place, byte in enumerate(wanted):
            fitting = fitting[self._text.values[starts[fitting] + place] == byte]
        if not len(fitting):
            raise ValueError(f"{value!r} is not among the {len(self)} strings")
        return int(fitting[0]) + start


class Paths(_Column[Path | ShardMember]):
    """A sequence of files and of files in shards."""

    def __init__(self, paths: Iterable[AnyPath]) -> None:
        names: list[str] = []
        shards: dict[str, int] = {}
        places: list[tuple[int, int, int, int]] = []
        for path in paths:
            if isinstance(path, ShardMember):
                if not places:  # files so far
                    places = [(-1, 0, 0, 0)] * len(names)
                shard = shards.setdefault(path.shard, len(shards))
                places.append((shard, path.offset, path.size, path.header))
                names.append(path.name)
            else:
                if places:
                    places.append((-1, 0, 0, 0))
                names.append(os.fspath(path))
        self._names = Strings(names)
        self._shards = Strings(shards)
        self._places = SharedArray(np.array(places, np.int64).reshape(-1, 4))

    def __len__(self) -> int:
        return len(self._names)

    def files(self) -> Iterator[str | ShardMember]:
        """The elements in their order; of a plain file its name, no Path is made of it."""
        if not len(self._shards):
            return iter(self._names)
        return (path if isinstance(path, ShardMember) else os.fspath(path) for path in self)

    def _at(self, index: int) -> Path | ShardMember:
        name = self._names[index]
        if not len(self._shards):
            return Path(name)
        shard, offset, size, header = self._places.values[index].tolist()
        return Path(name) if shard < 0 else ShardMember(self._shards[shard], name, offset, size, header)
