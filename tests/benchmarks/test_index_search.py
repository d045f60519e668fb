"""Search in an index of many rows: a few; `python -m benchmarks.index_search` makes as many as one likes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.index_search import main, near
from copynce.index.table import PictureTable
from tests.index.writer import CARD, some


def test_rows_are_near_by_the_cosines_that_are_drawn() -> None:
    draw = np.random.default_rng(0)
    rows = np.eye(3, 16, dtype=np.float32)
    cosines = np.array([0.5, 0.9, 1.0])
    np.testing.assert_allclose((near(rows, cosines, draw) * rows).sum(1), cosines, atol=1e-6)


def test_an_index_is_made_and_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PictureTable.create(str(tmp_path / "real"), CARD, "float32").put(some(["a", "b"], seed=0))
    arguments = ["--count", "120", "--queries", "5", "--folder", str(tmp_path), "--descriptor", "float16"]
    assert main([str(tmp_path / "real"), *arguments, "--json", str(tmp_path / "found.json")]) == 0
    assert "120 rows of 16 float16 numbers" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["exact"]["warm_s"] > 0
    assert found["recall_at_10_noted"] is None  # too few rows for IVF-PQ
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "real"]
