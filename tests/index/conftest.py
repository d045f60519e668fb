"""A tiny model and tiny pictures of the index's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.models import build_descriptor, save_checkpoint

#: Of every index in these tests: one thread, fp32 on any machine.
SETTINGS = {"batch_size": 4, "block": 4, "threads": 1, "precision": "fp32", "device": "cpu"}


def noise(seed: int) -> Image.Image:
    dots = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(dots).resize((48, 40), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    options = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    save_checkpoint(path, build_descriptor(img_size=32, dim=16, backbone_options=options))
    return path


@pytest.fixture
def settings() -> dict[str, object]:
    return dict(SETTINGS)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Six pictures."""
    folder = tmp_path / "archive"
    (folder / "more").mkdir(parents=True)
    for i in range(6):
        noise(i).save(folder / ("more" if i > 3 else "") / f"{i}.png")
    return folder
