"""Three epochs of the training pipeline hold no more memory and no more file handles than one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from copynce.data.synthetic import make_pictures


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_three_epochs_are_flat(tmp_path: Path) -> None:
    """64 pictures, two of them broken, in a process of its own; an epoch's batches are 25 MB, keeping half is seen."""
    for path in make_pictures(tmp_path / "pictures", 64, seed=2, side_px=(100, 300))[:2]:
        path.write_bytes(path.read_bytes()[:500])
    options = ["--size", "112", "--batch-size", "8", "--json", str(tmp_path / "leaks.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.leaks", str(tmp_path / "pictures"), *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "leaks.json").read_text())
    assert [(row["pairs"], row["broken"]) for row in rows][1:] == [(64, 2), (64, 2)]
