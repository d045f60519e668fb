"""How far metrics could be off by the choice of queries: bootstrap intervals.

The evaluation is repeated with as many queries, drawn from its own with replacement (those that copy nothing too); a
query that is drawn twice stands twice in the list of all predictions. The interval of a metric reaches from the 2.5th
to the 97.5th percentile of what the repetitions give. The references are not drawn anew.

No list is sorted again: a drawn query is a weight of its predictions. Of w copies of a true prediction that follow T
true and F false ones, the j-th stands at position T + F + j with precision (T + j) / (T + F + j), so together they add

    sum_j 1 - F / (T + F + j) = w - F (H(T + F + w) - H(T + F)),      H(n) = 1 + 1/2 + ... + 1/n.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.evaluation.metrics import (
    GroundTruthLike,
    Predictions,
    PredictionsLike,
    Rule,
    _average_precisions,
    _judge,
    _Judged,
    as_predictions,
)

#: Repetitions of `bootstrap_intervals`, by default.
REPETITIONS = 1000

_LEVEL = 0.95

Intervals = dict[str, tuple[float, float]]


def bootstrap_intervals(
    predictions: PredictionsLike,
    ground_truth: GroundTruthLike,
    *,
    repetitions: int = REPETITIONS,
    seed: int = 0,
    rule: Rule = "step",
) -> Intervals:
    """{metric: (lower, upper)} of uap, rp90, map, recall_at_1, recall_at_10: percentile bootstrap over queries, 95 %.

    See the module's text. The same seed draws the same queries for any predictions of one ground truth, so that two
    results are judged alike. Repetitions that draw no query that copies something are left out.
    Arguments and errors as in `micro_average_precision`; ValueError for less than one repetition.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    given = as_predictions(predictions)
    truth = {query: list(found) for query, found in ground_truth.items()}
    judged = _judge(given, truth, whole=True)
    queries = [*truth, *(name for name in given._distinct.names if name not in truth)]
    copying = np.flatnonzero(np.fromiter((bool(truth.get(query)) for query in queries), bool, len(queries)))
    flat = _FlatList(judged, given, queries)
    by_query = [_average_precisions(judged, rule), _found(judged, 1), _found(judged, 10)]

    generator = np.random.Generator(np.random.PCG64(seed))
    values: list[tuple[float, ...]] = []
    for _ in range(repetitions):
        drawn = np.bincount(generator.integers(0, len(queries), len(queries)), minlength=len(queries))
        weight = drawn[copying]
        total = int(weight.sum())
        if total:
            shares = [float(weight @ column) / total for column in by_query]
            values.append((*flat.measured(drawn, weight, rule), *shares))
    tail = 50 * (1 - _LEVEL)
    lower, upper = np.percentile(np.array(values), [tail, 100 - tail], axis=0)
    names = ("uap", "rp90", "map", "recall_at_1", "recall_at_10")
    return {name: (float(low), float(high)) for name, low, high in zip(names, lower, upper, strict=True)}


class _FlatList:
    """The list of all predictions, by decreasing score, as far as its last true one."""

    def __init__(self, judged: _Judged, given: Predictions, queries: list[Any]) -> None:
        number = dict(zip(queries, range(len(queries)), strict=True))
        distinct = given._distinct
        numbers = np.fromiter(map(number.__getitem__, distinct.names), np.int32, len(distinct.names))
        order = np.argsort(-given.scores[distinct.kept])
        ranked = np.argsort(-judged.score)
        score, ascending = judged.score[ranked], judged.ascending
        self._true = judged.query[ranked]
        self._references = judged.references
        self._end = len(ascending) - np.searchsorted(ascending, score)  # of all that have at least its score
        self._true_end = len(score) - np.searchsorted(score[::-1], score)  # the same, of the true ones
        last = int(self._end[-1]) if len(score) else 0
        self._query = numbers[distinct.query[distinct.kept[order[:last]]]]
        self._harmonic = np.zeros(1)

    def measured(self, drawn: NDArray[np.int64], weight: NDArray[np.int64], rule: Rule) -> tuple[float, float]:
        """(uap, rp90) where each query stands `drawn` times, those that copy something `weight` times."""
        positives = int(weight @ self._references)
        if not len(self._true):
            return 0.0, 0.0
        copies = weight[self._true]
        after = np.cumsum(copies)
        before = after - copies
        false = np.cumsum(drawn[self._query])[self._end - 1] - after[self._true_end - 1]
        there = copies > 0
        copies, after, before, false = copies[there], after[there], before[there], false[there]
        height = self._precisions(before + false, copies, false)
        if rule == "trapezoid":
            height = (height + self._precisions(before + false - 1, copies, false)) / 2
        enough = after >= 0.9 * (after + false)
        return float(height.sum()) / positives, int(after[enough].max(initial=0)) / positives

    def _precisions(
        self, at: NDArray[np.int64], copies: NDArray[np.int64], false: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """The sum of 1 - false / position over the `copies` positions after `at`."""
        at = np.maximum(at, 0)  # nothing false stands before the first position
        if (most := int((at + copies).max(initial=0))) >= len(self._harmonic):
            self._harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, 2 * most + 1))])
        return copies - false * (self._harmonic[at + copies] - self._harmonic[at])


def _found(judged: _Judged, k: int) -> NDArray[np.float64]:
    """[Q] 1 for queries with a true prediction among their first `k`."""
    found = np.zeros(len(judged.references))
    found[judged.query[judged.rank <= k]] = 1
    return found
