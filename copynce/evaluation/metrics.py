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

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from copynce.errors import DataError
from copynce.evaluation.ids import difference, kinds_of


class _Columns(NamedTuple):
    queries: NDArray[Any]
    references: NDArray[Any]
    scores: NDArray[np.float64]


class _Distinct(NamedTuple):
    """What the metrics need of predictions, whatever the ground truth is."""

    names: list[Any]  # the queries, each once
    query: NDArray[np.int64]  # [N] place in `names`, of every prediction
    references: list[Any]  # [N]
    kinds: set[str]  # of the references
    kept: NDArray[np.int64]  # [M] the predictions that count: of a repeated pair the one with the highest score
    ascending: NDArray[np.float64]  # [M] their scores, sorted


class Predictions(_Columns):
    """Predictions in columns: entry i says that query `queries[i]` copies `references[i]`, with `scores[i]`.

    The arrays are copied and cannot be written to: what all metrics need of them is made here, once. Scores become
    float64 (exact for float32). Raises TypeError for columns that are no arrays, ids that are not hashable or scores
    that are no numbers, ValueError for columns of unequal length, DataError for scores that are not finite.
    """

    _distinct: _Distinct

    def __new__(cls, queries: NDArray[Any], references: NDArray[Any], scores: NDArray[Any]) -> Predictions:
        for name, column in zip(cls._fields, (queries, references, scores), strict=True):
            if not isinstance(column, np.ndarray):
                raise TypeError(f"{name} must be a NumPy array, got {type(column).__name__}")
        try:
            numbers = np.array(scores, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"scores must be numbers: {error}; three arrays are taken for the columns queries, references, scores, "
                "anything else for rows (query, reference, score)"
            ) from error
        shapes = [column.shape for column in (queries, references, numbers)]
        if any(len(shape) != 1 for shape in shapes) or len(set(shapes)) != 1:
            raise ValueError(f"queries, references and scores must be one-dimensional and equally long, got {shapes}")
        broken = np.flatnonzero(~np.isfinite(numbers))
        if len(broken):
            i = int(broken[0])
            raise DataError(
                f"scores must be finite, got {numbers[i]} for query {queries[i]!r}, reference {references[i]!r} "
                f"({len(broken)} of {len(numbers)} are not); leave out what was not found"
            )
        columns = np.array(queries), np.array(references), numbers
        for column in columns:
            column.setflags(write=False)
        made = super().__new__(cls, *columns)
        made._distinct = _distinct(*columns)
        return made

    @classmethod
    def of_distinct(
        cls,
        queries: NDArray[Any],
        references: NDArray[Any],
        scores: NDArray[np.float64],
        names: Iterable[Any],
        query: NDArray[np.integer],
    ) -> Predictions:
        """Predictions that are known to be sound and distinct: nothing is checked or copied.

        names: the queries' ids, each once; some may have no prediction. query: [N] each prediction's place in `names`.
        """
        known = np.fromiter(names, object)
        there = np.bincount(query, minlength=len(known)) > 0
        place = (np.cumsum(there) - 1)[query]
        for column in (queries, references, scores):
            column.setflags(write=False)
        made = super().__new__(cls, queries, references, scores)
        found = references.tolist()
        rows = np.arange(len(place))
        made._distinct = _Distinct(known[there].tolist(), place, found, kinds_of(found), rows, np.sort(scores))
        return made

    def __reduce__(self) -> tuple[type[Predictions], tuple[NDArray[Any], ...]]:
        return Predictions, tuple(self)


def _distinct(queries: NDArray[Any], references: NDArray[Any], scores: NDArray[np.float64]) -> _Distinct:
    query_ids, reference_ids = queries.tolist(), references.tolist()
    try:
        place = {query: i for i, query in enumerate(dict.fromkeys(query_ids))}
        hashes = np.fromiter(map(hash, reference_ids), np.int64, len(reference_ids))
    except TypeError as error:
        raise TypeError(f"ids must be hashable, such as str or int: {error}") from error
    query = np.fromiter(map(place.__getitem__, query_ids), np.int64, len(query_ids))
    # Pairs with different hashes differ; the few others are compared.
    pair = hashes.view(np.uint64) + query.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    order = np.argsort(pair)
    equal = np.flatnonzero(pair[order[1:]] == pair[order[:-1]])
    suspects = np.unique(order[np.r_[equal, equal + 1]])
    best: dict[tuple[int, Any], int] = {}
    for row in suspects.tolist():
        key = int(query[row]), reference_ids[row]
        if scores[row] > scores[best.setdefault(key, row)]:
            best[key] = row
    counts = np.ones(len(query_ids), bool)
    counts[suspects] = False
    counts[list(best.values())] = True
    kept = np.flatnonzero(counts)
    return _Distinct(list(place), query, reference_ids, kinds_of(reference_ids), kept, np.sort(scores[kept]))


Columns = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
PredictionsLike = Predictions | Columns | Iterable[tuple[Hashable, Hashable, float]]
GroundTruthLike = Mapping[Any, Iterable[Any]]


#: How average precision is summed: see `micro_average_precision`.
Rule = Literal["step", "trapezoid"]


class _Judged(NamedTuple):
    """The predictions that are true, and the counts.

    Queries that copy something are numbered in the order of the ground truth. The true ones are grouped by query, by
    decreasing score, equal scores as given.
    """

    query: NDArray[np.int64]  # [T] number of the query
    score: NDArray[np.float64]  # [T]
    rank: NDArray[np.int64]  # [T] from 1, within the query
    worst: NDArray[np.int64]  # [T] the same, behind all that have its score
    ascending: NDArray[np.float64]  # [M] scores of all distinct predictions, sorted
    references: NDArray[np.int64]  # [Q] of each query that copies something, sum N+
    positives: int  # N+
    warning: str | None  # what looks wrong with the ids


def micro_average_precision(
    predictions: PredictionsLike, ground_truth: GroundTruthLike, *, rule: Rule = "step"
) -> float:
    """uAP: average precision of all predictions in one list, in [0, 1].

    predictions: (query, reference, score) triples, or three arrays (queries, references, scores) of one length.
    Higher scores are better. `Predictions` are the fastest form where several metrics follow.
    ground_truth: {query: [references]}; queries that are no key of it, or have an empty list, copy nothing.
    Raises TypeError for arguments of another form, ValueError for columns that do not fit together, DataError (a
    ValueError) for scores that are not finite, a ground truth without any pair (recall is then undefined), or ids none
    of which is in the ground truth because they have another type or form there. Other ids that meet in part, or not
    at all, are judged as they are, with a Python warning.
    rule: "step", or "trapezoid" as Copydays has it (PROTOCOLS 13.2): the mean of the precision before and after each
    true prediction, 1 before the first position.

    >>> micro_average_precision([("q1", "r1", 0.9), ("q2", "r9", 0.8), ("q2", "r2", 0.7)], {"q1": ["r1"], "q2": ["r2"]})
    0.8333333333333333
    """
    return _micro_average_precision(_judge(predictions, ground_truth), rule)


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


def mean_average_precision(
    predictions: PredictionsLike, ground_truth: GroundTruthLike, *, rule: Rule = "step"
) -> float:
    """mAP: average precision of each query's own list, averaged over all queries that copy something.

    Of one query: the sum of TP(k) / k over the ranks k of its true predictions, divided by the number of its
    references. Arguments, `rule` and errors as in `micro_average_precision`.

    >>> mean_average_precision([("q1", "r1", 0.9), ("q2", "r9", 0.8), ("q2", "r2", 0.7)], {"q1": ["r1"], "q2": ["r2"]})
    0.75
    """
    return float(np.mean(_average_precisions(_judge(predictions, ground_truth), rule)))


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
    return int(np.count_nonzero(judged.worst <= rank)) / judged.positives


def precision_recall_curve(
    predictions: PredictionsLike, ground_truth: GroundTruthLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(recall, precision, score), one of each per true prediction, by decreasing score: the curve whose area uAP is.

    Between two of them recall stays and precision falls. Arguments and errors as in `micro_average_precision`.
    """
    judged = _judge(predictions, ground_truth)
    score, position = _positions(judged)
    found = np.arange(1, len(position) + 1)
    return found / judged.positives, found / position, score


def score_predictions(
    predictions: PredictionsLike, ground_truth: GroundTruthLike, *, rule: Rule = "step"
) -> dict[str, float | int | str | None]:
    """All metrics of an evaluation, ready for a `metrics.json`.

    Keys: uap, rp90, rp90_threshold (None if precision 0.9 is never reached; rp90 is then 0.0), map, recall_at_1,
    recall_at_10; counts: queries, positive_queries, positives (N+), predictions (distinct pairs); warning: what looks
    wrong with the ids, in a sentence for people, or None (this function gives no Python warning).
    Arguments and errors as in `micro_average_precision`; also DataError if no predicted query is a key of the ground
    truth, as happens with that of another split. `rule` is that of uap and map.
    """
    judged = _judge(predictions, ground_truth, whole=True)
    rp90, threshold = _recall_at_precision(judged, 0.9)
    return {
        "uap": _micro_average_precision(judged, rule),
        "rp90": rp90,
        "rp90_threshold": threshold,
        "map": float(np.mean(_average_precisions(judged, rule))),
        "recall_at_1": _recall_at_k(judged, 1),
        "recall_at_10": _recall_at_k(judged, 10),
        "queries": len(ground_truth),
        "positive_queries": len(judged.references),
        "positives": judged.positives,
        "predictions": len(judged.ascending),
        "warning": judged.warning,
    }


def as_predictions(predictions: PredictionsLike) -> Predictions:
    """`predictions` in columns, checked; errors as of `Predictions`, TypeError for anything else.

    Three NumPy arrays are columns, anything else is taken for rows.
    """
    if isinstance(predictions, Predictions):
        return predictions
    if isinstance(predictions, (str, bytes, Mapping)) or not isinstance(predictions, Iterable):
        raise TypeError(
            "predictions must be (query, reference, score) triples or three arrays (queries, references, scores), "
            f"got {type(predictions).__name__}"
        )
    rows: Any = predictions if isinstance(predictions, Sequence) else list(predictions)
    one_array = isinstance(predictions, np.ndarray)  # its rows are arrays, but no columns
    if len(rows) == 3 and not one_array and all(isinstance(column, np.ndarray) for column in rows):
        return Predictions(*rows)
    if not all(map(_is_triple, rows)):
        i, row = next((i, row) for i, row in enumerate(rows) if not _is_triple(row))
        raise TypeError(
            f"predictions[{i}] must be a triple (query, reference, score), got {row!r}; columns must be NumPy arrays"
        )
    columns = [np.empty(len(rows), dtype=object) for _ in range(3)]  # np.array would turn mixed ids into strings
    for i, column in enumerate(columns):
        column[:] = [row[i] for row in rows]
    return Predictions(*columns)


def _is_triple(row: object) -> bool:
    if isinstance(row, np.void):  # of a record array
        return len(row.dtype.names or ()) == 3
    return isinstance(row, (tuple, list, np.ndarray)) and len(row) == 3


def _judge(predictions: PredictionsLike, ground_truth: GroundTruthLike, *, whole: bool = False) -> _Judged:
    given = as_predictions(predictions)
    truth = _copies(ground_truth)
    distinct = given._distinct
    warning = _check_ids(distinct, ground_truth, truth, whole)
    if warning is not None and not whole:
        warnings.warn(warning, stacklevel=3)

    number = dict(zip(truth, range(len(truth)), strict=True))
    copies = np.fromiter(map(number.get, distinct.names, repeat(-1)), np.int64, len(distinct.names))
    query = copies[distinct.query[distinct.kept]]
    copying = query >= 0  # nothing else can be true
    rows, query = distinct.kept[copying], query[copying]
    found = map(list(truth.values()).__getitem__, query.tolist())
    references = map(distinct.references.__getitem__, rows.tolist())
    true = np.fromiter((r in those for r, those in zip(references, found, strict=True)), bool, len(rows))

    score = given.scores[rows]
    order = np.lexsort((-score, query))  # stable
    query, score, true = query[order], score[order], np.flatnonzero(true[order])
    start = np.searchsorted(query, query[true])
    end = np.flatnonzero(np.r_[(query[1:] != query[:-1]) | (score[1:] != score[:-1]), True])  # of runs of one score
    counts = np.fromiter(map(len, truth.values()), np.int64, len(truth))
    return _Judged(
        query=query[true],
        score=score[true],
        rank=true - start + 1,
        worst=end[np.searchsorted(end, true)] - start + 1,
        ascending=distinct.ascending,
        references=counts,
        positives=int(counts.sum()),
        warning=warning,
    )


def _copies(ground_truth: GroundTruthLike) -> dict[Any, frozenset[Any]]:
    """The queries of the ground truth that copy something, each with its distinct references."""
    if not isinstance(ground_truth, Mapping):
        raise TypeError(f"ground_truth must be {{query: [references]}}, got {type(ground_truth).__name__}")
    truth = {}
    for query, found in ground_truth.items():
        if not isinstance(found, list) and (isinstance(found, (str, bytes)) or not isinstance(found, Iterable)):
            raise TypeError(f"ground_truth[{query!r}] must be a list of references, got {found!r}")
        try:
            references = frozenset(found)
        except TypeError as error:
            raise TypeError(f"ground_truth[{query!r}] holds an id that is none: {error}") from error
        if references:
            truth[query] = references
    if not truth:
        raise DataError(
            "ground_truth has no pair, so no recall can be computed; every list of references is empty. Is it hidden? "
            "Then keep the predictions and have them judged where it is known"
        )
    return truth


def _check_ids(
    distinct: _Distinct, ground_truth: GroundTruthLike, truth: dict[Any, frozenset[Any]], whole: bool
) -> str | None:
    """A sentence where ids of predictions and ground truth meet in part or not, DataError where they cannot meet.

    whole: this is an evaluation, where some query must be known.
    """
    if not distinct.names:
        return "there are no predictions, so every copy counts as missed"
    sentences = []
    unknown = [query for query in distinct.names if query not in ground_truth]
    references = frozenset().union(*truth.values())
    if len(unknown) == len(distinct.names):
        sentence = (
            f"no predicted query is in the ground truth (predicted: {unknown[0]!r}, ...; ground truth: "
            f"{next(iter(ground_truth))!r}, ...)"
        )
        if why := difference(unknown, ground_truth):
            raise DataError(f"{sentence}; {why}")
        swapped = not references.isdisjoint(distinct.names)
        way = "are the columns swapped?" if swapped else "give the ground truth of the same split"
        if whole:
            raise DataError(f"{sentence}; {way}")
        return f"{sentence}; {way}"
    if unknown:
        why = difference(unknown, ground_truth)
        sentences.append(
            f"{len(unknown)} of {len(distinct.names)} predicted queries are not in the ground truth and count as "
            f"copies of nothing, the first is {unknown[0]!r}" + (f"; {why}" if why else "")
        )
    if references.isdisjoint(distinct.references):
        why = difference(distinct.references, references)
        sentence = (
            f"no predicted reference is in the ground truth (predicted: {distinct.references[0]!r}, ...; ground truth: "
            f"{next(iter(next(iter(truth.values()))))!r}, ...)"
        )
        if why:
            raise DataError(f"{sentence}; {why}")
        sentences.append(sentence)
    elif strange := distinct.kinds - kinds_of(references):
        sentences.append(
            f"predicted references are of type {' and '.join(sorted(strange))} too, none in the ground truth is"
        )
    return "; ".join(sentences) or None


def _positions(judged: _Judged) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores of the true predictions by decreasing score, and their positions from 1 in the list of all predictions.

    The tie rule: among equal scores false ones come first.
    """
    score = np.sort(judged.score)
    false = (len(judged.ascending) - np.searchsorted(judged.ascending, score)) - (
        len(score) - np.searchsorted(score, score)
    )
    return score[::-1], false[::-1] + np.arange(1, len(score) + 1)


def _micro_average_precision(judged: _Judged, rule: Rule) -> float:
    _, position = _positions(judged)
    found = np.arange(1, len(position) + 1)
    # One NumPy sum over all positions, also those that add 0: the challenge's own digits depend on this order.
    terms = np.zeros(len(judged.ascending))
    terms[position - 1] = np.diff(found / judged.positives, prepend=0.0) * _precision(found, position, rule)
    return float(np.sum(terms))


def _precision(found: NDArray[np.int64], position: NDArray[np.int64], rule: Rule) -> NDArray[np.float64]:
    """Of true predictions, the `found`-th of a list each, at their positions from 1: its height in the sum."""
    after = found / position
    if rule == "step":
        return after
    return (after + np.where(position == 1, 1.0, (found - 1) / np.maximum(position - 1, 1))) / 2


def _recall_at_precision(judged: _Judged, required: float) -> tuple[float, float | None]:
    score, position = _positions(judged)
    found = np.arange(1, len(position) + 1)
    enough = np.flatnonzero(found / position >= required)  # recall and precision rise at true predictions only
    if not len(enough):
        return 0.0, None
    return float(found[enough[-1]] / judged.positives), float(score[enough[-1]])


def _average_precisions(judged: _Judged, rule: Rule) -> NDArray[np.float64]:
    """[Q] the average precision of the own list of each query that copies something."""
    query = judged.query
    found = np.arange(1, len(query) + 1) - np.searchsorted(query, query)  # TP(k) of the query's own list
    height = _precision(found, judged.rank, rule)
    return np.bincount(query, weights=height, minlength=len(judged.references)) / judged.references


def _recall_at_k(judged: _Judged, k: int) -> float:
    return len(np.unique(judged.query[judged.rank <= k])) / len(judged.references)


def _check_rank(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
