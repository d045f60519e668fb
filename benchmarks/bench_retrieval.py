"""Score normalisation and nearest neighbours against the released algorithm: all similarities, all of them sorted.

Normalisation of 1,000 queries by 100,000 training pictures, with the ten best of 100,000 references; 129 neighbours of
2,000 pictures among 100,000; 512 columns. The full sort needs the whole matrix and its order in memory, which is why it
is run once. ``extra_info`` holds the most memory that NumPy and torch had beside the features.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from copynce.retrieval.normalization import score_normalization
from copynce.retrieval.search import normalised, search

Rows = np.ndarray


@pytest.fixture(scope="module")
def features() -> dict[str, Rows]:
    generator = np.random.default_rng(0)
    counts = {"query": 2_000, "reference": 100_000, "training": 100_000}
    return {name: normalised(generator.standard_normal((count, 512), np.float32)) for name, count in counts.items()}


def full_sort(query: Rows, reference: Rows, k: int) -> tuple[Rows, Rows]:
    """The k best of all similarities, sorted."""
    cosines, order = torch.sort(torch.from_numpy(query) @ torch.from_numpy(reference).T, dim=1, descending=True)
    return cosines[:, :k].numpy(), order[:, :k].numpy()


def memory_mb(function: Callable[[], object], matrix: int = 0) -> float:
    """The most memory of NumPy's arrays, or of the matrix that torch sorts: values and order, and its sorted copy."""
    tracemalloc.start()
    function()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return round((most + matrix * (4 + 4 + 8)) / 2**20, 1)


@pytest.mark.parametrize("provider", ["full sort", "copynce"])
def test_score_normalization(benchmark: BenchmarkFixture, features: dict[str, Rows], provider: str) -> None:
    query, reference, training = features["query"][:1_000], features["reference"], features["training"]

    def released() -> Rows:
        scores, _ = full_sort(query, reference, 10)
        return scores - full_sort(query, training, 5)[0][:, 1:].mean(axis=1, keepdims=True)

    def ours() -> Rows:
        return score_normalization(search(query, reference, 10)[0], query, training)

    if provider == "copynce":
        found = benchmark.pedantic(ours, rounds=3)
        bias = full_sort(query[:20], training, 5)[0][:, 1:].mean(axis=1, keepdims=True)
        # both are float32 sums of 512 products
        np.testing.assert_allclose(found[:20], full_sort(query[:20], reference, 10)[0] - bias, atol=2e-6)
        benchmark.extra_info["memory_mb"] = memory_mb(ours)
    else:
        benchmark.pedantic(released, rounds=1)
        benchmark.extra_info["memory_mb"] = memory_mb(lambda: None, len(query) * len(reference))


@pytest.mark.parametrize("provider", ["full sort", "copynce"])
def test_neighbours(benchmark: BenchmarkFixture, features: dict[str, Rows], provider: str) -> None:
    query, reference = features["query"], features["reference"]
    if provider == "copynce":
        scores, _ = benchmark.pedantic(lambda: search(query, reference, 129), rounds=3)
        np.testing.assert_allclose(scores[:20], full_sort(query[:20], reference, 129)[0], atol=2e-6)
        benchmark.extra_info["memory_mb"] = memory_mb(lambda: search(query, reference, 129))
    else:
        benchmark.pedantic(lambda: full_sort(query, reference, 129), rounds=1)
        benchmark.extra_info["memory_mb"] = memory_mb(lambda: None, len(query) * len(reference))
