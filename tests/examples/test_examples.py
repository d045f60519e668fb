"""The examples, run on small inputs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from copynce.data.synthetic import make_pictures
from copynce.models import build_descriptor, save_checkpoint
from copynce.pixtrace import trace

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 4, seed=1, side_px=(64, 96))
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    options = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    save_checkpoint(path, build_descriptor(img_size=32, dim=8, backbone_options=options))
    return path


def test_a_warp_of_opencv_has_the_table_that_its_pixels_show(
    pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = example("pixtrace_own_pipeline").main
    out = tmp_path / "traced.png"
    # rounding decides where a source lies between two pixels: none or a few
    assert main([str(pictures[0]), "--angle", "33", "--scale", "0.7", "--out", str(out)]) > 0.9999
    assert "% of the pixels have the place" in capsys.readouterr().out
    assert Image.open(out).width > 224


@pytest.mark.parametrize("dsize", [(90, 70), (40, 120), (61, 47)], ids=str)
def test_other_sizes_and_a_perspective_and_the_half_pixel(dsize: tuple[int, int]) -> None:
    module = example("pixtrace_own_pipeline")
    shape = 47, 61
    places = np.arange(math.prod(shape)).reshape(shape)
    matrix = np.array([[1.7, 0.2, -5.3], [-0.1, 1.4, 3.1], [0.0007, -0.0004, 1.0]])
    warped = module.warp_nearest(places, matrix, dsize, outside=-1)
    assert warped.shape == dsize[::-1]
    assert np.mean(warped >= 0) > 0.3
    table = trace(module.warp_of_opencv(matrix, shape, dsize), shape, grid=shape)
    assert np.mean(table.index == warped) > 0.999
    # What the shift is for: the matrix as it stands is another table.
    half = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    unshifted = trace(module.warp_of_opencv(np.linalg.inv(half) @ matrix @ half, shape, dsize), shape, grid=shape)
    assert np.mean(unshifted.index == warped) < 0.9


def test_descriptors_of_a_list(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = example("embed_list").main
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for path in pictures:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "features"
    assert main([str(checkpoint), str(tmp_path), "--out", str(out)]) == 0
    values = np.load(tmp_path / "features.npy")
    assert json.loads((tmp_path / "features.ids.json").read_text()) == [path.stem for path in pictures]
    assert values.shape == (4, 8)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, rtol=1e-5)
    assert not list(tmp_path.glob("*.part*"))
    assert "left out" in capsys.readouterr().out
    assert main([str(tmp_path / "no.safetensors"), str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_affinity_of_one_patch(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, out = example("patch_affinity").main, tmp_path / "affinity.png"
    same = [str(checkpoint), str(pictures[0]), str(pictures[0])]
    # In the same picture a patch is most like itself.
    assert main([*same, "--row", "1", "--column", "2", "--temperature", "0.001", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("row 1, column 2 of the reference gets ")
    assert Image.open(out).height > 100
    assert main([*same, "--row", "4", "--column", "0"]) == 2
    assert "row and column must lie in 0 to 3, got 4 and 0" in capsys.readouterr().err


def test_a_loop_of_ones_own_in_two_processes(pictures: list[Path]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "copynce_ddp.py"), str(pictures[0].parent), "--epochs", "1", "--batch-size", "1"]
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    found = re.search(r"epoch 0: loss ([\d.]+), same weights in 2 processes: True", result.stdout)
    assert found is not None, result.stdout
    assert 0 < float(found[1]) < 20


@pytest.mark.parametrize("status", [0, 75, 137])
def test_a_job_is_queued_again_where_the_training_has_saved(status: int, tmp_path: Path) -> None:
    """Slurm's commands are played: one that tells its arguments."""
    told = tmp_path / "told"
    for name, end in (("srun", status), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{told}"\nexit {end}\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    command = ["bash", str(EXAMPLES / "train.sbatch"), "descriptor", "data.train=a b.csv"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    first, *others = told.read_text().splitlines()
    assert first.endswith(" copynce train descriptor data.train=a b.csv")
    assert others == (["scontrol requeue 4711"] if status == 75 else [])
