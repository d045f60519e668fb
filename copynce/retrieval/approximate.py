"""Approximate search where an exact one takes too long on the CPU: IVF-PQ proposes, exact cosines decide.

The references lie in lists around centroids, each as a code of some bytes (faiss, IndexIVFPQ). A query looks into the
lists nearest to it; of what the codes find there, the cosines are taken from the references themselves. So every score
is exact, as that of `search`, and what can be missing are neighbours: how many, `recall` measures.
"""

from __future__ import annotations

import math

import faiss
import numpy as np
from numpy.typing import NDArray

from copynce.retrieval.rows import Rows
from copynce.retrieval.search import ExactSearch, check_rows, normalised, pair_cosines

_QUERIES = 1024  # that are searched together
_CHUNK = 32_768  # references that are coded together
_POINTS = 50  # training points of a centroid


class ApproximateSearch:
    """The references most similar to queries, as of `ExactSearch`, but for some that are missed.

    reference: [Nr, D]. k: neighbours of a query. lists: centroids, none: 4 sqrt(Nr). probes: lists that a query looks
    into, none: one in 16, at least 16. code: bytes of a reference, none: one for 8 columns. proposals: of them the k
    best are taken, none: 10 k, at least 100. The same arguments give the same index. Rows that are not found have index
    -1 and score -inf.
    """

    def __init__(
        self,
        reference: Rows,
        k: int = 10,
        *,
        lists: int | None = None,
        probes: int | None = None,
        code: int | None = None,
        proposals: int | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        check_rows(reference, "reference")
        count, columns = reference.shape
        self._reference = reference
        self.k = min(k, count)
        self._proposals = min(count, max(10 * k, 100) if proposals is None else max(proposals, k))
        self.lists = max(1, min(round(4 * math.sqrt(count)) if lists is None else lists, count // 40))
        self.code = next(
            code
            for code in range(min(columns, max(1, columns // 8) if code is None else code), 0, -1)
            if columns % code == 0
        )
        coarse = faiss.IndexFlatIP(columns)
        # 256 values of a byte cannot be told from fewer rows.
        bits = 8 if count >= 256 * 39 else max(1, int(math.log2(max(2, count // 39))))
        self._index = faiss.IndexIVFPQ(coarse, columns, self.lists, self.code, bits, faiss.METRIC_INNER_PRODUCT)
        self._index.nprobe = min(self.lists, max(16, self.lists // 16) if probes is None else probes)
        for kmeans in (self._index.cp, self._index.pq.cp):  # more change little
            kmeans.niter, kmeans.max_points_per_centroid = 10, 64
        points = min(count, max(_POINTS * self.lists, 256 * _POINTS))
        chosen = np.linspace(0, count - 1, points).round().astype(np.int64)
        self._index.train(normalised(np.asarray(reference[chosen]), "reference"))
        for start in range(0, count, _CHUNK):
            self._index.add(normalised(np.asarray(reference[start : start + _CHUNK]), "reference"))

    @property
    def bytes(self) -> int:
        """Memory of the index, as far as it grows with the references."""
        return int(self._index.ntotal) * (self._index.code_size + 8)

    def __call__(self, query: Rows) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(scores, indices), each [Nq, k], of the rows `query` [Nq, D]."""
        check_rows(query, "query")
        scores = np.full((len(query), self.k), -np.inf, np.float32)
        indices = np.full((len(query), self.k), -1, np.int64)
        for start in range(0, len(query), _QUERIES):
            part = slice(start, start + _QUERIES)
            rows = normalised(np.asarray(query[part]), "query")
            _, at = self._index.search(rows, self._proposals)
            exact = np.full(at.shape, -np.inf, np.float32)
            there = at >= 0
            exact[there] = pair_cosines(rows, self._reference, np.nonzero(there)[0], at[there])
            order = np.lexsort((at, -exact), axis=1)[:, : self.k]
            scores[part], indices[part] = np.take_along_axis(exact, order, 1), np.take_along_axis(at, order, 1)
        return scores, indices

    def recall(self, query: Rows, sample: int = 200, exact: ExactSearch | None = None) -> float:
        """The share of the exact k best that this search finds, by score, of `sample` queries evenly spread."""
        chosen = np.unique(np.linspace(0, len(query) - 1, min(sample, len(query))).round().astype(np.int64))
        rows = np.asarray(query[chosen])
        true = (ExactSearch(self._reference, self.k) if exact is None else exact)(rows)[0]
        # Of equal scores it does not matter which is found.
        return float((self(rows)[0] >= true[:, -1:]).mean())
