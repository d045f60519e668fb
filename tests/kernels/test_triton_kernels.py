"""The Triton kernels: their cases in the interpreter and on a GPU, and what they compile to for sm_80 and sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_cases.py")
ROOT = Path(__file__).resolve().parents[2]


def run_cases(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_cases_in_the_interpreter() -> None:
    run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # tiny arrays: threads only wait for each other


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cases_on_the_gpu() -> None:
    run_cases(TRITON_INTERPRET="0")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What ``benchmarks.kernels --aot`` reports of the training size."""
    report = tmp_path_factory.mktemp("aot") / "resources.json"
    command = [sys.executable, "-m", "benchmarks.kernels", "--aot", "--json", str(report)]
    command += ["--patches", "196", "--channels", "384", "--gamma", "3"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert report.exists(), result.stdout[-4000:] + result.stderr[-4000:]
    return json.loads(report.read_text())


def test_no_bar_is_missed(compiled: dict) -> None:
    assert compiled["missed"] == []
    names = {(row["kernel"], row["arch"]) for row in compiled["kernels"]}
    kernels = ("patch_overlap", "patch_overlap_matrix", "copynce_fwd", "copynce_finalise", "copynce_bwd")
    assert names == {(kernel, arch) for kernel in kernels for arch in (80, 90)}


def test_compiled_kernels_neither_spill_nor_miss_the_tensor_cores(compiled: dict) -> None:
    for row in compiled["kernels"]:
        assert row["stack"] == row["local"] == 0, row
        assert row["shared"] <= 110 * 1024, row
        if row["kernel"] in ("copynce_fwd", "copynce_bwd"):
            assert row["wgmma" if row["arch"] == 90 else "mma"] > 0, row
            assert row["cp_async"] > 0, row


def test_launches_and_bytes_of_a_step(compiled: dict) -> None:
    assert compiled["triton_launches"] <= 5
    assert len(compiled["aten_operators"]) <= 4, compiled["aten_operators"]
    assert compiled["bytes"]["forward"] <= 91e6
    assert compiled["bytes"]["backward"] <= 149e6
    assert compiled["bytes"]["prior"] <= 170e6
    assert compiled["bytes"]["prior of a matrix"] <= 131e6
