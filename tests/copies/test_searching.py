"""Candidates: the best view of a query decides, and a file is none of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from copynce.copies.calibration import FEATURES, Calibration
from copynce.copies.judging import biases_of
from copynce.copies.searching import Near, best_views, hopeful


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
    pairs, _ = best_views(Near(scores, at, files), biases, ["./a.jpg", "q.jpg"], k=2, floor=0.6)
    assert pairs.tolist() == [[0, 1], [1, 2]]


def test_nothing_near_gives_no_pair() -> None:
    near = Near(np.empty((2, 0), np.float32), np.empty((2, 0), np.int64), [])
    pairs, views = best_views(near, np.zeros((1, 2), np.float32), ["a.jpg"], k=5)
    assert pairs.shape == (0, 2)
    assert views.shape == (0,)


def test_a_pair_is_hopeless_if_it_is_so_from_both_sides() -> None:
    rng = np.random.default_rng(0)
    rows, background = (
        part / np.linalg.norm(part, axis=1, keepdims=True) for part in rng.random((2, 20, 4), np.float32)
    )
    model: Any = Boxed(background, Calibration((1.0,) * len(FEATURES), 0.0))
    pairs = np.argwhere(np.triu(np.ones((20, 20)), 1))
    assert hopeful(model, rows, pairs).all()
    biases = biases_of(model, rows)
    normalised = np.array([rows[i] @ rows[j] - min(biases[i], biases[j]) for i, j in pairs])
    floor = float(np.median(normalised)) + 1e-5
    model = replace(model, calibration=replace(model.calibration, floor=floor))
    assert hopeful(model, rows, pairs).tolist() == (normalised >= floor).tolist()
    assert hopeful(model, rows, pairs[:0]).shape == (0,)


@dataclass(frozen=True)
class Boxed:
    """What `hopeful` asks of a model."""

    background: np.ndarray | None
    calibration: Calibration | None
