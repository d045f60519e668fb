"""What the benchmark of folders counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.folders import _best_of_each, judged, reliability


def split(truth: dict[str, list[str]]) -> Any:
    return SimpleNamespace(ground_truth=truth)


def test_copies_above_a_precision_by_hand() -> None:
    truth = {f"q{i}": [f"r{i}"] for i in range(40)}
    right = [(f"q{i}", f"r{i}", 1 - i / 100) for i in range(30)]
    wrong = [("q35", "r0", 0.955), ("q36", "r0", 0.0)]  # one of 21 at the 20th copy is 95.2 %, of 30: 96.8 %
    found = judged([*right, *wrong], split(truth))
    assert (found["copies_at_95"], found["copies"]) == (30, 40)
    # Equal scores stand or fall together: 19 copies and 2 others at one score are 90 %.
    tied = [*((f"q{i}", f"r{i}", 0.5) for i in range(19)), ("q30", "r0", 0.5), ("q31", "r0", 0.5)]
    assert judged(tied, split(truth))["copies_at_95"] == 0


def test_the_best_pair_of_each_query() -> None:
    p = np.array([0.1, 0.9, 0.3, 0.2])
    assert _best_of_each(["a", "a", "b", "b"], p).tolist() == [1, 2]


@pytest.mark.parametrize("count", [1, 50])
def test_the_reliability_is_a_picture(count: int) -> None:
    p = np.linspace(0, 1, count)
    assert reliability(p, p > 0.5).width > 300
