"""The box: a descriptor at 8 bits is centred as the exact one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from copynce.data.synthetic import make_pictures
from copynce.models import Descriptor, build_descriptor, load_descriptor, save_checkpoint
from dali_pipelines import LoaderOptions, PictureLoader
from scripts.make_box import recentre

SIZE = 32


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 12, seed=3, side_px=(40, 80))
    return sorted(folder.iterdir())


def small(head: str = "linear_bn") -> Descriptor:
    """Class tokens with a large common mean, as those of a trained model."""
    options = {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
    torch.manual_seed(0)
    model = build_descriptor(img_size=SIZE, dim=16, head=head, backbone_options=options)
    with torch.no_grad():
        model.encoder.blocks[-1].mlp.fc2.bias += 20 * torch.randn(24)
    return model.eval()


@torch.inference_mode()
def outputs(model: Descriptor, paths: list[Path]) -> torch.Tensor:
    """What the head's normalisation reads, less the mean that it subtracts, [N, dim]."""
    head = model.eval().heads["linear_head"]
    options = LoaderOptions(size=SIZE, batch_size=4, device="cpu")
    loader = PictureLoader(paths, options, on_broken=lambda path, reason: pytest.fail(reason))
    found = [head.fc1(model.class_token(images)) for _, images in loader]
    return torch.cat(found) - head.bn.running_mean


def test_a_rounded_descriptor_has_the_mean_of_the_exact_one(paths: list[Path], tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.heads["linear_head"].bn.running_mean += outputs(model, paths).mean(0)
    exact = outputs(model, paths)
    save_checkpoint(tmp_path / "d.safetensors", model, eight_bits=True)
    before = outputs(load_descriptor(tmp_path / "d.safetensors"), paths)
    recentre(model, load_descriptor(tmp_path / "d.safetensors"), paths)
    save_checkpoint(tmp_path / "d.safetensors", model, eight_bits=True)
    after = outputs(load_descriptor(tmp_path / "d.safetensors"), paths)
    spread = exact.norm(dim=1).mean()
    assert (before.mean(0) - exact.mean(0)).norm() > 0.1 * spread, "else there is nothing to mend"
    assert (after.mean(0) - exact.mean(0)).norm() < 1e-3 * spread


def test_a_class_token_as_it_is_has_no_head_to_centre(paths: list[Path]) -> None:
    model = small("cls")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recentre(model, model, paths)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
