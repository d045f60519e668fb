from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import copynce.models.descriptor
from copynce.models import Descriptor, DescriptorConfig, build_descriptor, param_groups

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2}
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def tiny(**settings: object) -> Descriptor:
    return build_descriptor(**{"img_size": 32, "dim": 8, "backbone_options": TINY, **settings})


def released(oracle: Path, size: int) -> tuple[Descriptor, dict[str, np.ndarray]]:
    path = oracle / f"model_descriptor_{size}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the oracle's files")
    arrays = dict(np.load(path))
    model = build_descriptor(img_size=size, backbone_options={"embed_dim": 96, "depth": 4, "num_heads": 3})
    state = {name.removeprefix("state/"): torch.from_numpy(a) for name, a in arrays.items() if name[:6] == "state/"}
    model.load_state_dict(state, strict=True)
    return model, arrays


def pictures(arrays: dict[str, np.ndarray], side: str) -> Tensor:
    return (torch.from_numpy(arrays[f"images_{side}_uint8"]).float() / 255 - MEAN) / STD


@pytest.mark.parametrize("size", [224, 336])
def test_evaluation_equals_the_released_model(oracle: Path, size: int) -> None:
    model, arrays = released(oracle, size)
    with torch.inference_mode():
        descriptor, tokens = model.eval()(pictures(arrays, "que"))
    np.testing.assert_allclose(descriptor, arrays["eval_feat"], atol=1e-6)
    # Values up to 60 after four blocks of random weights: float32 sums in another order.
    np.testing.assert_allclose(tokens, arrays["eval_block_outputs_3"][:, 1:], atol=2e-4)
    assert descriptor.dtype == tokens.dtype == torch.float32


@pytest.mark.parametrize("size", [224, 336])
def test_training_takes_batch_statistics_of_each_side(oracle: Path, size: int) -> None:
    model, arrays = released(oracle, size)
    both = torch.cat([pictures(arrays, "que"), pictures(arrays, "ref")])
    with torch.no_grad():
        descriptors, tokens = model.train()(both, sides=2)
    query, reference = descriptors.chunk(2)
    # BatchNorm over two pictures divides by differences as small as 1e-3, so errors of 1e-7 become 1e-4.
    np.testing.assert_allclose(query, arrays["train_que_feat"], atol=2e-4)
    np.testing.assert_allclose(reference, arrays["train_ref_feat"], atol=2e-4)
    np.testing.assert_allclose(tokens[2:], arrays["train_ref_block_outputs_3"][:, 1:], atol=2e-4)
    norm = model.heads["linear_head"].bn
    np.testing.assert_allclose(norm.running_mean, arrays["after_train_running_mean"], atol=1e-4)
    np.testing.assert_allclose(norm.running_var, arrays["after_train_running_var"], atol=1e-4, rtol=1e-4)


def test_tokens_of_an_earlier_block(oracle: Path) -> None:
    _, arrays = released(oracle, 224)
    model = build_descriptor(backbone_options={"embed_dim": 96, "depth": 4, "num_heads": 3}, tokens_block=0).eval()
    model.load_state_dict({n[6:]: torch.from_numpy(a) for n, a in arrays.items() if n[:6] == "state/"})
    with torch.inference_mode():
        descriptor, tokens = model(pictures(arrays, "que"))
    np.testing.assert_allclose(tokens[:, :19], arrays["eval_block_outputs_0"][:, 1:], atol=1e-4)
    np.testing.assert_allclose(descriptor, arrays["eval_feat"], atol=1e-6)


@pytest.mark.parametrize(
    ("case", "backbone", "dim"),
    [
        ("descriptor_vits_224", "vit_small_patch16_224", 512),
        ("descriptor_vitb_224", "vit_base_patch16_224", 512),
        ("descriptor_vits_224_dim256", "vit_small_patch16_224", 256),
    ],
)
def test_names_and_counts_of_the_released_layout(oracle: Path, case: str, backbone: str, dim: int) -> None:
    expected = json.loads((oracle / "state_dict_keys.json").read_text())[case]
    with torch.device("meta"):
        model = build_descriptor(backbone, dim=dim)
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: shape for name, shape, _ in expected["keys"] if name != "infonce_log_scale"}
    assert ours == theirs
    assert sum(p.numel() for p in model.parameters()) == expected["n_params"] - 1  # the loss's infonce_log_scale
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["n_trainable"] - 1
    assert model.encoder.blocks[0].norm1.eps == 1e-4


def test_small_descriptor_count() -> None:
    with torch.device("meta"):
        model = build_descriptor()
    assert len(model.state_dict()) == 154
    assert sum(p.numel() for p in model.parameters()) == 21_862_528


def test_parameter_groups(oracle: Path) -> None:
    facts = json.loads((oracle / "models.json").read_text())["model_descriptor_224"]
    model = build_descriptor(backbone_options={"embed_dim": 96, "depth": 4, "num_heads": 3})
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == facts["frozen"]
    decayed, undecayed = param_groups(model, 0.04)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.04, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    without = {names[id(p)] for p in undecayed["params"]}
    with_decay = {names[id(p)] for p in decayed["params"]}
    assert set(facts["no_weight_decay"]) <= without
    assert without | with_decay == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not without & with_decay
    assert all(name.endswith(".weight") and model.get_parameter(name).ndim == 2 for name in with_decay)


def test_class_token_head_is_the_backbones_own_feature() -> None:
    model = tiny(head="cls").eval()
    backbone = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=0, **TINY).eval()
    backbone.load_state_dict(model.encoder.state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        descriptor, _ = model(images)
        expected = torch.nn.functional.normalize(backbone(images), dim=-1)
    torch.testing.assert_close(descriptor, expected)
    assert model.dim == descriptor.shape[1] == 24


def test_register_tokens_are_no_patches() -> None:
    model = tiny(backbone="vit_small_patch14_reg4_dinov2", img_size=28).eval()
    with torch.inference_mode():
        _, tokens = model(torch.randn(1, 3, 28, 28))
    assert tokens.shape == (1, 4, 24)
    assert (model.patch_size, model.grid, model.channels) == (14, 2, 24)


def test_gradients_reach_everything_that_trains() -> None:
    model = tiny().train()
    descriptor, tokens = model(torch.randn(6, 3, 32, 32), sides=2)
    (descriptor @ torch.randn(8) + tokens.square().mean((1, 2))).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.patch_embed"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_autocast_leaves_the_descriptor_in_float32() -> None:
    model = tiny().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        descriptor, _ = model(torch.randn(4, 3, 32, 32), sides=2)
    assert descriptor.dtype == torch.float32
    torch.testing.assert_close(descriptor.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "vit_smal_patch16_224"}, "near names: .*vit_small_patch16_224"),
        ({"backbone": "convnext_tiny", "backbone_options": {}}, "of timm, or a ResNet, got 'convnext_tiny'"),
        ({"backbone": "vit_wee_patch16_reg1_gap_256"}, "must have a class token"),
        ({"backbone_options": {"deph": 2}}, "near names: depth"),
        ({"backbone_options": {"img_size": 2}}, "may not set 'img_size'"),
        ({"backbone_options": {"embed_dim": 25, "num_heads": 2}}, "multiple of num_heads, got 25 and 2"),
        ({"img_size": 30}, "multiple of the patch size 16 .* got 30"),
        ({"tokens_block": 3}, r"\[-3, 2\] for the 3 blocks .* got 3"),
        ({"second_class_block": 2}, r"in \[-3, 1\] for the 3 blocks but the last 1 of .* got 2"),
        ({"second_class_block": -1}, r"second_class_block must lie in \[-3, 1\]"),
        ({"second_class_block": 0, "head": "cls"}, "second_class_block must be none with head 'cls'"),
        ({"freeze_blocks": 4}, r"freeze_blocks must lie in \[0, 3\] .* got 4"),
        ({"head": "mlp"}, "head must be .* got 'mlp'"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"drop_path": 1.0}, "drop_path must lie in"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_inputs_that_do_not_fit() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\] for this model, got \[2, 3, 32, 16\]"):
        model(torch.zeros(2, 3, 32, 16))
    with pytest.raises(ValueError, match="sides must divide the batch of 3 pictures, got 2"):
        model(torch.zeros(3, 3, 32, 32), sides=2)
    with pytest.raises(ValueError, match="at least 2 pictures a side"):
        model.train()(torch.zeros(2, 3, 32, 32), sides=2)


def test_config_survives_json() -> None:
    config = DescriptorConfig(backbone_options=TINY, head="cls", tokens_block=1)
    assert DescriptorConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_examples() -> None:
    assert doctest.testmod(copynce.models.descriptor).failed == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head": "cls"},
        {"backbone": "vit_small_patch14_reg4_dinov2", "img_size": 28, "backbone_options": {"depth": 2}},
        {"backbone_options": {"depth": 2, "qk_norm": True, "init_values": 0.1, "qkv_bias": False}},
        {"backbone_options": {"depth": 2}, "tokens_block": 0},
        {"backbone_options": {"depth": 1}},
        {"second_class_block": 0},
        {"second_class_block": 1, "tokens_block": 1},
    ],
    ids=[
        "linear_bn",
        "cls",
        "registers",
        "other blocks",
        "inner tokens",
        "one block",
        "two",
        "the one before the last",
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_descriptors_without_tokens_are_the_same_descriptors(settings: dict[str, Any], training: bool) -> None:
    model = build_descriptor(**{"img_size": 32, "dim": 16, "backbone_options": {"depth": 3}} | settings).train(training)
    images = torch.randn(3, 3, model.img_size, model.img_size)
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if name.endswith("bias"):  # a new model's are zero, and would hide what becomes of them
                parameter.normal_(std=0.5)
        expected, _ = model(images)
        descriptor, none = model(images, tokens=False)
    assert none is None
    torch.testing.assert_close(descriptor, expected, atol=1e-6, rtol=0)


def test_without_tokens_the_last_block_makes_the_class_token_alone() -> None:
    model = build_descriptor(img_size=32, dim=16, backbone_options={"depth": 2}).eval()
    rows: list[int] = []
    model.encoder.blocks[1].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32), tokens=False)
        model(torch.zeros(1, 3, 32, 32))
    assert rows == [1, 1 + 4]


def test_a_second_class_token_is_read_beside_the_last() -> None:
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 3, "num_heads": 2}
    model = build_descriptor(img_size=32, dim=8, backbone_options=options, second_class_block=1).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        outputs = model.encoder.forward_intermediates(
            images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        read = torch.cat([outputs[2][1][:, 0], outputs[1][1][:, 0]], 1)
        torch.testing.assert_close(model.class_token(images), read)
        expected = model.heads["linear_head"](read)
        torch.testing.assert_close(model(images)[0], expected)
        torch.testing.assert_close(model.with_encodings(images, 2)[0], expected)


def test_frozen_blocks_keep_their_weights() -> None:
    options = {"embed_dim": 24, "depth": 3, "num_heads": 2}
    model = build_descriptor(img_size=32, dim=8, backbone_options=options, freeze_blocks=2).train()
    model(torch.randn(2, 3, 32, 32))[0].sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[2] for name in trained if name.startswith("encoder")} == {"2"}
    assert any(name.startswith("heads") for name in trained)
