"""The pictures of an index most similar to others: exactly, in memory, or by Lance's IVF-PQ with re-ranking.

Both give the cosines of the descriptors as they are in the table, each a number of its two rows alone (see
`copynce.retrieval.search`). What IVF-PQ can miss are neighbours; how many, `build_approximate` measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from copynce.index.names import restored
from copynce.index.table import PictureTable, as_matrix

if TYPE_CHECKING:  # at once only where something is searched: torch and faiss take seconds
    from copynce.retrieval.search import ExactSearch

_COLUMN = "descriptor"
_LEAST_ROWS = 10_000  # fewer train no 256 centroids, and are searched at once
_ROWS_OF_A_LIST = 4096
_ITERATIONS = 10  # of k-means; Lance's 50 take three times as long and find no more
_REFINE = 20  # times k: proposals whose distances are taken from the descriptors themselves
_SAMPLE, _SAMPLE_K = 100, 10
_ROUNDING = 1e-6  # of Lance's float32 distances
_QUERIES = 256  # that Lance is asked together


@dataclass(frozen=True)
class Neighbours:
    """For each of N queries its k most similar pictures, the best first.

    scores: float32 [N, k], cosines. ids, paths: N lists of k. Where fewer were found, -inf and empty names.
    """

    scores: NDArray[np.float32]
    ids: list[list[str]]
    paths: list[list[str]]


class IndexSearch:
    """Search in one version of a table; built anew for the next.

    memory_bytes: descriptors of up to so many bytes (as float32) are held and searched exactly.
    """

    def __init__(self, table: PictureTable, memory_bytes: float) -> None:
        self._table = table
        self.version = table.version
        self.count = len(table)
        self.dim = table.schema.field(_COLUMN).type.list_size
        self.exact = 4 * self.count * self.dim <= memory_bytes
        self._names: pa.Table | None = None
        self._rows: NDArray[np.float32] | None = None
        self._search: ExactSearch | None = None

    def __call__(self, descriptors: NDArray[np.floating], k: int) -> Neighbours:
        """The neighbours of `descriptors` [N, D], rows of any length. Raises ValueError for a k below 1 or other
        columns, DataError for rows that are zero or not finite."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if descriptors.ndim != 2 or descriptors.shape[1] != self.dim:
            raise ValueError(f"descriptors must be [N, {self.dim}] for this index, got {list(descriptors.shape)}")
        if not self.count or not len(descriptors):
            return Neighbours(
                np.empty((len(descriptors), 0), np.float32), [[]] * len(descriptors), [[]] * len(descriptors)
            )
        return self._exactly(descriptors, k) if self.exact else self._by_lance(descriptors, min(k, self.count))

    def _exactly(self, query: NDArray[np.floating], k: int) -> Neighbours:
        from copynce.retrieval.search import ExactSearch

        if self._rows is None:
            self._names, rows = self._table.descriptors()
            self._rows = _unit(rows)
        if self._search is None or self._search.k < min(k, self.count):
            self._search = ExactSearch(self._rows, k)
        scores, at = self._search(query)
        scores, at = scores[:, :k], at[:, :k]
        assert self._names is not None, "read with the rows"
        chosen = self._names.take(pa.array(at.ravel()))
        ids, paths = restored(chosen["id"]), restored(chosen["path"])
        return Neighbours(scores, _rows_of(ids, *at.shape), _rows_of(paths, *at.shape))

    def _by_lance(self, query: NDArray[np.floating], k: int) -> Neighbours:
        from copynce.retrieval.search import normalised, pair_cosines

        scores = np.full((len(query), k), -np.inf, np.float32)
        ids, paths = [[""] * k for _ in query], [[""] * k for _ in query]
        for start in range(0, len(query), _QUERIES):
            part = query[start : start + _QUERIES]
            found = ask(self._table, normalised(part, "descriptors"), k).to_arrow()
            asked = (
                found["query_index"].to_numpy().astype(np.int64) if len(part) > 1 else np.zeros(len(found), np.int64)
            )
            rows = _unit(as_matrix(found[_COLUMN]))
            exact = pair_cosines(part, rows, asked, np.arange(len(rows)))
            names, places = restored(found["id"]), restored(found["path"])
            # By score, then by path: Lance's own order of equal ones is not said.
            order = sorted(range(len(rows)), key=lambda i: (asked[i], -exact[i], places[i]))
            rank = [0] * len(part)
            for i in order:
                row, at = int(asked[i]), rank[asked[i]]
                if at < k:
                    scores[start + row, at], ids[start + row][at], paths[start + row][at] = (
                        exact[i],
                        names[i],
                        places[i],
                    )
                    rank[row] += 1
        return Neighbours(scores, ids, paths)


def ask(table: PictureTable, query: NDArray[np.float32], k: int, *, exactly: bool = False) -> Any:
    """Lance's query for the k rows nearest to each of `query` [N, D]: by its IVF-PQ index where there is one, and
    wherever rows have come since, or exactly, by a pass over all rows on the disk."""
    columns = ["id", "path", _COLUMN, "_distance"]
    vectors = query[0] if len(query) == 1 else list(query)
    asked = table.engine.search(vectors, vector_column_name=_COLUMN, query_type="vector").distance_type("cosine")
    asked = asked.limit(k).select(columns)
    if exactly:
        return asked.bypass_vector_index()
    return asked.nprobes(int(table.noted().get("copynce.probes", 20))).refine_factor(_REFINE)


def build_approximate(table: PictureTable) -> float | None:
    """Build an IVF-PQ index of the table's descriptors, or take in the rows that have come since; the recall measured
    on it: the share of the exact ten nearest found, over a hundred of its pictures. None: there are too few rows."""
    from lancedb.index import IvfPq

    from copynce.retrieval.search import normalised

    count = len(table)
    if count < _LEAST_ROWS:
        return None
    if approximate(table) is None:
        dim = table.schema.field(_COLUMN).type.list_size
        lists = max(1, min(count // _ROWS_OF_A_LIST, 65_536))
        # A byte for 4 numbers: half as much misses more than re-ranking can mend.
        code = next(code for code in range(max(1, dim // 4), 0, -1) if dim % code == 0)
        way = IvfPq(distance_type="cosine", num_partitions=lists, num_sub_vectors=code, max_iterations=_ITERATIONS)
        table.engine.create_index(_COLUMN, config=way)
        table.note({"copynce.probes": str(min(lists, max(16, math.isqrt(lists))))})
    else:
        table.compact()
    table.refresh()
    chosen = np.linspace(0, count - 1, _SAMPLE).astype(np.int64).tolist()
    rows = as_matrix(table.engine.take_offsets(chosen).select([_COLUMN]).to_arrow()[_COLUMN])
    query = normalised(rows, "index")
    true, found = (_distances(table, query, exactly=exactly) for exactly in (True, False))
    # By distance, not by name: of equal pictures it does not matter which is found.
    recall = float((found <= true[:, -1:] + _ROUNDING).mean())
    table.note({"copynce.recall": f"{recall:.4f}", "copynce.recall_rows": str(count)})
    return recall


def _distances(table: PictureTable, query: NDArray[np.float32], *, exactly: bool) -> NDArray[np.float32]:
    """Of each query [N] to the rows that are found, ascending, [N, _SAMPLE_K]; infinite where fewer are."""
    answers = ask(table, query, _SAMPLE_K, exactly=exactly).to_arrow()
    found = np.full((len(query), _SAMPLE_K), np.inf, np.float32)
    asked, distance = answers["query_index"].to_numpy(), answers["_distance"].to_numpy()
    for row in range(len(query)):
        here = np.sort(distance[asked == row])
        found[row, : len(here)] = here
    return found


def approximate(table: PictureTable) -> dict[str, Any] | None:
    """What there is to say of the table's IVF-PQ index: rows in it and not yet, its recall and at how many rows that
    was measured; None without one."""
    found = [index for index in table.engine.list_indices() if index.columns == [_COLUMN]]
    if not found:
        return None
    stats, noted = table.engine.index_stats(found[0].name), table.noted()
    return {
        "rows": stats.num_indexed_rows,
        "rows_to_come": stats.num_unindexed_rows,
        "probes": int(noted.get("copynce.probes", 0)),
        "recall": float(noted["copynce.recall"]) if "copynce.recall" in noted else None,
        "recall_at_rows": int(noted.get("copynce.recall_rows", 0)),
    }


def _unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """The table's descriptors as float32 of length 1: as they are, but for float16, whose lengths are rounded."""
    if rows.dtype == np.float32:
        return rows
    from copynce.retrieval.search import normalised

    return normalised(rows, "index")


def _rows_of(flat: list[str], rows: int, columns: int) -> list[list[str]]:
    return [flat[row * columns : (row + 1) * columns] for row in range(rows)]
