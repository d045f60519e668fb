"""CopyNCE's registered operators inside of DistributedDataParallel, in two processes on gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, backend: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if backend == "triton":
        pytest.importorskip("triton")
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(Path(__file__).with_name("ddp_worker.py"))]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path), backend], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate()
        assert worker.returncode == 0, errors.decode()[-4000:]
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for whole, shared in results:
        for name, gradient in whole.items():
            assert gradient.abs().max() > 0.01, name  # or nothing would be compared
            torch.testing.assert_close(shared[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
