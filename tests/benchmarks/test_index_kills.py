"""An index that is killed at random moments: a few times; `python -m benchmarks.index_kills` does it as often as one
likes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.index_kills import faults
from copynce.files import file_sha256


def test_a_killed_index_has_lost_and_doubled_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.index_kills", "--count", "2", "--pictures", "12", "--writers", "2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "kills.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kills.json").read_text())
    assert report["kills"] == sum(report["moments"].values()) == 2
    assert (report["lost"], report["double"], report["wrong"]) == (0, 0, [])


def test_the_comparison_sees_another_file_and_another_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 3)).save(path)
    row = {"path": str(path), "sha256": file_sha256(path), "size": path.stat().st_size}
    expected = {row["sha256"]: np.array([1.0, 0.0])}
    assert faults([row], np.array([[1.0, 0.0]]), expected) == []
    assert faults([row], np.array([[0.0, 1.0]]), expected) == [f"{path} has another descriptor"]
    assert faults([{**row, "size": 1}], np.array([[1.0, 0.0]]), expected) == [f"{path} is another file"]
