"""Plain twins of mining and normalisation: every similarity in float64, all sorted. For tests and benchmarks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cosines(query: NDArray[np.floating], reference: NDArray[np.floating]) -> NDArray[np.float64]:
    """[Nq, Nr] cosines."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in map(np.float64, (query, reference))]
    return unit[0] @ unit[1].T


def nearest(
    query: NDArray[np.floating],
    reference: NDArray[np.floating],
    k: int,
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Indices [Nq, k] of the k most similar references, -1 where fewer are `allowed` [Nq, Nr]; of equals the first."""
    scores = cosines(query, reference).astype(np.float32)
    if allowed is not None:
        scores[~allowed] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.isfinite(np.take_along_axis(scores, order, axis=1)), order, -1)


def mean_of_ranks(
    query: NDArray[np.floating], auxiliary: NDArray[np.floating], start: int, end: int
) -> NDArray[np.float64]:
    """[Nq] mean of each query's similarities to the auxiliary features of ranks start ... end - 1."""
    return -np.sort(-cosines(query, auxiliary), axis=1)[:, start:end].mean(axis=1)


def stretched_distances(
    query: NDArray[np.floating], reference: NDArray[np.floating], auxiliary: NDArray[np.floating], scale: float = 2.5
) -> NDArray[np.float64]:
    """[Nq, Nr] minus the distances of stretched queries to unit references (PROTOCOLS 3, feature stretching)."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in map(np.float64, (query, reference))]
    stretched = scale * mean_of_ranks(query, auxiliary, 0, 5)[:, None] * unit[0]
    return -np.linalg.norm(stretched[:, None] - unit[1][None], axis=2)
