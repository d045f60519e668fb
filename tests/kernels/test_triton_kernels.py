"""The Triton kernels: their cases in the interpreter and on a GPU, and what they compile to for sm_80 and sm_90."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
study = pytest.importorskip("benchmarks.kernels")

#: A file an operator. Each runs in a process of its own: the variable must be set before a kernel is imported.
CASES = sorted((Path(__file__).parent / "triton").glob("cases_*.py"))
ROOT = Path(__file__).resolve().parents[2]


def run_cases(cases: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", str(cases)]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.numeric
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_cases_in_the_interpreter(cases: Path) -> None:
    run_cases(cases, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # tiny arrays: threads only wait for each other


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_cases_on_the_gpu(cases: Path) -> None:
    run_cases(cases, TRITON_INTERPRET="0")


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
    kernels = ("patch_overlap", "copynce_fwd", "copynce_finalise", "copynce_bwd")
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


@triton.jit
def _running_on(b_product, i_channel):
    return b_product


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="compiles")
def test_the_guard_names_a_forward_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copynce.kernels.copynce.forward.finished", _running_on)
    shape = study.Shape()
    launch = next(one for one in study.record_step(shape) if one.stage == "forward")
    fresh = triton.jit(launch.kernel.fn)  # a kernel remembers what it called when it was first compiled
    resources = study.resources_of(dataclasses.replace(launch, kernel=fresh), 90, shape)
    assert study.faults_of(resources) == ["1 products may still run when the buffer they read is filled again"]


def loop_of_two_chunks(buffers: int, ahead: int, pendings: int) -> str:
    """TTGIR of a loop with a product of each of two tiles, the first with a buffer more than ``buffers``."""
    program = []
    for chunk, number in enumerate((buffers + 1, buffers)):
        program += [f"  %tile_{chunk} = ttg.local_alloc : () -> !ttg.memdesc<{number}x32x64xbf16, #shared, mutable>"]
        for turn in range(ahead):
            program += [f"  %into = ttg.memdesc_index %tile_{chunk}[%c{turn}] : x -> y"]
            program += ["  %token = ttg.async_copy_global_to_local %from, %into mask %m : z"]
    program += ["  %sum:2 = scf.for %channel = %c0 to %c384 step %c64 iter_args(%old = %zero) -> (i32) {"]
    for chunk in (0, 1):
        program += [f"    %of_{chunk} = ttg.memdesc_index %tile_{chunk}[%now] : x -> y"]
        program += [f"    %view = ttg.memdesc_trans %of_{chunk} {{order = array<i32: 1, 0>}} : y -> y"]
        program += ["    %new = ttng.warp_group_dot %left, %view, %old {isAsync = true} : t * y -> t"]
        program += [f"    %done:2 = ttng.warp_group_dot_wait %new, %view {{pendings = {pendings} : i32}} : t, y"]
    for chunk in (0, 1):
        program += [f"    %into = ttg.memdesc_index %tile_{chunk}[%next] : x -> y"]
        program += ["    %token = ttg.async_copy_global_to_local %from, %into mask %m : z"]
    return "\n".join([*program, "    scf.yield %new : t", "  } loc(#loc1)"])


@pytest.mark.parametrize(
    ("buffers", "ahead", "pendings", "overwritten"),
    [
        (1, 1, 0, 0),  # nothing runs on
        (1, 1, 1, 1),  # the second chunk's only buffer is filled while its product runs
        (2, 1, 1, 0),
        (2, 1, 2, 0),  # the products of one turn
        (2, 1, 3, 1),  # and one of the turn before
        (2, 2, 1, 1),  # two tiles ahead
        (3, 2, 2, 0),
    ],
)
def test_the_guard_plays_every_chunk(buffers: int, ahead: int, pendings: int, overwritten: int) -> None:
    assert study.overwritten_products(loop_of_two_chunks(buffers, ahead, pendings)) == overwritten
