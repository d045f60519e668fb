"""A model in the hand: files, pictures and arrays described."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import copynce
from copynce.errors import DataError
from copynce.models import build_descriptor, build_matcher, save_checkpoint

OPTIONS = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> copynce.Model:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, build_descriptor(img_size=32, dim=16, backbone_options={**OPTIONS, "depth": 1}))
    return copynce.load_model(path, device="cpu")


def test_a_file_a_picture_and_an_array_have_one_descriptor(model: copynce.Model, tmp_path: Path) -> None:
    dots = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    for name, channels in (("rgb", 3), ("rgba", 4)):
        Image.fromarray(dots[..., :channels]).save(tmp_path / f"{name}.png")
    pictures = [tmp_path / "rgb.png", str(tmp_path / "rgb.png"), Image.open(tmp_path / "rgb.png"), dots[..., :3].copy()]
    found = model.describe([*pictures, tmp_path / "rgba.png", Image.fromarray(dots), dots[..., 0]], precision="fp32")
    assert (found.shape, found.dtype) == ((7, 16), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found[1:4], found[[0, 0, 0]], atol=1e-5)
    np.testing.assert_allclose(found[5], found[4], atol=1e-5)  # alpha lies over white
    assert model.describe([]).shape == (0, 16)
    with torch.inference_mode():
        image = torch.from_numpy(np.array(Image.open(tmp_path / "rgb.png").resize((32, 32), 3))).permute(2, 0, 1)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        direct = model.module((image[None] / 255 - mean[:, None, None]) / std[:, None, None])[0][0]
    np.testing.assert_allclose(found[0], direct.numpy(), atol=1e-4)


def test_what_is_no_picture(model: copynce.Model, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"broken.jpg: no picture format"):
        model.describe([tmp_path / "broken.jpg"])
    told: list[tuple[str, str]] = []
    found = model.describe(
        [tmp_path / "broken.jpg", np.zeros((4, 4), np.uint8), Image.new("F", (2, 2))],
        on_broken=lambda name, reason: told.append((name, reason)),
    )
    assert np.isnan(found).all(axis=1).tolist() == [True, False, True]
    assert [name for name, _ in told] == [str(tmp_path / "broken.jpg"), "picture 2"]
    for wrong, error, message in (
        ("a.jpg", TypeError, "must be a list"),
        ([np.zeros((4, 4))], TypeError, "picture 0 must be uint8, got float64"),
        ([np.zeros((4, 4, 2), np.uint8)], ValueError, r"\[H, W, 3\] or \[H, W\], got \[4, 4, 2\]"),
        ([3], TypeError, "picture 0 must be a path"),
    ):
        with pytest.raises(error, match=message):
            model.describe(wrong)


def test_a_matcher_describes_nothing(tmp_path: Path) -> None:
    matcher = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=1, backbone_options=OPTIONS)
    save_checkpoint(tmp_path / "matcher.safetensors", matcher)
    with pytest.raises(DataError, match="holds a matcher, expected a descriptor"):
        copynce.load_model(tmp_path / "matcher.safetensors")
