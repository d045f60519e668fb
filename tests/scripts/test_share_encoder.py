"""A matcher with the encoder of a descriptor that was trained on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from copynce.errors import ConfigError
from copynce.model import load_model
from copynce.models import build_descriptor, build_matcher, load_matcher, save_checkpoint
from copynce.models.box import DESCRIPTOR, MATCHER
from scripts import share_encoder

OPTIONS = {"patch_size": 8, "embed_dim": 12, "num_heads": 2}


def test_the_encoder_is_the_descriptors_and_all_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    descriptor = build_descriptor(img_size=32, dim=16, backbone_options={**OPTIONS, "depth": 3})
    matcher = build_matcher(img_size=32, encoder_blocks=2, fusion_blocks=1, backbone_options=OPTIONS)
    box = tmp_path / "box"
    save_checkpoint(box / DESCRIPTOR, descriptor)
    save_checkpoint(tmp_path / "m.safetensors", matcher, {"step": 7})
    arguments = [tmp_path / "m.safetensors", box / DESCRIPTOR, "--out", box / MATCHER]
    monkeypatch.setattr(sys, "argv", ["share_encoder", *map(str, arguments)])
    share_encoder.main()
    made = load_matcher(box / MATCHER).state_dict()
    shared = descriptor.state_dict()
    for name, tensor in matcher.state_dict().items():
        expected = shared[name] if name.startswith("encoder.") else tensor
        assert torch.equal(made[name], expected), name
    assert not torch.equal(made["encoder.blocks.0.attn.qkv.weight"], matcher.encoder.blocks[0].attn.qkv.weight)
    assert load_model(box, device="cpu").one_pass


def test_the_size_is_the_descriptors() -> None:
    """Blocks that stayed as they are, and its position embedding: no other weight depends on the size."""
    torch.manual_seed(0)
    matcher = build_matcher(img_size=32, encoder_blocks=2, fusion_blocks=1, backbone_options=OPTIONS).eval()
    descriptor = build_descriptor(img_size=48, dim=16, backbone_options={**OPTIONS, "depth": 3})
    made = share_encoder.sharing(matcher, descriptor)
    assert (matcher.img_size, made.img_size, made.grid) == (32, 48, 6)
    assert torch.equal(made.encoder.pos_embed, descriptor.encoder.pos_embed)
    with torch.inference_mode():
        assert made(torch.randn(2, 3, 48, 48), torch.randn(2, 3, 48, 48)).isfinite().all()


def test_other_blocks_are_refused() -> None:
    matcher = build_matcher(img_size=32, encoder_blocks=2, fusion_blocks=1, backbone_options=OPTIONS)
    descriptor = build_descriptor(img_size=32, dim=16, backbone_options={**OPTIONS, "embed_dim": 16, "depth": 3})
    with pytest.raises(ConfigError, match=r"does not fit into the descriptor's: cls_token and 27 more differ"):
        share_encoder.sharing(matcher, descriptor)
