"""Exact search: the references with the highest cosine similarity to each query.

References are proposed by products in fewer digits, in chunks (`copynce.retrieval.proposals`); the cosines of those
that can be among the best are then taken anew in float64. So a score is a number of its two rows alone, whatever k or
chunk, and the k best are the best in one order: by score, then by index. Where a query has more near ties at its last
place than were proposed, it is asked again with more digits, and at last its cosines to all references are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from copynce.errors import DataError
from copynce.retrieval.proposals import Proposals, proposers
from copynce.retrieval.rows import FileRows, JoinedRows, Rows
from copynce.retrieval.selection import cosines

_CHUNK_BYTES = 64 * 2**20  # of references as float32
_QUERIES = 4096  # that pass over the references together, at most
_PROPOSALS = 2**22  # of the queries that do
_ROWS = 4096  # pairs, or references, whose float64 copies are held at a time
_LENGTH_TOLERANCE = 2e-6  # of |row| - 1, for float32 rows that are searched as they are


def check_rows(features: Rows, name: str = "features") -> None:
    """Raise TypeError or ValueError unless `features` is a two-dimensional float array, not empty."""
    known = isinstance(features, np.ndarray | FileRows | JoinedRows)
    if not known or not np.issubdtype(features.dtype, np.floating):
        kind = features.dtype if known else type(features).__name__
        raise TypeError(f"{name} must be a NumPy array of floats, got {kind}")
    if len(features.shape) != 2 or 0 in features.shape:
        raise ValueError(f"{name} must be [N, D] with at least one row and one column, got {list(features.shape)}")


def normalised(features: Rows, name: str = "features") -> NDArray[np.float32]:
    """`features` [N, D] as float32 rows of length 1, a copy; `name` is the argument's name in errors.

    Raises TypeError or ValueError unless they are a non-empty two-dimensional float array, DataError (a ValueError)
    unless its rows are finite and not zero.
    """
    check_rows(features, name)
    rows = np.empty(features.shape, np.float32)
    for start in range(0, len(rows), _ROWS):
        rows[start : start + _ROWS] = _unit64(features, slice(start, start + _ROWS), name)
    return rows


def search(
    query: Rows,
    reference: Rows,
    k: int = 10,
    *,
    gpus: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(scores, indices), each [Nq, k]: the k rows of `reference` most similar to each row of `query`.

    query: [Nq, D], reference: [Nr, D], float rows of any length, maybe memory-mapped. k: at least 1; with fewer than k
    references, all of them are returned. gpus: numbers of those to search on; none: all that faiss sees. progress:
    called with the number of queries done.
    Scores are cosines, computed in float64 and rounded to float32. They decrease along a row; equal scores are ordered
    by index, so the first k of a longer result are the result for k. The references are read in chunks, on the GPUs,
    each of which holds a share of them, or else on the CPU; beyond them some 300 MB are used on the CPU, and no copy of
    float32 rows of length 1. Raises TypeError or ValueError for other shapes, rows that are zero or not finite.

    >>> scores, indices = search(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0], [3.0, 0.0]]), k=2)
    >>> indices.tolist(), scores.tolist()
    ([[1, 0]], [[1.0, 0.0]])
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_rows(query, "query")
    return ExactSearch(reference, k, gpus=gpus)(query, progress)


class ExactSearch:
    """`search` of one set of references, for queries that come in parts: ``(query, progress) -> (scores, indices)``.

    On GPUs the references are put there once. Arguments and results are those of `search`.
    """

    def __init__(self, reference: Rows, k: int = 10, *, gpus: Sequence[int] | None = None) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        check_rows(reference, "reference")
        self._reference = reference
        self.k = min(k, len(reference))
        self._proposers = proposers(self._chunks, (len(reference), reference.shape[1]), self.k, gpus)

    def __call__(
        self, query: Rows, progress: Callable[[int], None] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        check_rows(query, "query")
        columns = self._reference.shape[1]
        if query.shape[1] != columns:
            raise ValueError(f"query and reference must agree in columns, got {query.shape[1]} and {columns}")
        scores = np.empty((len(query), self.k), np.float32)
        indices = np.empty((len(query), self.k), np.int64)
        step = max(1, min(_QUERIES, _PROPOSALS // (2 * self.k + 64)))
        for start in range(0, len(query), step):
            part = slice(start, start + step)
            scores[part], indices[part] = self._best(query[part], _unit32(query, start, step, "query"))
            if progress is not None:
                progress(min(start + step, len(query)))
        return scores, indices

    def _best(
        self, query: NDArray[np.floating], unit: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(scores, indices), each [Nq, k], of `query` [Nq, D], which is `unit` in float32."""
        scores = np.empty((len(query), self.k), np.float32)
        indices = np.empty((len(query), self.k), np.int64)
        rest = np.arange(len(query))  # where references that were not proposed may be among the best
        for propose in self._proposers:
            if len(rest) >= propose.fewest:
                proposed = propose(unit[rest])
                scores[rest], indices[rest], tied = _best(query[rest], self._reference, self.k, proposed)
                rest = rest[tied]
        for start in range(0, len(rest), _ROWS // 16):
            rows = rest[start : start + _ROWS // 16]
            scores[rows], indices[rows] = _best_of_all(query[rows], self._reference, self.k)
        return scores, indices

    def _chunks(self, first: int, stop: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, unit float32 rows) of one chunk of these references after the other."""
        step = max(1, _CHUNK_BYTES // (4 * self._reference.shape[1]))
        for start in range(first, stop, step):
            yield start, _unit32(self._reference, start, min(step, stop - start), "reference")


def _best(
    query: NDArray[np.floating], reference: Rows, k: int, proposed: Proposals
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """(scores, indices), each [Nq, k], of `query` [Nq, D] from its proposed references, and whether [Nq] others may be
    among the best as well."""
    order = np.argsort(-proposed.scores, axis=1)
    around, at = np.take_along_axis(proposed.scores, order, axis=1), np.take_along_axis(proposed.at, order, axis=1)
    within = proposed.error + proposed.relative * np.abs(around)
    # What cannot reach the least that the k-th proposal can be is not among the k best; all else may be.
    possible = around + within >= (around - within)[:, k - 1 : k]
    scores = np.full(around.shape, -np.inf, np.float32)
    scores[possible] = pair_cosines(query, reference, np.nonzero(possible)[0], at[possible])
    tied = possible[:, -1] if around.shape[1] < len(reference) else np.zeros(len(query), bool)
    order = np.lexsort((at, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(at, order, axis=1), tied


def _best_of_all(query: Rows, reference: Rows, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """As `_best`, from the cosines to all references."""
    unit = _unit64(query, slice(None), "query")
    scores = np.empty((len(query), 0), np.float32)
    found = np.empty((len(query), 0), np.int64)
    for start in range(0, len(reference), _ROWS):
        rows = _unit64(reference, slice(start, start + _ROWS), "reference")
        here = np.broadcast_to(np.arange(start, start + len(rows)), (len(query), len(rows)))
        scores = np.concatenate([scores, (unit @ rows.T).astype(np.float32)], axis=1)
        found = np.concatenate([found, here], axis=1)
        if scores.shape[1] > k:
            kept = _first_of_the_highest(scores, k)
            scores, found = np.take_along_axis(scores, kept, axis=1), np.take_along_axis(found, kept, axis=1)
    # The same sums as everywhere: a matrix product may differ from them in float64's last digits.
    pairs = np.repeat(np.arange(len(query)), scores.shape[1])
    scores = pair_cosines(query, reference, pairs, found.ravel()).reshape(scores.shape)
    order = np.lexsort((found, -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(found, order, axis=1)


def _first_of_the_highest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Columns [N, k] of the k highest of each row, in ascending order; of equal ones at the last place the first."""
    count = scores.shape[1]
    last = np.partition(scores, count - k, axis=1)[:, count - k, None]
    above, equal = scores > last, scores == last
    room = k - above.sum(axis=1, keepdims=True)
    return np.nonzero(above | (equal & (np.cumsum(equal, axis=1) <= room)))[1].reshape(len(scores), k)


def pair_cosines(
    query: Rows,
    reference: Rows,
    query_rows: NDArray[np.integer],
    reference_rows: NDArray[np.integer],
) -> NDArray[np.float32]:
    """The cosines [P] of P pairs of rows. Each is summed alone and in the same order: equal rows have equal cosines."""
    found = np.empty(len(query_rows), np.float32)
    for start in range(0, len(found), _ROWS):
        part = slice(start, start + _ROWS)
        found[part] = cosines(*_rows_for(query, query_rows[part]), *_rows_for(reference, reference_rows[part]))
    if not np.all(np.isfinite(found)):
        _unit64(query, query_rows, "query")
        _unit64(reference, reference_rows, "reference")
    return found


def _rows_for(features: Rows, rows: NDArray[np.integer]) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Features in memory or mapped, or a copy of these `rows` of others, and where the rows are in them."""
    whole = isinstance(features, np.ndarray) and features.flags.c_contiguous
    if whole and features.dtype in (np.float32, np.float64):
        found, at = np.asarray(features).view(), rows.astype(np.int64)
    else:
        found, at = np.asarray(features[rows]), np.arange(len(rows))
        found = np.ascontiguousarray(found, np.float64 if found.dtype == np.float64 else np.float32).view()
    found.flags.writeable = False  # one compiled form for all
    return found, at


def _unit64(features: Rows, rows: slice | NDArray[np.integer], name: str) -> NDArray[np.float64]:
    """The `rows` of `features` in float64, of length 1; DataError if one is zero or not finite."""
    part = np.asarray(features[rows]).astype(np.float64, order="C")
    length = _lengths(part)
    if not np.all(_usable(length)):
        steps = (np.asarray(features[start : start + _ROWS]) for start in range(0, len(features), _ROWS))
        broken = np.flatnonzero(~np.concatenate([_usable(_lengths(step.astype(np.float64))) for step in steps]))
        raise DataError(f"{name}: {len(broken)} of {len(features)} rows are zero or not finite, first row {broken[0]}")
    part /= length[:, None]
    return part


def _lengths(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.square(rows).sum(axis=1))


def _usable(length: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.isfinite(length) & (length > 0)


def _unit32(features: Rows, first: int, count: int, name: str) -> NDArray[np.float32]:
    """`count` rows of `features` from `first` on, in float32, of length 1; a view of them if they are so already."""
    part = np.asarray(features[first : first + count])
    if part.dtype == np.float32 and part.flags.c_contiguous:
        squares = np.einsum("nd,nd->n", part, part)
        if np.all(np.abs(squares - 1) <= 2 * _LENGTH_TOLERANCE):
            return part
    unit = np.empty(part.shape, np.float32)
    for start in range(0, len(unit), _ROWS):
        stop = min(start + _ROWS, len(unit))
        unit[start:stop] = _unit64(features, slice(first + start, first + stop), name)
    return unit
