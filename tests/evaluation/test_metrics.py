"""The metrics against the released numbers, closed forms, and the plain twins of `metric_twins`."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copynce.errors import DataError
from copynce.evaluation.metrics import (
    Predictions,
    mean_average_precision,
    micro_average_precision,
    recall_at_k,
    recall_at_precision,
    recall_at_rank,
    score_predictions,
)

Triples = list[tuple[str, str, float]]
GroundTruth = dict[str, list[str]]


# The plain twins: the definitions, written as loops.


def distinct(predictions: Triples) -> Triples:
    """Each pair once with its highest score, by decreasing score, equal scores in the order given."""
    kept: Triples = []
    for query, reference, score in sorted(predictions, key=lambda p: -p[2]):
        if all((query, reference) != (q, r) for q, r, _ in kept):
            kept.append((query, reference, score))
    return kept


def twin_curve(predictions: Triples, truth: GroundTruth) -> list[tuple[float, float, float]]:
    """(precision, recall, score) at every position; equal scores: false pairs first."""
    positives = sum(len(set(found)) for found in truth.values())
    ranked = sorted(distinct(predictions), key=lambda p: (-p[2], p[1] in truth.get(p[0], [])))
    curve, found = [], 0
    for position, (query, reference, score) in enumerate(ranked, start=1):
        found += reference in truth.get(query, [])
        curve.append((found / position, found / positives, score))
    return curve


def twin_uap(predictions: Triples, truth: GroundTruth) -> float:
    total, before = 0.0, 0.0
    for precision, recall, _ in twin_curve(predictions, truth):
        total += (recall - before) * precision
        before = recall
    return total


def twin_rp(predictions: Triples, truth: GroundTruth, required: float) -> tuple[float, float | None]:
    best: tuple[float, float | None] = (0.0, None)
    for precision, recall, score in twin_curve(predictions, truth):
        if precision >= required and (best[1] is None or recall > best[0]):
            best = (recall, score)
    return best


def own_list(predictions: Triples, query: str) -> list[str]:
    return [r for q, r, _ in distinct(predictions) if q == query]


def twin_map(predictions: Triples, truth: GroundTruth) -> float:
    values = []
    for query, references in truth.items():
        if references:
            found, total = 0, 0.0
            for rank, reference in enumerate(own_list(predictions, query), start=1):
                if reference in references:
                    found += 1
                    total += found / rank
            values.append(total / len(set(references)))
    return sum(values) / len(values)


def twin_recall_at_k(predictions: Triples, truth: GroundTruth, k: int) -> float:
    positive = {query: references for query, references in truth.items() if references}
    return sum(any(r in positive[q] for r in own_list(predictions, q)[:k]) for q in positive) / len(positive)


def twin_recall_at_rank(predictions: Triples, truth: GroundTruth, rank: int) -> float:
    kept = distinct(predictions)
    hits = sum(
        r in truth.get(q, []) and sum(q == other and s <= score for other, _, score in kept) <= rank for q, r, s in kept
    )
    return hits / sum(len(set(references)) for references in truth.values())


partly_unknown = pytest.mark.filterwarnings("ignore:.*(not in the ground truth|no predic)")


# Few names and few scores, so that ties, duplicates, absent queries and several references per query are common.
names = st.integers(0, 5).map(lambda i: f"q{i}")
references = st.integers(0, 5).map(lambda i: f"r{i}")
predictions_st = st.lists(st.tuples(names, references, st.integers(-4, 4).map(lambda s: s / 4)), max_size=40)
truth_st = st.dictionaries(names, st.lists(references, max_size=3), min_size=1).filter(
    lambda truth: any(truth.values())
)


@partly_unknown
@settings(max_examples=200, deadline=None)
@given(predictions=predictions_st, truth=truth_st, k=st.integers(1, 7), required=st.sampled_from([0.2, 0.5, 0.9, 1.0]))
def test_agrees_with_the_twins(predictions: Triples, truth: GroundTruth, k: int, required: float) -> None:
    close = pytest.approx  # sums of at most 40 terms in another order: far below its 1e-6
    assert micro_average_precision(predictions, truth) == close(twin_uap(predictions, truth))
    assert recall_at_precision(predictions, truth, required) == twin_rp(predictions, truth, required)
    assert mean_average_precision(predictions, truth) == close(twin_map(predictions, truth))
    assert recall_at_k(predictions, truth, k) == twin_recall_at_k(predictions, truth, k)
    assert recall_at_rank(predictions, truth, k) == twin_recall_at_rank(predictions, truth, k)


@partly_unknown
@settings(max_examples=100, deadline=None)
@given(predictions=predictions_st, truth=truth_st)
def test_increasing_maps_of_the_scores_change_nothing(predictions: Triples, truth: GroundTruth) -> None:
    mapped = [(q, r, math.exp(3 * s) - 100) for q, r, s in predictions]
    before = recall_at_precision(predictions, truth)
    after = recall_at_precision(mapped, truth)
    assert micro_average_precision(mapped, truth) == micro_average_precision(predictions, truth)
    assert mean_average_precision(mapped, truth) == mean_average_precision(predictions, truth)
    assert after[0] == before[0]
    assert after[1] == (None if before[1] is None else math.exp(3 * before[1]) - 100)


@partly_unknown
@settings(max_examples=100, deadline=None)
@given(predictions=predictions_st, truth=truth_st, seed=st.integers(0, 1000))
def test_the_flat_list_does_not_depend_on_the_order_given(predictions: Triples, truth: GroundTruth, seed: int) -> None:
    shuffled = [predictions[i] for i in np.random.default_rng(seed).permutation(len(predictions))]
    assert micro_average_precision(shuffled, truth) == micro_average_precision(predictions, truth)
    assert recall_at_precision(shuffled, truth) == recall_at_precision(predictions, truth)


@pytest.mark.parametrize("name", ["ties", "missing_queries", "never_p90"])
def test_released_numbers_to_the_last_digit(oracle: Path, name: str) -> None:
    case: dict[str, Any] = json.loads((oracle / "metrics.json").read_text())[name]
    expected, truth = case["expected"], case["gt"]
    predictions = [(query, reference, score) for query, found in case["results"] for reference, score in found]
    assert micro_average_precision(predictions, truth) == expected["uap"]
    assert recall_at_precision(predictions, truth) == (expected["rp90"] or 0.0, expected["rp90_threshold"])
    assert mean_average_precision(predictions, truth) == expected["map"]
    assert recall_at_rank(predictions, truth, 1) == expected["isc2021"]["recall_at_rank1"]
    assert recall_at_rank(predictions, truth, 10) == expected["isc2021"]["recall_at_rank10"]
    # The released recall@k leaves out queries that returned nothing; ours counts them as missed.
    returned = {query: truth[query] for query, _ in case["results"]}
    for k, key in [(1, "recall_at_1"), (2, "recall_at_2"), (5, "recall_at_5"), (10**6, "recall_at_None")]:
        assert recall_at_k(predictions, returned, k) == expected[key]


@partly_unknown
@pytest.mark.parametrize(("count", "true"), [(1, 1), (7, 1), (7, 3), (50, 50)])
def test_all_equal_scores_are_the_worst_case(count: int, true: int) -> None:
    truth = {f"q{i}": [f"r{i}"] for i in range(true)} | {"missed": ["r"]}
    predictions = [(f"q{i}", f"r{i}" if i < true else "wrong", 0.5) for i in range(count)]
    expected = sum(m / (count - true + m) for m in range(1, true + 1)) / (true + 1)
    assert micro_average_precision(predictions, truth) == pytest.approx(expected, rel=1e-12)


def test_rp90_counts_a_recovery_after_a_dip() -> None:
    # true, false, then 18 true: precision dips to 1/2 and is back at 0.9 at position 10, 0.95 at the end
    predictions = [(f"q{i}", "r" if i != 1 else "wrong", 1.0 - i / 100) for i in range(20)]
    truth = {f"q{i}": ["r"] for i in range(20)}
    assert recall_at_precision(predictions, truth) == (19 / 20, 1.0 - 19 / 100)


def test_rp90_meets_nine_of_ten_exactly() -> None:
    predictions = [("q0", "wrong", 1.0)] + [(f"q{i}", "r", 1.0 - i / 100) for i in range(1, 10)]
    truth = {f"q{i}": ["r"] for i in range(10)}
    assert recall_at_precision(predictions, truth) == (9 / 10, 1.0 - 9 / 100)


def test_rp90_never_reached() -> None:
    assert recall_at_precision([("q", "wrong", 1.0), ("q", "r", 0.5)], {"q": ["r"]}) == (0.0, None)


def test_duplicates_count_once_with_the_highest_score() -> None:
    truth = {"a": ["r"], "b": ["r"]}
    once = [("a", "r", 0.9), ("b", "x", 0.5), ("b", "r", 0.4)]
    repeated = [("a", "r", 0.1), *once, ("a", "r", 0.9), ("b", "x", 0.45)]
    assert score_predictions(repeated, truth) == score_predictions(once, truth)
    assert score_predictions(repeated, truth)["predictions"] == 3


def test_queries_that_returned_nothing_count() -> None:
    truth = {"a": ["r"], "b": ["r"]}
    metrics = score_predictions([("a", "r", 0.9)], truth)
    assert (metrics["uap"], metrics["map"], metrics["recall_at_1"], metrics["rp90"]) == (0.5, 0.5, 0.5, 0.5)


def test_no_predictions() -> None:
    metrics = score_predictions([], {"a": ["r"], "b": []})
    assert metrics == {
        "uap": 0.0,
        "rp90": 0.0,
        "rp90_threshold": None,
        "map": 0.0,
        "recall_at_1": 0.0,
        "recall_at_10": 0.0,
        "queries": 2,
        "positive_queries": 1,
        "positives": 1,
        "predictions": 0,
        "warning": "there are no predictions, so every copy counts as missed",
    }


def test_every_form_of_predictions_is_the_same() -> None:
    truth = {"1": ["2"], "3": ["4"], "5": []}
    rows: Triples = [("1", "2", 0.75), ("3", "9", 0.5), ("5", "2", 0.25)]  # three rows: not to be taken for columns
    queries, found, scores = (np.array(column) for column in zip(*rows, strict=True))
    expected = score_predictions(rows, truth)
    forms: dict[str, Any] = {
        "columns": (queries, found, scores),
        "named columns": Predictions(queries, found, scores),
        "list of columns": [queries, found, scores],
        "float32": (queries.astype(object), found, scores.astype(np.float32)),
        "lists": [list(row) for row in rows],
        "generator": (row for row in rows),
        "object array": np.array(rows, dtype=object),
        "text array": np.array(rows),
        "record array": np.array(rows, dtype=[("query", "U4"), ("reference", "U4"), ("score", float)]),
    }
    for name, form in forms.items():
        assert score_predictions(form, truth) == expected, name


def test_integer_ids() -> None:
    assert micro_average_precision(np.array([[1, 2, 0.5], [3, 4, 0.25]]), {1: [2], 3: [4]}) == 1.0


@pytest.mark.parametrize(
    ("predictions", "truth", "error", "message"),
    [
        ("q,r,1", {"q": ["r"]}, TypeError, "triples or three arrays"),
        (5, {"q": ["r"]}, TypeError, "got int"),
        ({"q": ["r"]}, {"q": ["r"]}, TypeError, "got dict"),
        (([["q"], ["r"], [1.0]]), {"q": ["r"]}, TypeError, r"predictions\[0\] must be .* columns must be NumPy arrays"),
        ([np.array(["q", "r", "0.5"])] * 3, {"q": ["r"]}, TypeError, "three arrays are taken for the columns"),
        ([(["q"], "r", 1.0)], {"q": ["r"]}, TypeError, "ids must be hashable"),
        ([("q", "r", 1.0)], {"q": [["r"]]}, TypeError, "holds an id that is none"),
        ([("q", "r")], {"q": ["r"]}, TypeError, r"predictions\[0\] must be a triple"),
        (["qrs"], {"q": ["r"]}, TypeError, r"predictions\[0\] must be a triple"),
        ([("q", "r", "high")], {"q": ["r"]}, TypeError, "scores must be numbers"),
        ([("q", "r", None)], {"q": ["r"]}, (TypeError, ValueError), "scores must be"),
        ([("q", "r", 1.0), ("q", "s", math.nan)], {"q": ["r"]}, ValueError, "got nan for query 'q', reference 's'"),
        ([("q", "r", math.inf)], {"q": ["r"]}, ValueError, "must be finite"),
        ((np.array(["q"]), np.array(["r", "s"]), np.array([1.0, 2.0])), {"q": ["r"]}, ValueError, "equally long"),
        ((np.array([["q"]]), np.array([["r"]]), np.array([[1.0]])), {"q": ["r"]}, ValueError, "one-dimensional"),
        ([("q", "r", 1.0)], [("q", "r")], TypeError, "ground_truth must be"),
        ([("q", "r", 1.0)], {"q": "r"}, TypeError, r"ground_truth\['q'\] must be a list"),
        ([("q", "r", 1.0)], {"q": None}, TypeError, r"ground_truth\['q'\] must be a list"),
        ([("q", "r", 1.0)], {"q": []}, ValueError, "has no pair"),
        ([("q", "r", 1.0)], {}, ValueError, "has no pair"),
    ],
)
def test_bad_input(predictions: Any, truth: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        micro_average_precision(predictions, truth)


TRUTH: dict[Any, list[Any]] = {"Q1": ["R1"], "Q2": ["R2"], "Q3": []}


@pytest.mark.parametrize(
    ("predictions", "truth", "message"),
    [
        ([(1, 10, 0.9)], {"1": ["10"]}, r"no predicted query .*; 1 \(int\) is '1' \(str\) there: write ids alike"),
        ([(1.0, 10.0, 0.9)], {"1": ["10"]}, r"1.0 \(float\) is '1' \(str\)"),
        ([(b"Q1", "R1", 0.9)], TRUTH, r"b'Q1' \(bytes\) is 'Q1' \(str\)"),
        (np.array([["q1", "r1", 0.9]], object), TRUTH, r"'q1' \(str\) is 'Q1'"),
        ([("7", "R1", 0.9)], {"007": ["R1"]}, "'7' .* is '007'"),
        ([(("Q", 1), "R1", 0.9)], TRUTH, "ids are of type tuple here and str there"),
        ([("Q1", 1, 0.9)], {"Q1": ["1"]}, r"no predicted reference .*; 1 \(int\) is '1' \(str\) there"),
        ([("Q1", b"R1", 0.9), ("Q2", b"R9", 0.8)], TRUTH, r"b'R1' \(bytes\) is 'R1' \(str\)"),
        ([("Q1", "R9.jpg", 0.9), ("Q2", "R2.jpg", 0.8)], TRUTH, "'R2.jpg' .* is 'R2'"),
        ([("Q1", "references/R1", 0.9)], TRUTH, "'references/R1' .* is 'R1'"),
        ([("Q1", "R1 ", 0.9)], TRUTH, "'R1 ' .* is 'R1'"),
        ([("Q1", ("R", 1), 0.9)], TRUTH, "ids are of type tuple here and str there"),
    ],
)
@pytest.mark.parametrize(
    "metric",
    [
        score_predictions,
        micro_average_precision,
        recall_at_precision,
        mean_average_precision,
        lambda *given: recall_at_k(*given, k=1),
        lambda *given: recall_at_rank(*given, rank=1),
    ],
)
def test_ids_that_cannot_meet_are_an_error_and_no_zero(metric: Any, predictions: Any, truth: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metric(predictions, truth)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([("Q77", "R1", 0.9)], "predicted: 'Q77'.*ground truth: 'Q1'.*give the ground truth of the same split"),
        ([("R1", "Q1", 0.9)], "no predicted query is in the ground truth .* are the columns swapped"),
    ],
)
def test_an_evaluation_needs_a_known_query(predictions: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_predictions(predictions, TRUTH)
    with pytest.warns(UserWarning, match=message):
        assert micro_average_precision(predictions, TRUTH) == 0.0  # one number follows its definition


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (
            [("Q1", "R1", 0.9), *((f"X{i}", "R1", 0.95) for i in range(9))],
            "9 of 10 predicted queries are not in the ground truth and count as copies of nothing, the first is 'X0'$",
        ),
        ([("Q1", "R1", 0.9), ("Q2.png", "R2", 0.5)], "the first is 'Q2.png'; 'Q2.png' .* is 'Q2'"),
        ([("Q1", "R9", 0.9)], "no predicted reference is in the ground truth .predicted: 'R9'.*'R1', ...\\)$"),
        ([("Q1", "R1", 0.9), ("Q2", 2, 0.5)], "predicted references are of type number too"),
        ([("Q1", "R1", 0.9), ("Q2", b"R2", 0.5)], "predicted references are of type bytes too"),
        ([], "there are no predictions"),
    ],
)
def test_ids_that_meet_in_part_are_judged_with_a_sentence(predictions: Any, message: str) -> None:
    metrics = score_predictions(predictions, TRUTH)
    with pytest.warns(UserWarning, match=message):
        assert micro_average_precision(predictions, TRUTH) == metrics["uap"]
    assert metrics["positives"] == 2
    with pytest.warns(UserWarning, match=message):
        warnings.warn(str(metrics["warning"]), stacklevel=1)


def test_where_all_ids_meet_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictions = [("Q1", "R1", 0.9), ("Q3", "another", 0.1)]
        assert mean_average_precision(predictions, TRUTH) == 0.5
        assert score_predictions(predictions, TRUTH)["warning"] is None


def test_pairs_whose_hashes_collide_are_told_apart() -> None:
    # hash(-1) == hash(-2), and 2**61 - 1 hashes like 0: all of one query
    rows = [("q", -1, 0.9), ("q", -2, 0.8), ("q", 0, 0.7), ("q", 2**61 - 1, 0.6), ("q", -2, 0.95)]
    truth = {"q": [-2, 0]}
    assert micro_average_precision(rows, truth) == pytest.approx(1 / 2 + 2 / 3 / 2)
    assert score_predictions(rows, truth)["predictions"] == 4


def test_predictions_keep_what_they_were_given() -> None:
    """What is computed once must not go stale: columns are copies, cannot be written to, and survive a pickle."""
    scores = np.array([0.5, 0.25])
    predictions = Predictions(np.array(["Q1", "Q2"], object), np.array(["R1", "R2"], object), scores)
    scores[:] = 0.0
    assert predictions.scores.tolist() == [0.5, 0.25]
    for column in predictions:
        with pytest.raises(ValueError, match="read-only"):
            column[0] = column[1]
    again = pickle.loads(pickle.dumps(predictions))
    assert score_predictions(again, TRUTH) == score_predictions(predictions, TRUTH)


@pytest.mark.parametrize("precision", [0.0, -0.1, 1.1, math.nan])
def test_bad_precision(precision: float) -> None:
    with pytest.raises(ValueError, match="precision must be in"):
        recall_at_precision([("q", "r", 1.0)], {"q": ["r"]}, precision)


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_k(k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="k must be"):
        recall_at_k([("q", "r", 1.0)], {"q": ["r"]}, k)
