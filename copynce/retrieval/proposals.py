"""What exact search chooses from: for each query the references whose products in fewer digits are highest.

Each way says how far its products can be from the cosines; `copynce.retrieval.search` takes those anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from copynce.processor import multiplies_bfloat16
from copynce.retrieval.selection import LEAST, as_float32, cut, keep_best, round_rows

#: (first row, stop) -> chunks of those references, one after the other: number of the first, unit float32 rows.
Chunks = Callable[[int, int], Iterator[tuple[int, NDArray[np.float32]]]]

_MOST_OF_GPU = 2048  # results that faiss keeps of one query on a GPU
_BLOCK = 2048  # references whose bfloat16 products are made together
_FEWEST = 64  # queries for which references are worth the rounding to bfloat16


@dataclass(frozen=True)
class Proposals:
    """The `count` references of each query with the highest products.

    scores, at: [Nq, count] float32 and int64. A cosine is within ``error + relative * abs(score)`` of its score, and
    the cosine of a reference that is not among them at most so much above the query's lowest score.
    """

    scores: NDArray[np.float32]
    at: NDArray[np.int64]
    error: float
    relative: float = 0.0


class Proposer(Protocol):
    """One way to propose, from unit queries [Nq, D], at least `fewest` of them."""

    fewest: int

    def __call__(self, query: NDArray[np.float32]) -> Proposals: ...


def proposers(chunks: Chunks, shape: tuple[int, int], k: int, gpus: Sequence[int] | None) -> list[Proposer]:
    """The ways to find `k` of `shape` [Nr, D] references, the fastest first."""
    count = min(k + max(16, k // 4), shape[0])
    devices = range(faiss.get_num_gpus()) if gpus is None else gpus
    if devices and count <= _MOST_OF_GPU:
        return [_OnGpus(chunks, shape, count, devices)]
    by_float32 = _ByFloat32(chunks, shape, count)
    count = 2 * k + 64  # more products in bfloat16 may be those of the k best
    if multiplies_bfloat16() and 4 * count < shape[0]:
        return [_ByBfloat16(chunks, shape, count), by_float32]
    return [by_float32]


class _ByFloat32:
    """On the CPU, by faiss."""

    fewest = 1

    def __init__(self, chunks: Chunks, shape: tuple[int, int], count: int) -> None:
        self._chunks = chunks
        self._count = count
        self._references, columns = shape
        self._error = _float32_error(columns)

    def __call__(self, query: NDArray[np.float32]) -> Proposals:
        return Proposals(*_best_of(self._found(query), self._count), self._error)

    def _found(self, query: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        for start, rows in self._chunks(0, self._references):
            # The same search as IndexFlatIP, without its copy of the references.
            scores, at = faiss.knn(query, rows, min(self._count, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
            yield scores, at + start


class _OnGpus:
    """On GPUs, by faiss; each holds a share of the references."""

    fewest = 1

    def __init__(self, chunks: Chunks, shape: tuple[int, int], count: int, devices: Sequence[int]) -> None:
        self._count = count
        references, columns = shape
        self._error = _float32_error(columns)
        self._shares: list[tuple[int, faiss.Index]] = []
        bounds = np.linspace(0, references, len(devices) + 1).astype(int).tolist()
        for device, start, stop in zip(devices, bounds, bounds[1:], strict=False):
            index = _index_on_gpu(device, columns)
            for _, rows in chunks(start, stop):
                index.add(rows)
            self._shares.append((start, index))

    def __call__(self, query: NDArray[np.float32]) -> Proposals:
        return Proposals(*_best_of(self._found(query), self._count), self._error)

    def _found(self, query: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        shares = [(start, index) for start, index in self._shares if index.ntotal]
        with ThreadPoolExecutor(len(shares)) as threads:
            found = threads.map(lambda share: share[1].search(query, min(self._count, share[1].ntotal)), shares)
            for (start, _), (scores, at) in zip(shares, found, strict=True):
                yield scores, at + start


class _ByBfloat16:
    """On processors with units for bfloat16 products, which make them about twice as fast as float32 ones."""

    fewest = _FEWEST

    def __init__(self, chunks: Chunks, shape: tuple[int, int], count: int) -> None:
        self._chunks = chunks
        self._count = count
        self._references, columns = shape
        self._error = _float32_error(columns)

    def __call__(self, query: NDArray[np.float32]) -> Proposals:
        room = 2 * self._count
        found, at = np.empty((len(query), room), np.int16), np.empty((len(query), room), np.int64)
        filled, least = np.zeros(len(query), np.int64), np.full(len(query), LEAST, np.int16)
        rounded, of_query = _rounded(query)
        of_reference = 0.0
        bounds = np.linspace(0, len(query), torch.get_num_threads() + 1).astype(int).tolist()
        parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        with ThreadPoolExecutor(len(parts)) as threads:
            for first, rows in self._chunks(0, self._references):
                for start in range(0, len(rows), _BLOCK):
                    block, moved = _rounded(rows[start : start + _BLOCK])
                    of_reference = max(of_reference, moved)
                    bits = (rounded @ block.T).view(torch.int16).numpy()

                    def keep(part: slice, bits: NDArray[np.int16] = bits, first: int = first + start) -> None:
                        keep_best(bits[part], first, self._count, found[part], at[part], filled[part], least[part])

                    list(threads.map(keep, parts))
        for row in range(len(query)):
            cut(found[row, : filled[row]], at[row, : filled[row]], self._count)
        kept = slice(0, self._count)
        # q.r - q'.r' = (q - q').r + q'.(r - r'), whose rows have length 1 but for rounding (Cauchy-Schwarz); the sums
        # are float32, and each is rounded by half a unit of its 8 bits.
        error = 1.001 * (of_query + (1 + of_query) * of_reference + self._error)
        return Proposals(as_float32(found[:, kept]), at[:, kept], error, relative=2.0**-8)


def _rounded(rows: NDArray[np.float32]) -> tuple[torch.Tensor, float]:
    """float32 rows in bfloat16, and the longest way that one of them was moved."""
    view = rows.view()
    view.flags.writeable = False  # one compiled form for all
    bits = np.empty(rows.shape, np.uint16)
    moved = float(round_rows(view, view.view(np.uint32), bits))
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), moved


def _best_of(
    found: Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]], count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `count` highest scores of parts of the references, and their places."""
    scores, at = next(found)
    for more in found:
        scores, at = np.concatenate([scores, more[0]], axis=1), np.concatenate([at, more[1]], axis=1)
        if scores.shape[1] > count:
            kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            scores, at = np.take_along_axis(scores, kept, axis=1), np.take_along_axis(at, kept, axis=1)
    return scores, at


def _float32_error(columns: int) -> float:
    """A float32 product of unit rows is off by less than this, in whatever order it is summed; see Higham's gamma_n.

    64 stands for the lengths' tolerance and the rounding of the rows.
    """
    return (columns + 64) * 2.0**-24


def _index_on_gpu(device: int, columns: int) -> faiss.Index:
    """An empty index of inner products on a GPU."""
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device, faiss.IndexFlatIP(columns))
