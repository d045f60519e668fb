"""Queries asked in parts: the best view of each reference, against all similarities."""

from __future__ import annotations

import numpy as np
import pytest

from copynce.retrieval.query_views import QUERY_VIEWS, best_references, query_views
from copynce.retrieval.search import search


def test_views_are_the_same_number_of_every_picture() -> None:
    for size in ((1, 1), (100, 7), (640, 480)):
        assert len(query_views(*size)) == QUERY_VIEWS.count == 23


@pytest.mark.numeric
@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_best_references_are_those_of_all_similarities(k: int) -> None:
    rng = np.random.default_rng(k)
    queries, references = rng.standard_normal((6, 5, 16)), rng.standard_normal((30, 16))
    queries /= np.linalg.norm(queries, axis=2, keepdims=True)
    references /= np.linalg.norm(references, axis=1, keepdims=True)
    biases = rng.random((6, 5, 1))
    expected = (queries @ references.T - biases).max(1)
    scores, at = search(queries.reshape(30, 16), references, k)
    query, reference, view, score = best_references(scores.reshape(6, 5, k) - biases, at.reshape(6, 5, k), k)
    for row in range(6):
        best = np.argsort(-expected[row])[:k]
        assert reference[query == row].tolist() == best.tolist()
        np.testing.assert_allclose(score[query == row], expected[row, best], atol=1e-6)
        assert view[query == row].tolist() == (queries @ references.T - biases)[row, :, best].argmax(1).tolist()


def test_equal_scores_stand_in_the_order_of_references() -> None:
    scores, at = np.ones((1, 2, 3)), np.array([[[5, 3, 8], [3, 1, 5]]])
    _, reference, view, _ = best_references(scores, at, 3)
    assert (reference.tolist(), view.tolist()) == ([1, 3, 5], [1, 0, 0])
    assert best_references(scores[:, :, :0], at[:, :, :0], 3)[0].shape == (0,)
