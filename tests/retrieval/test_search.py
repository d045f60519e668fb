"""Exact search and score normalisation against NumPy and the released numbers."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from copynce.evaluation.metrics import score_predictions
from copynce.evaluation.predictions import ranked_predictions
from copynce.retrieval import proposals as proposals_module
from copynce.retrieval import search as search_module
from copynce.retrieval.normalization import score_normalization
from copynce.retrieval.rows import FileRows, JoinedRows
from copynce.retrieval.search import normalised, search


def features(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("queries", "references", "columns", "k"), [(1, 1, 1, 1), (3, 63, 5, 10), (257, 1000, 48, 10), (5, 4, 8, 10)]
)
def test_agrees_with_numpy(queries: int, references: int, columns: int, k: int) -> None:
    query, reference = features(queries, columns, 1), features(references, columns, 2)
    scores, indices = search(query, reference, k)
    k = min(k, references)
    assert scores.shape == indices.shape == (queries, k)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    cosines = normalised(query).astype(np.float64) @ normalised(reference).astype(np.float64).T
    # float32 sums of at most 48 products of unit vectors: 1e-6
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, indices, axis=1), atol=1e-6)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_equal_scores_are_ordered_by_index() -> None:
    reference = np.eye(4, dtype=np.float32)[[0, 1, 1, 1, 2, 1, 0, 1]]
    _, indices = search(np.eye(4, dtype=np.float32)[1:2], reference, k=5)
    assert indices.tolist() == [[1, 2, 3, 5, 7]]
    _, indices = search(np.eye(4, dtype=np.float32)[1:2], reference, k=8)
    assert indices.tolist() == [[1, 2, 3, 5, 7, 0, 4, 6]]


def twin(query: np.ndarray, reference: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every cosine in float64, rounded to float32, all of them sorted: by score, then by index."""
    unit = [rows.astype(np.float64) for rows in (query, reference)]
    unit = [rows / np.sqrt(np.square(rows).sum(axis=1, keepdims=True)) for rows in unit]
    scores = np.stack([(unit[1] * row).sum(axis=1) for row in unit[0]]).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


TIES = {
    "many duplicates": features(20, 24)[np.random.default_rng(5).integers(0, 20, 400)],
    "all equal": np.repeat(features(1, 24), 400, axis=0),
    "equal but for their length": features(20, 24)[np.arange(400) % 20]
    * np.float32(2) ** (np.arange(400)[:, None] % 5),
    "nearly equal": features(1, 24) + features(400, 24, 6) * np.float32(1e-6),
    "none": features(400, 24),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("references", TIES)
@pytest.mark.parametrize("chunk", [1_000_000, 37])
def test_the_k_best_are_those_of_the_twin_for_every_k_and_chunk(
    dtype: type, references: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_CHUNK_BYTES", chunk * 4 * 24)
    monkeypatch.setattr(search_module, "_ROWS", chunk)
    query, reference = features(7, 24, 3).astype(dtype), TIES[references].astype(dtype)
    for k in (1, 10, 100, 399, 400, 500):
        scores, indices = search(query, reference, k)
        expected, order = twin(query, reference, k)
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("references", TIES)
@pytest.mark.parametrize("one_dnn", [True, False])
@pytest.mark.filterwarnings("ignore:TF32")
def test_products_in_bfloat16_lead_to_the_same_answer(
    dtype: type, references: str, one_dnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals_module, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(proposals_module, "_BLOCK", 37)
    monkeypatch.setattr(proposals_module._ByBfloat16, "fewest", 1)
    monkeypatch.setattr(search_module, "_CHUNK_BYTES", 150 * 4 * 24)
    asked: list[type] = []

    def spy(kind: Any) -> None:
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda *arguments: (asked.append(kind), call(*arguments))[1])

    for kind in (proposals_module._ByBfloat16, proposals_module._ByFloat32):
        spy(kind)
    query, reference = features(7, 24, 3).astype(dtype), TIES[references].astype(dtype)
    with torch.backends.mkldnn.flags(enabled=one_dnn):
        for k in (1, 10, 17):
            scores, indices = search(query, reference, k)
            expected, order = twin(query, reference, k)
            np.testing.assert_array_equal(indices, order)
            np.testing.assert_array_equal(scores, expected)
    assert asked.count(proposals_module._ByBfloat16) == 3
    assert (proposals_module._ByFloat32 in asked) == (references in ("all equal", "nearly equal"))


def test_products_in_bfloat16_lead_to_the_same_answer_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    query, reference = features(80, 64, 3), features(20_000, 64, 4)
    reference[:50] = query[7] + features(50, 64, 5) * np.float32(1e-3)
    monkeypatch.setattr(proposals_module, "multiplies_bfloat16", lambda: False)
    expected = search(query, reference, 30)
    monkeypatch.setattr(proposals_module, "multiplies_bfloat16", lambda: True)
    for found, wanted in zip(search(query, reference, 30), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_no_product_is_further_from_its_cosine_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    query, reference = normalised(features(70, 512, 3)), normalised(features(700, 512, 4))
    reference[:70] = query
    for bf16 in (False, True):
        monkeypatch.setattr(proposals_module, "multiplies_bfloat16", lambda value=bf16: value)
        (propose, *_) = proposals_module.proposers(lambda a, b: iter([(a, reference[a:b])]), reference.shape, 5, [])
        found = propose(query)
        assert (type(propose) is proposals_module._ByBfloat16) == bf16
        cosines = query.astype(np.float64) @ reference.T.astype(np.float64)
        within = found.error + found.relative * np.abs(found.scores)
        assert (np.abs(np.take_along_axis(cosines, found.at, axis=1) - found.scores) <= within).all()
        np.put_along_axis(cosines, found.at, -1, axis=1)
        assert (cosines.max(axis=1) <= (found.scores + within).min(axis=1)).all()


def test_the_bound_holds_where_all_rounding_goes_the_wrong_way() -> None:
    """The products of the two halves cancel, but in bfloat16 one half is longer and the other shorter."""
    up, down = (np.float32(2**-4 * (1 + 2**-8 + way * 2**-16)) for way in (1, -1))
    half = 127
    last = np.sqrt(1 - half * (float(up) ** 2 + float(down) ** 2))
    query = np.tile(np.array([up] * half + [down] * half + [last, 0], np.float32), (64, 1))
    reference = np.tile(np.array([up] * half + [-down] * half + [0, last], np.float32), (400, 1))
    found = proposals_module._ByBfloat16(lambda a, b: iter([(a, reference[a:b])]), reference.shape, 70)(query)
    wrong = np.abs(found.scores - query[0].astype(np.float64) @ reference[0].astype(np.float64))
    assert wrong.min() > 2**-7 - 2**-10
    assert (wrong <= found.error + found.relative * np.abs(found.scores)).all()


def test_rows_are_rounded_as_torch_rounds_them() -> None:
    rows = features(40, 33, 8) * np.float32(10) ** np.arange(-20, 20, dtype=np.float32)[:, None]
    rounded, moved = proposals_module._rounded(rows)
    assert torch.equal(rounded, torch.from_numpy(rows).bfloat16())
    apart = (torch.from_numpy(rows).double() - rounded.double()).norm(dim=1).max().item()
    assert moved == pytest.approx(apart, rel=1e-9)


def test_a_shorter_result_is_the_beginning_of_a_longer_one() -> None:
    query, reference = normalised(features(50, 16, 1)), normalised(np.tile(features(500, 16, 2), (4, 1)))
    scores, indices = search(query, reference, 100)
    for k in (1, 2, 3, 10, 99):
        np.testing.assert_array_equal(search(query, reference, k)[0], scores[:, :k])
        np.testing.assert_array_equal(search(query, reference, k)[1], indices[:, :k])


def test_a_query_is_answered_alike_alone_and_among_others() -> None:
    query, reference = features(300, 16, 1), features(5000, 16, 2)
    scores, indices = search(query, reference)
    alone = search(query[17:18], reference)
    np.testing.assert_array_equal(alone[0][0], scores[17])
    np.testing.assert_array_equal(alone[1][0], indices[17])


def test_unit_float32_references_are_searched_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """tracemalloc sees NumPy's memory: 64 MB of references, searched in less than half of that beside them."""
    monkeypatch.setattr(search_module, "_CHUNK_BYTES", 2**20)
    monkeypatch.setattr(search_module, "_ROWS", 256)
    reference = normalised(features(62_500, 256))
    peaks = {}
    for name, rows in (
        ("unit", reference),
        ("other lengths", reference * 3),
        ("float64", reference.astype(np.float64)),
    ):
        tracemalloc.start()
        search(reference[:8], rows)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(peaks.values()) < 32e6, peaks
    assert np.shares_memory(search_module._unit32(reference, 0, 1000, "reference"), reference)


def test_memory_mapped_references(tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", features(300, 8))
    mapped = np.load(tmp_path / "r.npy", mmap_mode="r")
    for got, expected in zip(
        search(features(3, 8, 1), mapped), search(features(3, 8, 1), features(300, 8)), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_inputs_are_left_alone() -> None:
    query, reference = features(3, 4), features(5, 4)
    before = query.copy(), reference.copy()
    search(query, reference)
    np.testing.assert_array_equal(query, before[0])
    np.testing.assert_array_equal(reference, before[1])


@pytest.mark.parametrize(
    ("query", "reference", "k", "error", "message"),
    [
        (features(2, 3), features(2, 3), 0, ValueError, "k must be at least 1"),
        (features(2, 3), features(2, 4), 1, ValueError, "agree in columns, got 3 and 4"),
        (features(2, 3)[0], features(2, 3), 1, ValueError, r"query must be \[N, D\]"),
        (features(2, 3), features(0, 3), 1, ValueError, r"reference must be \[N, D\].*got \[0, 3\]"),
        ([[1.0]], features(2, 1), 1, TypeError, "query must be a NumPy array of floats, got list"),
        (features(2, 3).astype(int), features(2, 3), 1, TypeError, "query must be a NumPy array of floats, got int64"),
        (features(2, 3), np.zeros((2, 3), np.float32), 1, ValueError, "2 of 2 rows are zero or not finite"),
        (features(2, 3), np.array([[1.0, 0, 0], [0, np.nan, 0]]), 1, ValueError, "first row 1"),
    ],
)
def test_bad_input(query: Any, reference: Any, k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search(query, reference, k)


def test_normalization_formula() -> None:
    query, auxiliary = features(4, 6, 1), features(30, 6, 2)
    scores = features(4, 3, 3)
    similarities = -np.sort(-(normalised(query) @ normalised(auxiliary).T), axis=1)
    expected = scores - 0.5 * similarities[:, 0:3].mean(axis=1, keepdims=True)
    got = score_normalization(scores, query, auxiliary, start=0, end=3, alpha=0.5)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_normalization_gives_the_released_scores(oracle: Path) -> None:
    with np.load(oracle / "features.npz") as file:
        query, reference, auxiliary = (file[name].astype(np.float32) for name in ("query", "reference", "auxiliary"))
        released_index, released_score = file["score_norm_default/ref_index"], file["score_norm_default/score"]
    scores, indices = search(query, reference, k=10)
    np.testing.assert_array_equal(indices, released_index)
    # both sides are float32 sums of 48 products
    np.testing.assert_allclose(score_normalization(scores, query, auxiliary), released_score, atol=1e-6)


def test_normalization_changes_no_order_inside_a_query() -> None:
    query, reference, auxiliary = features(40, 8, 1), features(60, 8, 2), features(50, 8, 3)
    scores, indices = search(query, reference, k=10)
    normal = score_normalization(scores, query, auxiliary)
    names = [f"q{i}" for i in range(40)], [f"r{i}" for i in range(60)]
    truth = {f"q{i}": [f"r{indices[i, i % 10]}"] for i in range(40)}
    before = score_predictions(ranked_predictions(*names, scores, indices), truth)
    after = score_predictions(ranked_predictions(*names, normal, indices), truth)
    assert after["map"] == before["map"]
    assert after["recall_at_1"] == before["recall_at_1"]
    assert after["uap"] != before["uap"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 3, "end": 3}, "0 <= start < end, got 3 and 3"),
        ({"start": -1, "end": 3}, "0 <= start < end"),
        ({"end": 31}, "at least end = 31 rows, got 30"),
    ],
)
def test_normalization_bad_ranks(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_normalization(features(4, 3), features(4, 6), features(30, 6), **arguments)


def test_normalization_bad_shape() -> None:
    with pytest.raises(ValueError, match=r"scores must be \[Nq, k\] with Nq = 4"):
        score_normalization(features(3, 3), features(4, 6), features(30, 6))


@pytest.mark.parametrize("gpus", [[0], [0, 1, 2], [4, 2]])
def test_each_gpu_holds_a_share_of_the_references(gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices on the CPU stand in for those on GPUs."""
    asked: list[int] = []

    def index(device: int, columns: int) -> faiss.Index:
        asked.append(device)
        return faiss.IndexFlatIP(columns)

    monkeypatch.setattr(proposals_module, "_index_on_gpu", index)
    monkeypatch.setattr(search_module, "_CHUNK_BYTES", 100 * 4 * 24)
    for reference in (TIES["many duplicates"], TIES["none"], TIES["none"][:2]):
        query = features(7, 24, 3)
        for k in (1, 30, 500):
            scores, indices = search(query, reference, k, gpus=gpus)
            expected, order = twin(query, reference, k)
            np.testing.assert_array_equal(indices, order)
            np.testing.assert_array_equal(scores, expected)
    assert set(asked) == set(gpus)


def test_rows_of_several_files_are_searched(tmp_path: Path) -> None:
    reference = features(300, 8)
    for name, part in (("a", reference[:90]), ("b", reference[90:])):
        part.tofile(tmp_path / name)
    rows = JoinedRows([FileRows(tmp_path / "a", 0, (90, 8)), FileRows(tmp_path / "b", 0, (210, 8))])
    done: list[int] = []
    for got, expected in zip(search(rows, rows, 5, progress=done.append), search(reference, reference, 5), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert done == [300]
