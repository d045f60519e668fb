"""extract, knn and normalize as two processes of one group leave what one process leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from copynce.cli import main
from copynce.retrieval import extract, parts
from copynce.retrieval.features import read_features

WORKER = Path(__file__).parents[1] / "training" / "launch_worker.py"
#: The worker with smaller parts, so that there is something to share.
SMALL = """
import runpy, sys
from copynce.retrieval import extract, parts
extract._PART, parts._PART = 3, 2
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes(weights: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commands(folder: Path) -> list[list[str]]:
        features = str(folder / "f")
        return [
            ["extract", str(weights), str(place), "--out", features, "split=a", "device=cpu", "precision=fp32"],
            ["knn", features, "--out", str(folder / "k.npy"), "side=training", "k=3", "device=cpu"],
            ["normalize", features, "--out", str(folder / "n"), "device=cpu"],
        ]

    cases = json.dumps([[command, command] for command in commands(tmp_path / "two")])
    (tmp_path / "logs").mkdir()
    arguments = [sys.executable, "-c", SMALL, str(WORKER), str(tmp_path / "logs"), cases]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert [outcome["statuses"] for outcome in outcomes] == [[0, 0]] * 3, outcomes
    monkeypatch.setattr(extract, "_PART", 3)
    monkeypatch.setattr(parts, "_PART", 2)
    assert [main(command) for command in commands(tmp_path / "one")] == [0, 0, 0]
    for folder, sides in (("f", ("query", "reference", "training")), ("n", ("query", "reference"))):
        names = [sorted(path.name for path in (tmp_path / who / folder).iterdir()) for who in ("one", "two")]
        assert names[0] == names[1]
        for side in sides:
            one, two = (read_features(tmp_path / who / folder, side=side).features for who in ("one", "two"))
            assert list(one.uuids) == list(two.uuids)
            np.testing.assert_allclose(np.asarray(one.values), np.asarray(two.values), atol=1e-5)
    np.testing.assert_array_equal(np.load(tmp_path / "one" / "k.npy"), np.load(tmp_path / "two" / "k.npy"))
    skipped = [(tmp_path / who / "f" / "skipped.jsonl").read_text() for who in ("one", "two")]
    assert skipped[0] == skipped[1] != ""
