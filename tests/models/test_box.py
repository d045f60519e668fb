"""A box: weights at 8 bits, a matcher with its descriptor's blocks, found by the names of a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from copynce.errors import DataError
from copynce.models import build_descriptor, build_matcher, load_checkpoint, save_checkpoint
from copynce.models.box import DEFAULT, DESCRIPTOR, MATCHER, in_box
from copynce.models.checkpoints import load_descriptor, load_matcher
from copynce.models.eight_bits import STEP, quantized, restored
from copynce.training import find_model

OPTIONS = {"embed_dim": 24, "num_heads": 2}


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A descriptor and a matcher with its first block, as the box in the package has them."""
    folder = tmp_path / "box"
    folder.mkdir()
    descriptor = build_descriptor(img_size=32, dim=8, backbone_options={**OPTIONS, "depth": 3})
    save_checkpoint(folder / DESCRIPTOR, descriptor, eight_bits=True)
    kept = load_descriptor(folder / DESCRIPTOR)
    matcher = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=2, backbone_options=OPTIONS, norm_eps=1e-4)
    mine = matcher.state_dict()
    mine.update({name: tensor for name, tensor in kept.state_dict().items() if name in mine})
    matcher.load_state_dict(mine)
    save_checkpoint(folder / MATCHER, matcher, eight_bits=True, shares=folder / DESCRIPTOR)
    return folder


def test_a_row_loses_at_most_half_a_step() -> None:
    weights = {"a": torch.randn(5, 7) * torch.logspace(-6, 3, 5)[:, None], "b": torch.randn(4), "z": torch.zeros(2, 3)}
    kept = quantized(weights)
    assert kept["a"].dtype == torch.int8
    assert kept["b"] is weights["b"]
    back = restored(kept)
    assert back.keys() == weights.keys()
    assert ((back["a"] - weights["a"]).abs() <= 0.5001 * kept["a" + STEP][:, None]).all()
    assert torch.equal(back["z"], weights["z"])
    with pytest.raises(ValueError, match="a is no int8 matrix with a step for each of its rows"):
        restored({"a": kept["a"], "a" + STEP: kept["a" + STEP][:-1]})


def test_a_second_time_changes_nothing(box: Path, tmp_path: Path) -> None:
    first = load_checkpoint(box)
    save_checkpoint(tmp_path / "again.safetensors", first, eight_bits=True)
    for name, tensor in load_checkpoint(tmp_path / "again.safetensors").state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], rtol=1e-6, atol=0)


def test_a_matcher_has_its_encoder_from_the_descriptor(box: Path) -> None:
    assert find_model(box) == in_box(box) == box / DESCRIPTOR
    assert find_model(box, boxed=MATCHER) == box / MATCHER
    descriptor, matcher = load_descriptor(box), load_matcher(box / MATCHER)
    images = torch.randn(2, 3, 32, 32)
    block = descriptor.encoder.forward_intermediates(images, indices=[0], intermediates_only=True, output_fmt="NLC")[0]
    torch.testing.assert_close(matcher.encode(images)[:, 1:], block)
    both = os.path.getsize(box / DESCRIPTOR), os.path.getsize(box / MATCHER)
    assert both[1] < both[0], "two of three blocks"


def test_a_matcher_without_its_descriptor_says_so(box: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shares must be a file beside"):
        save_checkpoint(tmp_path / "other" / "m.safetensors", load_matcher(box / MATCHER), shares=box / DESCRIPTOR)
    other = build_descriptor(img_size=32, dim=8, backbone_options={**OPTIONS, "depth": 3})
    save_checkpoint(box / DESCRIPTOR, other)
    with pytest.raises(DataError, match=r"its encoder from descriptor\.safetensors, .* another file than it was"):
        load_matcher(box / MATCHER)
    (box / MATCHER).unlink()
    with pytest.raises(DataError, match=r"holds no matcher\.safetensors"):
        find_model(box, boxed=MATCHER)


def test_default_is_the_packages_unless_a_file_has_that_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("copynce.models.box.files", lambda package: tmp_path / "nothing")
    with pytest.raises(DataError, match="has no model of its own"):
        in_box(DEFAULT)
    Path(DEFAULT).write_bytes(b"x")
    assert in_box(DEFAULT) == Path(DEFAULT)
