"""Metrics and search at the scale of DISC21: 25,000 queries with ten predictions each, 4,991 of them copies.

Scores are made up. The plain twin of each operation, a Python loop or NumPy, is timed beside it and must agree first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from copynce.evaluation import (
    mean_average_precision,
    micro_average_precision,
    read_predictions,
    recall_at_precision,
    score_predictions,
    write_predictions,
)
from copynce.retrieval.search import search

Triples = list[tuple[str, str, float]]
GroundTruth = dict[str, list[str]]


@pytest.fixture(scope="module")
def disc21_scale() -> tuple[Triples, GroundTruth]:
    """(predictions, ground truth): copies score higher than distractors, six decimals as the challenge's writer."""
    generator = np.random.default_rng(0)
    truth: GroundTruth = {
        f"Q{q:05d}": [f"R{generator.integers(1_000_000):06d}"] if q < 4_991 else [] for q in range(25_000)
    }
    predictions: Triples = []
    for query, found in truth.items():
        scores = np.round(np.sort(generator.normal(0.4, 0.1, 10))[::-1], 6)
        references = [f"R{r:06d}" for r in generator.integers(1_000_000, size=10)]
        if found and generator.random() < 0.8:
            references[0], scores[0] = found[0], round(float(generator.normal(0.7, 0.15)), 6)
        predictions += zip([query] * 10, references, scores.tolist(), strict=True)
    return predictions, truth


def plain_micro_average_precision(predictions: Triples, truth: GroundTruth) -> float:
    highest: dict[tuple[str, str], float] = {}
    for query, reference, score in predictions:
        highest[query, reference] = max(score, highest.get((query, reference), -np.inf))
    ranked = sorted((-score, reference in truth[query]) for (query, reference), score in highest.items())
    positives, found, total = sum(map(len, truth.values())), 0, 0.0
    for position, (_, true) in enumerate(ranked, start=1):
        if true:
            found += 1
            total += found / position / positives
    return total


@pytest.mark.parametrize("provider", ["reference", "vectorised"])
def test_micro_average_precision(
    benchmark: BenchmarkFixture, disc21_scale: tuple[Triples, GroundTruth], provider: str
) -> None:
    expected = plain_micro_average_precision(*disc21_scale)
    assert micro_average_precision(*disc21_scale) == pytest.approx(expected, rel=1e-9)
    benchmark(plain_micro_average_precision if provider == "reference" else micro_average_precision, *disc21_scale)


@pytest.mark.parametrize("metric", ["one call", "uap rp90 map"])
def test_loaded_predictions(
    benchmark: BenchmarkFixture, disc21_scale: tuple[Triples, GroundTruth], tmp_path: Path, metric: str
) -> None:
    """All metrics in one call, or uAP, RP90 and mAP one after the other, of predictions that were read from a file."""
    write_predictions(tmp_path / "predictions.csv", disc21_scale[0])
    loaded, truth = read_predictions(tmp_path / "predictions.csv"), disc21_scale[1]

    def three() -> dict[str, float | int | str | None]:
        return {
            "uap": micro_average_precision(loaded, truth),
            "rp90": recall_at_precision(loaded, truth)[0],
            "map": mean_average_precision(loaded, truth),
        }

    whole = score_predictions(loaded, truth)
    assert three().items() <= whole.items()
    assert benchmark(three if metric == "uap rp90 map" else lambda: score_predictions(loaded, truth))["uap"]


def test_score_predictions(benchmark: BenchmarkFixture, disc21_scale: tuple[Triples, GroundTruth]) -> None:
    metrics = benchmark(score_predictions, *disc21_scale)
    assert (metrics["queries"], metrics["positives"]) == (25_000, 4_991)


def test_predictions_file(
    benchmark: BenchmarkFixture, disc21_scale: tuple[Triples, GroundTruth], tmp_path: Path
) -> None:
    def round_trip() -> int:
        write_predictions(tmp_path / "predictions.csv", disc21_scale[0])
        return len(read_predictions(tmp_path / "predictions.csv").scores)

    assert benchmark(round_trip) == 250_000


@pytest.mark.parametrize("provider", ["reference", "vectorised"])
@pytest.mark.parametrize(("queries", "references", "columns"), [(500, 1_500, 512), (1_000, 20_000, 256)])
def test_search(benchmark: BenchmarkFixture, provider: str, queries: int, references: int, columns: int) -> None:
    generator = np.random.default_rng(0)
    query, reference = (
        features / np.linalg.norm(features, axis=1, keepdims=True)
        for features in (generator.normal(size=(n, columns)).astype(np.float32) for n in (queries, references))
    )

    def plain_search() -> np.ndarray:
        cosines = query @ reference.T
        best = np.argpartition(-cosines, 10, axis=1)[:, :10]
        order = np.argsort(-np.take_along_axis(cosines, best, axis=1), axis=1)
        return np.take_along_axis(best, order, axis=1)

    def exact_search() -> np.ndarray:
        return search(query, reference, k=10)[1]

    # float32 sums in another order may swap neighbours that differ in the last digit
    assert np.mean(plain_search() == exact_search()) > 0.999
    benchmark(plain_search if provider == "reference" else exact_search)
