"""Trainings that are killed at random moments: a handful; `python -m benchmarks.kills` does as many as one likes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import kills

#: A process of its own, for it forks; all that is imported is imported once.
_BOTH = """
import sys
from benchmarks.kills import main
one = main(["--count", "2", "--steps", "3", "--json", sys.argv[1]])
two = main(["--count", "2", "--steps", "3", "--json", sys.argv[2], "--processes", "2", "--objective", "matcher"])
sys.exit(one or two)
"""


def test_killed_trainings_end_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    """A descriptor in one process, and a matcher in two."""
    reports = [tmp_path / "one.json", tmp_path / "two.json"]
    done = subprocess.run(
        [sys.executable, "-c", _BOTH, *map(str, reports)],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for path in reports:
        report = json.loads(path.read_text())
        assert report["kills"] == sum(report["moments"].values()) == 2
        assert report["differ"] == report["failed"] == []
        assert report["runs"] >= 1
    assert "values differ" in done.stdout


def test_the_comparison_sees_a_bit_and_what_is_missing() -> None:
    one = {"a": {"b": torch.tensor([1.0, 2.0]), "n": 3}, "c": [torch.tensor(1.0)]}
    other = {"a": {"b": torch.tensor([1.0, 2.0000002]), "n": 3}, "c": [torch.tensor(1.0)]}
    first, second = (dict(kills._flat("state", value)) for value in (one, other))
    assert first.keys() == {"state.a.b", "state.a.n", "state.c.0"}
    assert [name for name in first if not kills._same(first[name], second[name])] == ["state.a.b"]
    assert not kills._same(3, None)
    assert not kills._same(1, 1.0)
