"""Score normalisation: a query that resembles everything gets lower scores.

    s'(q, r) = q.r - alpha * mean(s_(start), ..., s_(end - 1)),   s_(0) >= s_(1) >= ... : similarities of q to the
                                                                  auxiliary pictures (training pictures, no references)

CopyNCE's defaults are alpha 1, start 1, end 5: the best neighbour is skipped, the next four are averaged. The bias is
the same for all predictions of a query, so the order inside a query, mAP and recall@k stay; uAP and RP90 change.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from copynce.errors import ConfigError
from copynce.retrieval.rows import Rows
from copynce.retrieval.search import search


def score_normalization(
    scores: NDArray[np.floating],
    query: Rows,
    auxiliary: Rows,
    *,
    start: int = 1,
    end: int = 5,
    alpha: float = 1.0,
) -> NDArray[np.float32]:
    """Normalised scores [Nq, k].

    scores: [Nq, k] cosine similarities of the queries' predictions, as `search` returns them. query: [Nq, D] and
    auxiliary: [Na, D] float features, L2-normalised here. start, end: ranks of the auxiliary similarities that are
    averaged, from 0, `end` exclusive; at least `end` auxiliary pictures are needed. alpha: weight of the mean.
    Raises ValueError where these do not fit.
    """
    check_ranks(start, end)
    if scores.ndim != 2 or len(scores) != len(query):
        raise ValueError(f"scores must be [Nq, k] with Nq = {len(query)} as in query, got {list(scores.shape)}")
    if len(auxiliary) < end:
        raise ValueError(f"auxiliary must have at least end = {end} rows, got {len(auxiliary)}")
    similarities, _ = search(query, auxiliary, k=end)
    return (scores - alpha * similarities[:, start:end].mean(axis=1, keepdims=True)).astype(np.float32)


def check_ranks(start: int, end: int) -> None:
    """Raise ConfigError, a ValueError, unless `start` and `end` name at least one rank."""
    if not 0 <= start < end:
        raise ConfigError(f"start and end must satisfy 0 <= start < end, got {start} and {end}")
