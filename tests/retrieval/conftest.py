"""Small models and pictures of the retrieval tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.models import Descriptor, build_descriptor, save_checkpoint

OPTIONS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def numbered_descriptor(seed: int = 0) -> Descriptor:
    """A small descriptor whose weights come from NumPy's generator: the same numbers with every version of torch."""
    model = build_descriptor(img_size=32, dim=16, backbone_options=OPTIONS)
    generator = np.random.default_rng(seed)
    for name, value in sorted(model.state_dict().items()):
        if not value.is_floating_point():
            continue
        drawn = torch.from_numpy(generator.normal(size=tuple(value.shape)))
        if name.endswith("running_var"):
            drawn = 0.5 + drawn.abs()
        elif name.endswith(".weight") and value.ndim == 1:
            drawn = 1 + 0.1 * drawn
        else:
            drawn = 0.3 * drawn
        value.copy_(drawn)
    return model.eval()


def noise_picture(seed: int, width: int = 70, height: int = 50) -> Image.Image:
    """Smooth noise."""
    dots = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(dots).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def descriptor() -> Descriptor:
    """A small descriptor, in evaluation mode."""
    return numbered_descriptor()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a small descriptor."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_checkpoint(path, numbered_descriptor())
    return path


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set: 7 queries (one broken), 9 references, 12 training pictures; split `a`. Query i is reference i."""
    root = tmp_path_factory.mktemp("place")
    (root / "p").mkdir()
    for i in range(12):
        noise_picture(i).save(root / "p" / f"{i}.png")
    (root / "p" / "broken.png").write_text("no picture")
    for file, letter, count in (("query_a", "Q", 7), ("references", "R", 9), ("train", "T", 12)):
        names = [f"p/{i}.png" for i in range(count)]
        if letter == "Q":
            names[2] = "p/broken.png"
        (root / f"{file}.csv").write_text("\n".join(["uuid,path", *(f"{letter}{i},{n}" for i, n in enumerate(names))]))
    (root / "gt_a.csv").write_text("\n".join(f"Q{i},R{i}" for i in range(5)))
    return root
