"""Candidates from local crops: against all similarities at once, in both modes; blocks kept; what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import copynce.retrieval.candidates as candidates_module
from copynce.errors import DataError
from copynce.retrieval.candidates import CandidateScores, find_candidates, query_views
from copynce.retrieval.crops import candidate_query, one_of_two
from copynce.retrieval.features import Features

QUERIES, REFERENCES, WIDTH = 5, 150, 16
GROUPS = {"one": (0, 1, 100), "two": (1, 11, 10), "four": (11, 20, 10), "nine": (20, 45, 4)}

Entries = list[tuple[str, str, float]]


def features(letter: str, pictures: int, views: int, seed: int) -> Features:
    rows = np.random.default_rng(seed).standard_normal((pictures * views, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Features([f"{letter}{i}" for i in range(pictures)], rows, "fp32", views)


@pytest.fixture(scope="module")
def query() -> Features:
    return features("Q", QUERIES, 45, 0)


@pytest.fixture(scope="module")
def reference() -> Features:
    return features("R", REFERENCES, 9, 1)


def plain(query: Features, reference: Features, mode: str) -> Entries:
    """The lists of all groups, one after the other, as the protocol says it."""
    q = np.asarray(query.values, np.float64).reshape(QUERIES, 45, WIDTH)
    r = np.asarray(reference.values, np.float64).reshape(REFERENCES, 9, WIDTH)
    similar = np.einsum("qvd,rwd->qvrw", q, r).max(axis=3)
    found: Entries = []
    for i in range(QUERIES):
        for begin, end, rank in GROUPS.values():
            members = [slice(begin, end)] if mode == "M:N" else [slice(v, v + 1) for v in range(begin, end)]
            for views in members:
                scores = similar[i, views].max(axis=0)
                for at in np.argsort(-scores, kind="stable")[:rank]:
                    found.append((f"Q{i}", f"R{at}", float(scores[at])))
    return found


def merged(entries: Entries, k: int) -> Entries:
    best: dict[tuple[str, str], float] = {}
    for q, r, score in entries:
        best[q, r] = max(score, best.get((q, r), -2.0))
    found: Entries = []
    for i in range(QUERIES):
        mine = [(q, r, score) for (q, r), score in best.items() if q == f"Q{i}"]
        found += sorted(mine, key=lambda entry: (-entry[2], int(entry[1][1:])))[:k]
    return found


def same(found: CandidateScores, expected: Entries) -> None:
    assert len(found.scores) == len(expected)
    assert found.scores.dtype == np.float32
    assert list(zip(found.queries, found.references, strict=True)) == [(q, r) for q, r, _ in expected]
    np.testing.assert_allclose(found.scores, [score for _, _, score in expected], atol=1e-6)


@pytest.mark.numeric
@pytest.mark.parametrize(("mode", "entries"), [("M:N", 124), ("1:N", 390)])
def test_candidates_equal_those_of_all_similarities(
    mode: str, entries: int, query: Features, reference: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(query, reference, mode)
    assert len(expected) == QUERIES * entries
    done: list[int] = []
    for products in (2**26, 3 * 45 * 9 * 7):  # at once, and 7 references at a time or 11
        monkeypatch.setattr(candidates_module, "_PRODUCTS", products)
        monkeypatch.setattr(candidates_module, "_BLOCK", {"cpu": 3})
        same(find_candidates(query, reference, mode=mode, merge=False, progress=done.append), expected)  # type: ignore[arg-type]
        for k in (30, 400):
            same(find_candidates(query, reference, mode=mode, k=k), merged(expected, k))  # type: ignore[arg-type]
    assert done == [3, 5, 3, 5]


def test_fewer_references_than_are_kept(query: Features) -> None:
    few = features("R", 3, 9, 2)
    found = find_candidates(query, few)
    assert len(found.scores) == QUERIES * 3
    assert len(find_candidates(query, few, merge=False).scores) == QUERIES * 3 * 4


def test_blocks_are_kept_until_something_changes(
    query: Features, reference: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates_module, "_BLOCK", {"cpu": 2})
    made: list[int] = []
    entries = candidates_module._entries

    def counting(query: Features, block: slice, *rest: object) -> object:
        made.append(block.start)
        return entries(query, block, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(candidates_module, "_entries", counting)

    def stop(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_candidates(query, reference, folder=tmp_path / "parts", progress=stop)
    assert made == [0, 2]
    found = find_candidates(query, reference, folder=tmp_path / "parts")
    assert made == [0, 2, 4]
    np.testing.assert_array_equal(found.scores, find_candidates(query, reference).scores)
    made.clear()
    find_candidates(query, reference, folder=tmp_path / "parts")
    assert made == []
    first, second = (tmp_path / "parts" / f"candidates-00000{i}.safetensors" for i in (0, 1))
    for damaged in (first.read_bytes()[:50], first.read_bytes()[:-8], b"", save({"score": np.zeros(4)})):
        second.write_bytes(damaged)
        again = find_candidates(query, reference, folder=tmp_path / "parts")
        np.testing.assert_array_equal(again.scores, found.scores)
        assert made == [2]  # damaged ones are made anew
        made.clear()
    find_candidates(query, reference, folder=tmp_path / "parts", k=7)
    assert made == [0, 2, 4]
    find_candidates(query, features("R", 20, 9, 3), folder=tmp_path / "parts", k=7)
    assert made == [0, 2, 4] * 2


def test_views_of_a_query() -> None:
    assert query_views().cuts(640, 480) == candidate_query(640, 480)
    meant = query_views(released=False).cuts(640, 480)
    assert meant[2].box == (160, 0, 480, 480)
    assert meant[1:11] == one_of_two(640, 480, released=False)
    assert [a == b for a, b in zip(meant, candidate_query(640, 480), strict=True)].count(False) == 1
    assert query_views().name != query_views(released=False).name
    assert (query_views().count, query_views(released=False).count) == (45, 45)


def test_features_that_do_not_fit(query: Features, reference: Features) -> None:
    with pytest.raises(DataError, match="reference features: 5 pictures of 45 views each, expected 9 views"):
        find_candidates(query, query)
    narrow = Features(reference.uuids, reference.values[:, :8], "fp32", 9)
    with pytest.raises(DataError, match="query features have 16 columns, reference features 8"):
        find_candidates(query, narrow)
    with pytest.raises(ValueError, match="mode must be 'M:N' or '1:N', got 'N:M'"):
        find_candidates(query, reference, mode="N:M")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        find_candidates(query, reference, k=0)
