"""Exact search: the references with the highest cosine similarity to each query."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray


def normalised(features: NDArray[np.floating], name: str = "features") -> NDArray[np.float32]:
    """`features` [N, D] as float32 rows of length 1; `name` is the argument's name in errors.

    Raises TypeError or ValueError unless they are a non-empty two-dimensional float array of finite rows that are
    not zero.
    """
    if not isinstance(features, np.ndarray) or not np.issubdtype(features.dtype, np.floating):
        kind = features.dtype if isinstance(features, np.ndarray) else type(features).__name__
        raise TypeError(f"{name} must be a NumPy array of floats, got {kind}")
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must be [N, D] with at least one row and one column, got {list(features.shape)}")
    rows = np.array(features, dtype=np.float32, order="C")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    broken = np.flatnonzero(~np.isfinite(length[:, 0]) | (length[:, 0] == 0))
    if len(broken):
        raise ValueError(f"{name}: {len(broken)} of {len(rows)} rows are zero or not finite, first row {broken[0]}")
    rows /= length
    return rows


def search(
    query: NDArray[np.floating], reference: NDArray[np.floating], k: int = 10
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(scores, indices), each [Nq, k]: the k rows of `reference` most similar to each row of `query`.

    query: [Nq, D], reference: [Nr, D], float; both are L2-normalised in float32 first, so scores are cosines.
    k: at least 1; with fewer than k references, all of them are returned.
    Scores decrease along a row; equal scores are ordered by index. The search is exact, in blocks, on every GPU that
    faiss sees or else on the CPU. Raises TypeError or ValueError for other shapes, rows that are zero or not finite.

    >>> scores, indices = search(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0], [3.0, 0.0]]), k=2)
    >>> indices.tolist(), scores.tolist()
    ([[1, 0]], [[1.0, 0.0]])
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    query, reference = normalised(query, "query"), normalised(reference, "reference")
    if query.shape[1] != reference.shape[1]:
        raise ValueError(f"query and reference must agree in columns, got {query.shape[1]} and {reference.shape[1]}")
    k = min(k, len(reference))
    if faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(reference.shape[1]))
        index.add(reference)
        scores, indices = index.search(query, k)
    else:  # the same search as IndexFlatIP, without its copy of the references
        scores, indices = faiss.knn(query, reference, k, metric=faiss.METRIC_INNER_PRODUCT)
    order = np.lexsort((indices, -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1).astype(np.int64)
