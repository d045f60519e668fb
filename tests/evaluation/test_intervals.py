"""Bootstrap intervals against evaluations that are repeated in full, and the trapezoid rule against its loop."""

from __future__ import annotations

import numpy as np
import pytest

from copynce.evaluation.intervals import bootstrap_intervals
from copynce.evaluation.metrics import (
    Predictions,
    Rule,
    mean_average_precision,
    micro_average_precision,
    precision_recall_curve,
    score_predictions,
)

Triples = list[tuple[str, str, float]]
GroundTruth = dict[str, list[str]]


def example(seed: int, queries: int = 30, k: int = 4) -> tuple[Triples, GroundTruth]:
    """Few scores, so that there are ties; distractors, queries with two references, misses, an unknown query."""
    rng = np.random.default_rng(seed)
    truth = {f"q{i}": [f"r{i}", f"s{i}"][: rng.integers(0, 3)] for i in range(queries)}
    predictions = [
        (f"q{i}", f"{'rsxy'[j]}{i}", float(rng.integers(0, 12) / 4 + (j < 2)))
        for i in range(queries + 1)
        for j in range(k)
    ]
    return [p for p in predictions if rng.random() < 0.8], truth


def repeated(predictions: Triples, truth: GroundTruth, rule: Rule, count: int, seed: int) -> np.ndarray:
    """[count, 5] metrics of evaluations with drawn queries, each copy under a name of its own."""
    names = [*truth, *sorted({query for query, _, _ in predictions} - truth.keys())]
    generator = np.random.Generator(np.random.PCG64(seed))
    values = []
    for _ in range(count):
        drawn = [names[i] for i in generator.integers(0, len(names), len(names))]
        rows = [(f"{n}:{q}", r, s) for n, query in enumerate(drawn) for q, r, s in predictions if q == query]
        found = score_predictions(rows, {f"{n}:{q}": truth.get(q, []) for n, q in enumerate(drawn)}, rule=rule)
        values.append([found[key] for key in ("uap", "rp90", "map", "recall_at_1", "recall_at_10")])
    return np.array(values, np.float64)


@pytest.mark.parametrize("rule", ["step", "trapezoid"])
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_copies(rule: Rule, seed: int) -> None:
    """Equal to 1e-12: the harmonic sums round otherwise than the terms."""
    predictions, truth = example(seed)
    intervals = bootstrap_intervals(predictions, truth, repetitions=60, seed=seed, rule=rule)
    expected = np.percentile(repeated(predictions, truth, rule, 60, seed), [2.5, 97.5], axis=0)
    np.testing.assert_allclose(np.array(list(intervals.values())).T, expected, rtol=0, atol=1e-12)
    assert list(intervals) == ["uap", "rp90", "map", "recall_at_1", "recall_at_10"]


def test_the_same_seed_gives_the_same_interval_around_the_metric() -> None:
    predictions, truth = example(3, queries=200)
    columns = Predictions(*(np.array(column, object) for column in zip(*predictions, strict=True)))
    first = bootstrap_intervals(columns, truth)
    assert first == bootstrap_intervals(columns, truth)
    assert first != bootstrap_intervals(columns, truth, seed=1)
    metrics = score_predictions(columns, truth)
    for name, (low, high) in first.items():
        value = metrics[name]
        assert isinstance(value, float)
        assert low <= value <= high
        assert name == "rp90" or 0.02 < high - low < 0.4


def test_nothing_found_and_nothing_predicted() -> None:
    truth = {"q0": ["r0"], "q1": ["r0"]}
    zero = dict.fromkeys(("uap", "rp90", "map", "recall_at_1", "recall_at_10"), (0.0, 0.0))
    assert bootstrap_intervals([("q0", "r1", 0.5)], truth, repetitions=5) == zero
    assert bootstrap_intervals([], truth, repetitions=5) == zero
    with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
        bootstrap_intervals([], truth, repetitions=0)


def trapezoids(ranks: list[int], positives: int) -> float:
    """The sum of Copydays' script; ranks from 0."""
    total = 0.0
    for found, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else found / rank
        total += (before + (found + 1) / (rank + 1)) / positives / 2
    return total


def test_the_trapezoid_rule() -> None:
    scores = [0.9, 0.8, 0.7, 0.6, 0.5]
    predictions = [("q0", f"r{i}", score) for i, score in enumerate(scores)]
    truth = {"q0": ["r1", "r2", "r4", "r9"], "q1": ["r0"]}
    assert micro_average_precision(predictions, truth, rule="trapezoid") == pytest.approx(trapezoids([1, 2, 4], 5))
    assert mean_average_precision(predictions, truth, rule="trapezoid") == pytest.approx(trapezoids([1, 2, 4], 4) / 2)
    perfect = {"q0": ["r0", "r1"]}
    assert micro_average_precision(predictions, perfect, rule="trapezoid") == 1.0
    assert (
        score_predictions(predictions, truth, rule="trapezoid")["uap"] != score_predictions(predictions, truth)["uap"]
    )


def test_the_curve_has_the_area() -> None:
    predictions, truth = example(5)
    truth["q30"] = []
    recall, precision, score = precision_recall_curve(predictions, truth)
    area = float(np.sum(np.diff(recall, prepend=0) * precision))
    assert area == pytest.approx(micro_average_precision(predictions, truth))
    assert np.all(np.diff(score) <= 0)
