"""A descriptor on a ResNet (PROTOCOLS 9.6)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch.nn.functional import normalize

from copynce.errors import ConfigError, DataError
from copynce.models import (
    Descriptor,
    DescriptorConfig,
    build_descriptor,
    build_matcher,
    convert,
    load_checkpoint,
    load_descriptor,
    load_start,
    param_groups,
    save_checkpoint,
)
from copynce.models.backbone import tokens_of
from copynce.models.check import check_model

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


def tiny(**settings: object) -> Descriptor:
    options = {"backbone": "resnet50", "img_size": 64, "dim": 8, "backbone_options": SMALL, **settings}
    return build_descriptor(**options)


def test_shapes_and_names_of_the_paper() -> None:
    with torch.device("meta"):
        model = build_descriptor("resnet50", img_size=448)
        theirs = torchvision.models.resnet50().state_dict()
        pooled, tokens = tokens_of(model.encoder, torch.empty(2, 3, 448, 448), model.tokens_block)
    assert (model.patch_size, model.grid, model.channels, model.dim) == (32, 14, 2048, 512)
    assert (tuple(pooled.shape), tuple(tokens.shape)) == ((2, 2048), (2, 196, 2048))
    assert model.heads["linear_head"].fc1.weight.shape == (512, 2048)
    ours = {n.removeprefix("encoder."): v.shape for n, v in model.state_dict().items() if n[:8] == "encoder."}
    assert ours == {name: value.shape for name, value in theirs.items() if not name.startswith("fc.")}
    assert check_model(DescriptorConfig(backbone="resnet50", img_size=448)) == 196
    # No patch embedding, so nothing is frozen; BatchNorm does not decay.
    assert sum(len(group["params"]) for group in param_groups(model, 0.1)) == len(list(model.parameters()))


@pytest.mark.numeric
def test_it_computes_what_torchvisions_does(tmp_path: Path) -> None:
    block = torchvision.models.resnet.Bottleneck
    theirs = torchvision.models.ResNet(block, [1, 2, 1, 1]).train()
    with torch.no_grad():
        theirs(torch.randn(4, 3, 64, 64))  # running statistics that are not the first ones
    theirs.eval()
    torch.save({"state_dict": {f"module.{name}": value for name, value in theirs.state_dict().items()}}, tmp_path / "t")
    options = {"layers": [1, 2, 1, 1]}
    model = build_descriptor("resnet50", img_size=64, head="cls", tokens_block=3, backbone_options=options).eval()
    said = load_start(model, tmp_path / "t")
    assert "left aside: fc.bias, fc.weight" in said
    images = torch.randn(2, 3, 64, 64)
    maps = {}
    theirs.layer3.register_forward_hook(lambda *found: maps.update(stage=found[-1]))
    theirs.fc = torch.nn.Identity()
    with torch.inference_mode():
        expected = normalize(theirs(images), dim=-1)
        descriptor, tokens = model(images)
        alone, none = model(images, tokens=False)
    torch.testing.assert_close(descriptor, expected)
    torch.testing.assert_close(alone, expected)
    assert none is None
    assert (model.patch_size, model.grid, model.channels, model.dim) == (16, 4, 1024, 2048)
    for patch in (0, 5, 11):
        torch.testing.assert_close(tokens[:, patch], maps["stage"][:, :, patch // 4, patch % 4])


def test_files_come_back(tmp_path: Path) -> None:
    model = tiny(img_size=448)
    model.train()(torch.randn(4, 3, 448, 448), sides=2)
    torch.save({"model": {f"module.{n}": v for n, v in model.state_dict().items()}, "epoch": 3}, tmp_path / "r.pth.tar")
    convert(tmp_path / "r.pth.tar", tmp_path / "ours.safetensors")
    assert (
        not convert(tmp_path / "ours.safetensors", tmp_path / "again.pth.tar").said[-1].startswith("the file does not")
    )
    images = torch.randn(1, 3, 448, 448)
    with torch.inference_mode():
        expected = model.eval()(images)[0]
        for name in ("r.pth.tar", "ours.safetensors", "again.pth.tar"):
            found = load_descriptor(tmp_path / name)
            assert found.config == model.config
            assert torch.equal(found(images)[0], expected)
    model.save_pretrained(tmp_path / "folder")
    assert Descriptor.from_pretrained(tmp_path / "folder").config == model.config
    done = convert(tmp_path / "r.pth.tar", tmp_path / "start.safetensors", "descriptor", ["img_size=64", "dim=4"])
    assert "new: heads.linear_head.fc1, heads.linear_head.bn" in done.said
    assert load_checkpoint(tmp_path / "start.safetensors").img_size == 64


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "r.safetensors", tiny())
    transformer = build_descriptor(img_size=32, dim=8, backbone_options={"embed_dim": 24, "num_heads": 2, "depth": 1})
    with pytest.raises(DataError, match="holds a ResNet, the model's backbone 'vit_small_patch16_224' is a vision tr"):
        load_start(transformer, tmp_path / "r.safetensors")
    save_checkpoint(tmp_path / "v.safetensors", transformer)
    with pytest.raises(DataError, match="holds a vision transformer, the model's backbone 'resnet50' is a ResNet"):
        load_start(tiny(), tmp_path / "v.safetensors")
    with pytest.raises(DataError, match=r"its encoder has layers \[1, 1, 1, 1\] instead of \[1, 2, 1, 1\]"):
        load_start(tiny(backbone_options={**SMALL, "layers": [1, 2, 1, 1]}), tmp_path / "r.safetensors")
    for settings, sentence in (
        ({"img_size": 48}, "img_size must be a multiple of the stride 32 of 'resnet50', got 48"),
        ({"norm_eps": 1e-6}, "norm_eps is that of LayerNorm"),
        ({"tokens_block": 5}, r"tokens_block must lie in \[-5, 4\]"),
        ({"second_class_block": 1}, "second_class_block must be none for a ResNet"),
        ({"freeze_blocks": 1}, "freeze_blocks must be 0 for a ResNet"),
        ({"backbone_options": {"layer": [1]}}, "has no 'layer'; near names: layers"),
        ({"backbone_options": {"norm_layer": "x"}}, "may not set 'norm_layer'"),
        ({"backbone": "resnet5"}, "backbone must name a plain vision transformer of timm, or a ResNet"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tiny(**settings)
    with pytest.raises(ConfigError, match=r"layers must be .*at most"):
        check_model(DescriptorConfig(backbone="resnet50", backbone_options={"layers": [10**9, 1, 1, 1]}))
    with pytest.raises(ValueError, match="backbone must be a vision transformer for a matcher, got 'resnet50'"):
        build_matcher("resnet50")
    with pytest.raises(ConfigError, match="for a matcher"):
        convert(tmp_path / "r.safetensors", tmp_path / "m.safetensors", "matcher")
