from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from copynce.data.synthetic import make_pictures
from copynce.training import TrainConfig, load_config


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small made pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 24, seed=5, side_px=(64, 96))
    return folder


@pytest.fixture(scope="session")
def run_worker() -> Callable[..., str]:
    """Runs a script of this folder, which may start processes of its own; gives what it prints."""

    def run(name: str, *arguments: str) -> str:
        found = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(name)), *arguments],
            check=True,
            timeout=600,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )
        return found.stdout.decode()

    return run


@pytest.fixture
def tiny(make_tiny: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., TrainConfig]:
    """A config of a training that takes seconds, in this test's folder; see :func:`make_tiny`."""
    return partial(make_tiny, tmp_path)


@pytest.fixture(scope="session")
def make_tiny(pictures: Path) -> Callable[..., TrainConfig]:
    """A config of a training that takes seconds: two blocks, 32 px; arguments are its folder and further overrides."""
    shape = "patch_size: 8, embed_dim: 24, num_heads: 2"
    models = {
        "descriptor": ["model.dim=16", f"model.backbone_options={{{shape}, depth: 2}}"],
        "matcher": [
            "data.pairs=matcher",
            "data.policy=descriptor",
            f"model.backbone_options={{{shape}}}",
            "model.encoder_blocks=1",
            "model.fusion_blocks=1",
        ],
    }

    def make(folder: Path, *overrides: str, out: str = "run", train: Path | None = None) -> TrainConfig:
        objective = "matcher" if "objective=matcher" in overrides else "descriptor"
        listed = "queries" if "data.pairs=supervised" in overrides else "train"
        return load_config(
            TrainConfig,
            None,
            [
                f"out={folder / out}",
                f"data.{listed}={train or pictures}",
                "data.batch_size=4",
                "data.threads=1",
                "model.img_size=32",
                *models[objective],
                "optim.steps=6",
                "checkpoint_every=3",
                "log_every=1",
                "threads=1",
                "precision=fp32",  # the default takes bfloat16 where the processor has it
                "tensorboard=false",
                *overrides,
            ],
        )

    return make
