"""timm's own weights by name, from the cache, and a sentence where there is no network."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from copynce.cli import main
from copynce.errors import ConfigError, DataError
from copynce.models import build_descriptor, load_descriptor, weights_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub at an address where nobody answers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def test_without_network_it_is_said_at_once() -> None:
    begun = time.monotonic()
    with pytest.raises(
        DataError, match=r"timm's weights of test_vit cannot be fetched from timm/test_vit\.r160_in1k; wh"
    ):
        build_descriptor("test_vit", img_size=160, weights="timm")
    assert time.monotonic() - begun < 5  # the hub's client alone would take half a minute


def test_names_that_are_none_are_told() -> None:
    with pytest.raises(ConfigError, match=r"no pretrained weights called vit_smal_patch16_224; near names: vit_small"):
        weights_file("timm:vit_smal_patch16_224", "resnet50")
    assert weights_file("timm.safetensors", "resnet50") == Path("timm.safetensors")


def test_what_is_in_the_cache_is_taken(cache: Path, tmp_path: Path) -> None:
    made = timm.create_model("test_vit")
    place = cache / "models--timm--test_vit.r160_in1k"
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    save_file(made.state_dict(), place / "snapshots" / "abc" / "model.safetensors")
    model = build_descriptor("test_vit", img_size=160, dim=8, weights="timm")
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, made.blocks[0].attn.qkv.weight)
    out = tmp_path / "start.safetensors"
    options = ["backbone=test_vit", "backbone_options.num_heads=2"]
    assert main(["convert", "timm", str(out), "--num-heads", "2", "--as", "descriptor", *options]) == 0
    assert torch.equal(load_descriptor(out).encoder.pos_embed, made.pos_embed)
