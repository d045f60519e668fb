"""The matcher against the released model, its two halves, and what it may start from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from copynce.errors import DataError
from copynce.models import (
    Descriptor,
    Matcher,
    MatcherConfig,
    build_descriptor,
    build_matcher,
    load_checkpoint,
    load_descriptor,
    load_matcher,
    load_start,
    param_groups,
    save_checkpoint,
)
from copynce.models.check import check_model

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
TINY = {"embed_dim": 24, "num_heads": 3}
RELEASED = {"embed_dim": 96, "num_heads": 3}


def tiny(**settings: object) -> Matcher:
    options = {"img_size": 32, "encoder_blocks": 2, "fusion_blocks": 2, "backbone_options": TINY, **settings}
    return build_matcher(**options).eval()


def released(oracle: Path, size: int) -> tuple[Matcher, dict[str, np.ndarray]]:
    path = oracle / f"model_matcher_{size}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the oracle's files")
    arrays = dict(np.load(path))
    model = build_matcher(img_size=size, encoder_blocks=4, fusion_blocks=2, backbone_options=RELEASED)
    state = {name.removeprefix("state/"): torch.from_numpy(a) for name, a in arrays.items() if name[:6] == "state/"}
    model.load_state_dict(state, strict=True)
    return model, arrays


def pictures(arrays: dict[str, np.ndarray], side: str) -> Tensor:
    return (torch.from_numpy(arrays[f"images_{side}_uint8"]).float() / 255 - MEAN) / STD


@pytest.mark.parametrize("size", [224, 336])
def test_scores_and_tokens_equal_the_released_model(oracle: Path, size: int) -> None:
    model, arrays = released(oracle, size)
    query, reference = pictures(arrays, "que"), pictures(arrays, "ref")
    with torch.inference_mode():
        scores = model.eval()(query, reference).sigmoid()
        logits, query_tokens, reference_tokens = model.train().with_tokens(query, reference)
        swapped = model(reference, query)
    np.testing.assert_allclose(scores, arrays["eval_preds"][:, 0], atol=1e-6)
    # A score moves by at most a quarter of its logit: 1e-6 of a score.
    np.testing.assert_allclose(logits, arrays["train_preds"][:, 0], atol=4e-6)
    np.testing.assert_allclose(swapped, arrays["swapped_train_preds"][:, 0], atol=4e-6)
    # Normalised tokens of up to 4: float32 sums in another order.
    np.testing.assert_allclose(query_tokens, arrays["fusion_head_que_patch_tokens"], atol=5e-6)
    name = "fusion_head_ref_patch_tokens_first20"
    np.testing.assert_allclose(reference_tokens[:, :20], arrays[name], atol=5e-6)


@pytest.mark.parametrize(
    ("case", "backbone", "size"),
    [
        ("matcher_vits_224", "vit_small_patch16_224", 224),
        ("matcher_vits_336", "vit_small_patch16_224", 336),
        ("matcher_vitb_224", "vit_base_patch16_224", 224),
    ],
)
def test_names_and_counts_of_the_released_layout(oracle: Path, case: str, backbone: str, size: int) -> None:
    expected = json.loads((oracle / "state_dict_keys.json").read_text())[case]
    with torch.device("meta"):
        model = build_matcher(backbone, img_size=size)
    assert {n: list(v.shape) for n, v in model.state_dict().items()} == {n: s for n, s, _ in expected["keys"]}
    assert sum(p.numel() for p in model.parameters()) == expected["n_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["n_trainable"]


def test_parameter_groups(oracle: Path) -> None:
    facts = json.loads((oracle / "models.json").read_text())["model_matcher_224"]
    model = build_matcher(encoder_blocks=4, fusion_blocks=2, backbone_options=RELEASED)
    names = {id(p): name for name, p in model.named_parameters()}
    undecayed = {names[id(p)] for p in param_groups(model, 0.04)[1]["params"]}
    assert {name for name in undecayed if model.get_parameter(name).ndim > 1} == set(facts["no_weight_decay"])


def test_halves_equal_the_whole_and_sides_may_be_swapped() -> None:
    model = tiny()
    query, reference = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        whole = model(query, reference)
        encoded = [model.encode(images) for images in (query, reference)]
        torch.testing.assert_close(model.fuse(*encoded), whole)
        torch.testing.assert_close(model.fuse(*reversed(encoded)), whole, atol=1e-6, rtol=0)
        # One encoding for several pairs, and the last block's short way against its whole one.
        shared = encoded[0][:1].expand(3, -1, -1)
        torch.testing.assert_close(model.fuse(shared, encoded[1])[:1], whole[:1], atol=1e-6, rtol=0)
        torch.testing.assert_close(model.fuse_with_tokens(*encoded)[0], whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backbone", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_backbones_with_layer_scale_and_registers(backbone: str) -> None:
    model = tiny(backbone=backbone, img_size=28, encoder_blocks=1, fusion_blocks=1)
    query, reference = torch.randn(2, 3, 28, 28), torch.randn(2, 3, 28, 28)
    logits, query_tokens, reference_tokens = model.with_tokens(query, reference)
    assert logits.shape == (2,)
    assert query_tokens.shape == reference_tokens.shape == (2, 4, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(query, reference), logits, atol=1e-6, rtol=0)


def test_checkpoints_come_back(tmp_path: Path) -> None:
    model = tiny()
    query, reference = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    save_checkpoint(tmp_path / "a.safetensors", model, {"step": 1})
    # The released form, and that of a fine-tuned model, which has lost the head that only CopyNCE asks.
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 30}, tmp_path / "b.pth.tar")
    torch.save({"model": {n: v for n, v in state.items() if "fusion_head" not in n}}, tmp_path / "c.pth.tar")
    with torch.inference_mode():
        for name in ("a.safetensors", "b.pth.tar", "c.pth.tar"):
            loaded = load_checkpoint(tmp_path / name, num_heads=None if name[0] == "a" else 3)
            assert isinstance(loaded, Matcher)
            torch.testing.assert_close(loaded(query, reference), model(query, reference))
    assert load_matcher(tmp_path / "a.safetensors").config == model.config
    with pytest.raises(DataError, match=r"a\.safetensors holds a matcher, expected a descriptor"):
        load_descriptor(tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="holds a matcher"):
        load_start(
            build_descriptor(img_size=32, dim=8, backbone_options={**TINY, "depth": 4}), tmp_path / "a.safetensors"
        )


def start(folder: Path, depth: int = 4) -> tuple[Descriptor, Path]:
    model = build_descriptor(img_size=32, head="cls", backbone_options={**TINY, "depth": depth})
    path = folder / "backbone.pth"
    state = {n.removeprefix("encoder."): v for n, v in model.state_dict().items()}
    torch.save(state, path)
    return model, path


def test_starts_from_a_backbone(tmp_path: Path) -> None:
    backbone, path = start(tmp_path)
    model = tiny()
    said = load_start(model, path)
    for ours, theirs in [("encoder.blocks.1", "blocks.1"), ("fusion.blocks.0", "blocks.2"), ("fusion.norm", "norm")]:
        name = f"{theirs}.mlp.fc1.weight" if "blocks" in theirs else f"{theirs}.weight"
        own = f"{ours}.mlp.fc1.weight" if "blocks" in ours else f"{ours}.weight"
        assert torch.equal(model.state_dict()[own], backbone.encoder.state_dict()[name])
    assert any("blocks 2 to 3 are the fusion's" in line for line in said)
    assert any("fusion.cls_token" in line for line in said)
    with pytest.raises(DataError, match="fusion_blocks 2 instead of 1"):
        load_start(tiny(fusion_blocks=1), path)


def test_starts_as_the_released_code_divides(oracle: Path) -> None:
    from copynce.models.names import divided

    for name, pairs in json.loads((oracle / "dino_split_keys.json").read_text()).items():
        encoder_blocks = int("".join(c for c in name.split("fus")[0] if c.isdigit()))
        ours = divided({f"encoder.{old}": torch.empty(0) for old, _ in pairs}, encoder_blocks)
        expected = [new for old, new in pairs]
        assert len(ours) == len(expected)
        if encoder_blocks < 12:
            assert sorted(ours) == sorted(expected)


def test_starts_from_a_stage_before(tmp_path: Path) -> None:
    first, second = tiny(), tiny(img_size=48)
    save_checkpoint(tmp_path / "a.safetensors", first)
    said = load_start(second, tmp_path / "a.safetensors")
    assert torch.equal(first.heads["cls_head"].classifier.weight, second.heads["cls_head"].classifier.weight)
    assert any("2 x 2 to 3 x 3" in line for line in said)


def test_wrong_input_is_named() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"\[N, 3, 32, 32\]"):
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="one shape"):
        model(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="reference_tokens must be encodings"):
        model.fuse(torch.zeros(2, 5, 24), torch.zeros(1, 5, 24))
    with pytest.raises(ValueError, match="may not set 'depth'"):
        tiny(backbone_options={**TINY, "depth": 3})
    with pytest.raises(ValueError, match="fusion_blocks must be at least 1"):
        tiny(fusion_blocks=0)


@pytest.mark.parametrize("split", [(8, 4), (6, 6), (10, 2), (1, 3)])
@pytest.mark.parametrize(("backbone", "channels"), [("vit_tiny_patch16_224", 192), ("vit_base_patch16_224", 768)])
def test_sizes_and_splits(backbone: str, channels: int, split: tuple[int, int]) -> None:
    config = MatcherConfig(backbone=backbone, img_size=336, encoder_blocks=split[0], fusion_blocks=split[1])
    assert check_model(config) == 441
    with torch.device("meta"):
        model = build_matcher(backbone, img_size=336, encoder_blocks=split[0], fusion_blocks=split[1])
    assert (model.channels, len(model.encoder.blocks), len(model.fusion.blocks)) == (channels, *split)


@pytest.mark.numeric
@pytest.mark.parametrize("gradients", [False, True])
def test_bfloat16(gradients: bool) -> None:
    model = tiny()
    query, reference = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32)
    with torch.set_grad_enabled(gradients):
        single = model(query, reference)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(query, reference)
    assert half.dtype == single.dtype == torch.float32
    torch.testing.assert_close(half, single, atol=0.05, rtol=0)
