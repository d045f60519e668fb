"""Candidates: the best view of a query decides, and a file is none of its own."""

from __future__ import annotations

import numpy as np

from copynce.copies.searching import Near, best_views


def test_the_best_view_decides_and_a_file_is_none_of_its_own() -> None:
    files = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    # Two queries of two views each, the three nearest of each view.
    scores = np.array([[1.0, 0.8, 0.5], [0.9, 0.7, 0.2], [0.6, 0.5, 0.4], [0.9, 0.3, -np.inf]], np.float32)
    at = np.array([[0, 1, 2], [1, 3, 0], [3, 2, 1], [2, 0, -1]])
    biases = np.array([[0.0, 0.3], [0.1, 0.2]], np.float32)
    pairs, views = best_views(Near(scores, at, files), biases, ["./a.jpg", "q.jpg"], k=2)
    # a.jpg: itself left out; b by the whole (.8 - 0 against .9 - .3), c by the whole (.5), d by the part (.4).
    # q.jpg: c by the part (.7 against .4), d by the whole (.5).
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 2], [1, 3]]
    assert views.tolist() == [0, 0, 1, 0]


def test_nothing_near_gives_no_pair() -> None:
    near = Near(np.empty((2, 0), np.float32), np.empty((2, 0), np.int64), [])
    pairs, views = best_views(near, np.zeros((1, 2), np.float32), ["a.jpg"], k=5)
    assert pairs.shape == (0, 2)
    assert views.shape == (0,)
