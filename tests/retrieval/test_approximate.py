"""Approximate search: exact scores, few misses, and a recall that says how many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from copynce.cli import main
from copynce.retrieval.approximate import ApproximateSearch
from copynce.retrieval.features import Features, write_features
from copynce.retrieval.search import normalised, search


def clustered(rows: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(30, 16))
    return normalised(centres[generator.integers(30, size=rows)] + 0.3 * generator.normal(size=(rows, 16)))


def test_scores_are_exact_and_recall_is_what_it_says() -> None:
    query, reference = clustered(40, 1), clustered(3000, 2)
    index = ApproximateSearch(reference, 8, lists=30, probes=6, proposals=200)
    scores, indices = index(query)
    _, order = search(query, reference, 8)
    for row in range(40):
        for score, at in zip(scores[row], indices[row], strict=True):
            assert abs(score - query[row].astype(float) @ reference[at]) < 1e-6
        assert (np.diff(scores[row]) <= 0).all()
    shared = np.mean([len(set(a).intersection(b)) / 8 for a, b in zip(indices, order, strict=True)])
    assert index.recall(query, sample=40) == pytest.approx(shared, abs=1e-9)
    assert shared > 0.8
    again = ApproximateSearch(reference, 8, lists=30, probes=30, proposals=3000)
    np.testing.assert_array_equal(again(query)[1], order)  # every list, every proposal
    assert again.recall(query) == 1
    assert again.bytes == 3000 * (again.code + 8)


def test_few_references_and_few_proposals() -> None:
    reference = clustered(50, 2)
    index = ApproximateSearch(reference, 60)
    assert index(reference)[1].shape == (50, 50)
    none = ApproximateSearch(clustered(400, 2), 30, lists=10, probes=1)(reference[:5])
    assert ((none[1] == -1) == np.isinf(none[0])).all()
    with pytest.raises(ValueError, match="k must be at least 1"):
        ApproximateSearch(reference, 0)


def test_the_command_says_its_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = Features([f"T{i}" for i in range(400)], clustered(400, 2))
    write_features(tmp_path / "f" / "x-0000.safetensors", features, {})
    arguments = ["knn", str(tmp_path / "f"), "device=cpu", "k=4", "--out"]
    assert main([*arguments, str(tmp_path / "a.npy"), "approximate=true"]) == 0
    assert "approximate search: " in (said := capsys.readouterr().err)
    assert float(said.split("search: ")[1].split()[0]) > 0.8
    assert main([*arguments, str(tmp_path / "e.npy")]) == 0
    approximate, exact = np.load(tmp_path / "a.npy"), np.load(tmp_path / "e.npy")
    assert (approximate != np.arange(400)[:, None]).all()
    assert np.mean([len(set(a).intersection(b)) / 4 for a, b in zip(approximate, exact, strict=True)]) > 0.8
