"""The metrics of the 2021 Image Similarity Challenge and of CopyNCE: uAP, RP90, mAP, recall@k, recall at rank.

All of them judge a list of predictions (query, reference, score) against the ground truth {query: [references]}.
N+ is the number of ground-truth pairs, including those of queries that returned nothing.

    uAP  = sum_k (R_k - R_{k-1}) P_k   over the flat list of all queries' predictions, by decreasing score,
    P_k  = TP(k) / k,  R_k = TP(k) / N+,
    RP90 = the largest R_k with P_k >= 0.9, over all k (not the first crossing).

Tie rule of the flat list: among equal scores every false pair stands before every true one, the worst case; each
position is an operating point of its own. Inside one query (mAP, recall@k) equal scores keep the order in which they
were given, as in the released code: that order is the search's result. A pair predicted more than once counts once,
with its highest score.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Predictions(NamedTuple):
    """Predictions in columns: entry i says that query `queries[i]` copies `references[i]`, with `scores[i]`."""

    queries: NDArray[Any]
    references: NDArray[Any]
    scores: NDArray[np.float64]


Columns = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
PredictionsLike = Predictions | Columns | Iterable[tuple[Hashable, Hashable, float]]
GroundTruthLike = Mapping[Any, Sequence[Any]]


class _Judged(NamedTuple):
    """Distinct predictions by decreasing score (equal scores as given), each told true or false."""

    query: NDArray[np.int64]  # [N] number of the query; those of the ground truth come first
    score: NDArray[np.float64]  # [N]
    true: NDArray[np.bool_]  # [N]
    positives: NDArray[np.int64]  # [Q] references of each query of the ground truth, sum N+


def micro_average_precision(predictions: PredictionsLike, ground_truth: GroundTruthLike) -> float:
    """uAP: average precision of all predictions in one list, in [0, 1].

    predictions: (query, reference, score) triples, or three arrays (queries, references, scores) of one length.
    ground_truth: {query: [references]}; queries that are no key of it, or have an empty list, copy nothing.
    Raises TypeError for arguments of another form, ValueError for scores that are not finite or if the ground truth
    has no pair at all (recall is then undefined).

    >>> micro_average_precision([("q1", "r1", 0.9), ("q2", "r9", 0.8), ("q2", "r2", 0.7)], {"q1": ["r1"], "q2": ["r2"]})
    0.8333333333333333
    """
    return _micro_average_precision(_judge(predictions, ground_truth))


def recall_at_precision(
    predictions: PredictionsLike, ground_truth: GroundTruthLike, precision: float = 0.9
) -> tuple[float, float | None]:
    """(recall, threshold): the largest recall at any position whose precision is at least `precision` in (0, 1].

    threshold is the score at the first position of that recall; predictions with at least this score reach it, up to
    ties. (0.0, None) if no position is precise enough. Arguments and errors as in `micro_average_precision`.

    >>> recall_at_precision([("q1", "r1", 0.9), ("q2", "r9", 0.8), ("q2", "r2", 0.7)], {"q1": ["r1"], "q2": ["r2"]})
    (0.5, 0.9)
    """
    if not 0.0 < precision <= 1.0:
        raise ValueError(f"precision must be in (0, 1], got {precision}")
    return _recall_at_precision(_judge(predictions, ground_truth), precision)


def mean_average_precision(predictions: PredictionsLike, ground_truth: GroundTruthLike) -> float:
    """mAP: average precision of each query's own list, averaged over all queries that copy something.

    Of one query: the sum of TP(k) / k over the ranks k of its true predictions, divided by the number of its
    references. Arguments and errors as in `micro_average_precision`.

    >>> mean_average_precision([("q1", "r1", 0.9), ("q2", "r9", 0.8), ("q2", "r2", 0.7)], {"q1": ["r1"], "q2": ["r2"]})
    0.75
    """
    return _mean_average_precision(_judge(predictions, ground_truth))


def recall_at_k(predictions: PredictionsLike, ground_truth: GroundTruthLike, k: int) -> float:
    """Share of the queries that copy something for which any of their references is among their first `k` predictions.

    Queries that returned nothing count as not found; the released code leaves them out of the share, which is the
    same as a ground truth without them. Arguments and errors as in `micro_average_precision`.

    >>> recall_at_k([("q1", "r1", 0.9), ("q2", "r9", 0.8), ("q2", "r2", 0.7)], {"q1": ["r1"], "q2": ["r2"]}, k=1)
    0.5
    """
    _check_rank("k", k)
    return _recall_at_k(_judge(predictions, ground_truth), k)


def recall_at_rank(predictions: PredictionsLike, ground_truth: GroundTruthLike, rank: int) -> float:
    """The challenge's recall at rank: share of the N+ pairs that stand at rank `rank` or better of their query.

    The rank of a pair is the number of its query's predictions with at least its score, so ties count against it.
    Arguments and errors as in `micro_average_precision`.

    >>> recall_at_rank([("q1", "r1", 0.9), ("q1", "r2", 0.9)], {"q1": ["r1"]}, rank=1)
    0.0
    """
    _check_rank("rank", rank)
    judged = _judge(predictions, ground_truth)
    order, ranks = _ranks(judged)
    query, score = judged.query[order], judged.score[order]
    # The last entry of each run of one query and one score gives its rank to the whole run.
    last = np.r_[(query[1:] != query[:-1]) | (score[1:] != score[:-1]), True][: len(query)]
    run = np.cumsum(np.r_[0, last[:-1]])[: len(query)]
    worst = ranks[last][run] if len(query) else ranks
    return int(np.count_nonzero(judged.true[order] & (worst <= rank))) / int(judged.positives.sum())


def score_predictions(predictions: PredictionsLike, ground_truth: GroundTruthLike) -> dict[str, float | int | None]:
    """All metrics of an evaluation, ready for a `metrics.json`.

    Keys: uap, rp90, rp90_threshold (None if precision 0.9 is never reached; rp90 is then 0.0), map, recall_at_1,
    recall_at_10; counts: queries, positive_queries, positives (N+), predictions (distinct pairs).
    Arguments and errors as in `micro_average_precision`; also ValueError if not one predicted query is a key of the
    ground truth, as happens with the ground truth of another split.
    """
    columns = as_predictions(predictions)
    if len(columns.scores) and not any(query in ground_truth for query in columns.queries.tolist()):
        raise ValueError(
            f"no predicted query is in the ground truth (predicted: {columns.queries[0]!r}, ...; ground truth: "
            f"{next(iter(ground_truth), None)!r}, ...); give the ground truth of the same split"
        )
    judged = _judge(columns, ground_truth)
    rp90, threshold = _recall_at_precision(judged, 0.9)
    return {
        "uap": _micro_average_precision(judged),
        "rp90": rp90,
        "rp90_threshold": threshold,
        "map": _mean_average_precision(judged),
        "recall_at_1": _recall_at_k(judged, 1),
        "recall_at_10": _recall_at_k(judged, 10),
        "queries": len(judged.positives),
        "positive_queries": int(np.count_nonzero(judged.positives)),
        "positives": int(judged.positives.sum()),
        "predictions": len(judged.score),
    }


def as_predictions(predictions: PredictionsLike) -> Predictions:
    """`predictions` in columns, checked; scores become float64 (exact for float32).

    Three NumPy arrays are columns, anything else is taken for rows.
    """
    if isinstance(predictions, (str, bytes, Mapping)) or not isinstance(predictions, Iterable):
        raise TypeError(
            "predictions must be (query, reference, score) triples or three arrays (queries, references, scores), "
            f"got {type(predictions).__name__}"
        )
    columns: Sequence[Any]
    rows: Sequence[Any] = predictions if isinstance(predictions, Sequence) else list(predictions)
    one_array = isinstance(predictions, np.ndarray)  # its rows are arrays, but no columns
    if len(rows) == 3 and not one_array and all(isinstance(column, np.ndarray) for column in rows):
        columns = rows
        shapes = [column.shape for column in columns]
        if any(len(shape) != 1 for shape in shapes) or len(set(shapes)) != 1:
            raise ValueError(f"queries, references and scores must be one-dimensional and equally long, got {shapes}")
    else:
        if not all(map(_is_triple, rows)):
            i, row = next((i, row) for i, row in enumerate(rows) if not _is_triple(row))
            raise TypeError(f"predictions[{i}] must be a triple (query, reference, score), got {row!r}")
        columns = tuple([row[i] for row in rows] for i in range(3))
    try:
        scores = np.asarray(columns[2], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"scores must be numbers: {error}") from error
    broken = np.flatnonzero(~np.isfinite(scores))
    if len(broken):
        i = int(broken[0])
        raise ValueError(
            f"scores must be finite, got {scores[i]} for query {columns[0][i]!r}, reference {columns[1][i]!r} "
            f"({len(broken)} of {len(scores)} are not)"
        )
    return Predictions(_ids(columns[0]), _ids(columns[1]), scores)


def _is_triple(row: object) -> bool:
    return isinstance(row, (tuple, list, np.ndarray)) and len(row) == 3


def _ids(column: Sequence[Any] | NDArray[Any]) -> NDArray[Any]:
    if isinstance(column, np.ndarray):
        return column
    ids = np.empty(len(column), dtype=object)  # np.array would turn mixed ids into strings
    ids[:] = column
    return ids


def _judge(predictions: PredictionsLike, ground_truth: GroundTruthLike) -> _Judged:
    queries, references, scores = as_predictions(predictions)
    if not isinstance(ground_truth, Mapping):
        raise TypeError(f"ground_truth must be {{query: [references]}}, got {type(ground_truth).__name__}")

    query_number = {query: i for i, query in enumerate(ground_truth)}
    reference_number: dict[Any, int] = {}
    true_query: list[int] = []
    true_reference: list[int] = []
    for query, found in ground_truth.items():
        if isinstance(found, (str, bytes)) or not isinstance(found, Iterable):
            raise TypeError(f"ground_truth[{query!r}] must be a list of references, got {found!r}")
        for reference in found:
            true_query.append(query_number[query])
            true_reference.append(reference_number.setdefault(reference, len(reference_number)))
    if not true_query:
        raise ValueError("ground_truth has no pair, so no recall can be computed; every list of references is empty")

    query_count = len(ground_truth)
    query = np.array([query_number.setdefault(q, len(query_number)) for q in queries.tolist()], np.int64)
    reference = np.array([reference_number.setdefault(r, len(reference_number)) for r in references.tolist()], np.int64)
    pair = query * len(reference_number) + reference
    true_pair = np.unique(np.array(true_query) * len(reference_number) + np.array(true_reference))

    order = np.argsort(-scores, kind="stable")
    _, first = np.unique(pair[order], return_index=True)  # the highest score of each pair
    order = order[np.sort(first)]
    return _Judged(
        query=query[order],
        score=scores[order],
        true=np.isin(pair[order], true_pair),
        positives=np.bincount(true_pair // len(reference_number), minlength=query_count),
    )


def _curve(judged: _Judged) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Precision, recall and score at every position of the flat list."""
    order = np.lexsort((judged.true, -judged.score))  # the tie rule: equal scores, false before true
    found = np.cumsum(judged.true[order])
    return found / np.arange(1, len(found) + 1), found / judged.positives.sum(), judged.score[order]


def _micro_average_precision(judged: _Judged) -> float:
    precision, recall, _ = _curve(judged)
    # One NumPy sum over all positions, also those that add 0: the challenge's own digits depend on this order.
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def _recall_at_precision(judged: _Judged, required: float) -> tuple[float, float | None]:
    precision, recall, score = _curve(judged)
    enough = precision >= required
    if not enough.any():
        return 0.0, None
    best = np.flatnonzero(enough)[np.argmax(recall[enough])]  # argmax: the first of the positions with this recall
    return float(recall[best]), float(score[best])


def _ranks(judged: _Judged) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order that groups the predictions by query, and the rank from 1 that each then has in its query."""
    order = np.argsort(judged.query, kind="stable")
    query = judged.query[order]
    start = np.searchsorted(query, query, side="left")
    return order, np.arange(1, len(query) + 1) - start


def _mean_average_precision(judged: _Judged) -> float:
    order, ranks = _ranks(judged)
    true = judged.true[order]
    query, ranks = judged.query[order][true], ranks[true]
    found = np.arange(1, len(query) + 1) - np.searchsorted(query, query, side="left")  # TP(k) of the query's own list
    precision = np.bincount(query, weights=found / ranks, minlength=len(judged.positives))
    positive = judged.positives > 0
    return float(np.mean(precision[positive] / judged.positives[positive]))


def _recall_at_k(judged: _Judged, k: int) -> float:
    order, ranks = _ranks(judged)
    hit = judged.query[order][judged.true[order] & (ranks <= k)]
    return len(np.unique(hit)) / int(np.count_nonzero(judged.positives))


def _check_rank(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
