"""What a descriptor takes of a file that it starts from, and what is said about it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from copynce.errors import ConfigError, DataError
from copynce.models import Descriptor, build_descriptor, load_start, save_checkpoint
from copynce.models.names import find_encoder
from copynce.models.weight_files import WeightFile

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
State = dict[str, Tensor]


def tiny(seed: int = 0, **settings: object) -> Descriptor:
    torch.manual_seed(seed)
    model = build_descriptor(**{"img_size": 32, "dim": 8, "backbone_options": TINY, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def descriptors(model: Descriptor) -> Tensor:
    images = torch.randn(3, 3, model.img_size, model.img_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(images)[0]


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


HEAD = {"head.mlp.0.weight": torch.ones(4, 24), "head.last_layer.weight_g": torch.ones(4, 1)}

#: How trainings of others write the same encoder: the file's content from the encoder's state, and who is taken.
FORMS: dict[str, tuple[Callable[[State], object], str]] = {
    "plain": (lambda s: s, ""),
    "DDP": (lambda s: under("module.", s), "module"),
    "compiled DDP": (lambda s: under("_orig_mod.module.", s), "_orig_mod.module"),
    "DINO teacher": (lambda s: {"teacher": under("backbone.", s) | HEAD}, "teacher.backbone"),
    "DINO training": (
        lambda s: {
            "student": under("module.backbone.", other(s)),
            "teacher": under("backbone.", s) | HEAD,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]},
            "args": argparse.Namespace(arch="vit_small"),
        },
        "teacher.backbone",
    ),
    "DINOv2 training": (
        lambda s: {
            "model": under("student.backbone.", other(s))
            | under("teacher.backbone.", s)
            | under("teacher.dino_", HEAD),
            "iteration": 3,
        },
        "model.teacher.backbone",
    ),
    "DINOv2 in chunks": (
        lambda s: {"teacher": {"backbone." + name.replace("blocks.", "blocks.7."): value for name, value in s.items()}},
        "teacher.backbone",
    ),
    "Lightning": (
        lambda s: {"state_dict": under("model.backbone.", s) | HEAD, "optimizer_states": [{}], "epoch": 3},
        "state_dict.model.backbone",
    ),
    "Lightning MoCo": (
        lambda s: {"state_dict": under("momentum_backbone.", other(s)) | under("backbone.", s)},
        "state_dict.backbone",
    ),
    "timm training with an average": (
        lambda s: {"state_dict": other(s), "state_dict_ema": s, "arch": "vit", "args": argparse.Namespace(lr=1.0)},
        "state_dict_ema",
    ),
    "MAE": (
        lambda s: {"model": s | {"decoder_embed.weight": torch.ones(3, 24), "mask_token": torch.zeros(1, 1, 24)}},
        "model",
    ),
    "I-JEPA": (lambda s: {"encoder": other(s), "target_encoder": under("module.", s)}, "target_encoder.module"),
    "student alone": (lambda s: {"student": under("encoder.", s)}, "student.encoder"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_start_from_the_files_of_other_trainings(tmp_path: Path, form: str, zipped: bool) -> None:
    make, place = FORMS[form]
    source = tiny(1)
    state = {name: value.clone() for name, value in source.encoder.state_dict().items()}
    path = tmp_path / "file.pth"
    torch.save(make(state), path, _use_new_zipfile_serialization=zipped)
    model = tiny(2)
    said = load_start(model, path)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert said[0].startswith(f"{path}: the encoder of {place} is taken" if place else f"{path}: the encoder is taken")
    assert "the head is new: the file holds none" in said


def test_two_encoders_of_equal_right_are_not_chosen_between(tmp_path: Path) -> None:
    state = tiny().encoder.state_dict()
    torch.save(under("left.", state) | under("right.", state), tmp_path / "two.pth")
    with pytest.raises(DataError, match=r"two\.pth holds several encoders \(left, right\); save the one that is meant"):
        load_start(tiny(), tmp_path / "two.pth")


def test_dinov2_with_registers_equals_timms_own_loading(tmp_path: Path) -> None:
    """Its class token has a position, timm's model adds it to the token; registers have another name."""
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
    name = "vit_small_patch14_reg4_dinov2"
    state = timm.create_model("vit_small_patch14_dinov2", img_size=64, num_classes=0, **options).state_dict()
    state = {key: torch.randn_like(value) * 0.2 for key, value in state.items()}
    state["register_tokens"], state["mask_token"] = torch.randn(1, 4, 24), torch.zeros(1, 24)
    torch.save(state, tmp_path / "dinov2.pth")
    model = build_descriptor(name, img_size=32, head="cls", backbone_options=options)
    said = load_start(model, tmp_path / "dinov2.pth")
    assert "the position of the class token is added to it, as this backbone has it" in said
    assert "the position embedding is resized from 8 x 8 to 4 x 4 patches" in said
    own = timm.create_model(
        name,
        img_size=32,
        num_classes=0,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "dinov2.pth")},
        **options,
    )
    for key, value in model.encoder.state_dict().items():
        torch.testing.assert_close(value, own.state_dict()[key])


@pytest.mark.parametrize("form", ["ours", "released", "run"])
def test_a_trained_head_is_taken_with_its_encoder(tmp_path: Path, form: str) -> None:
    trained = tiny(1)
    trained.train()(torch.randn(6, 3, 32, 32), sides=2)  # statistics of BatchNorm that are not the first ones
    path = tmp_path / "run" / "checkpoints" / "step-00000040" / "model.safetensors"
    save_checkpoint(path, trained)
    if form == "released":
        path = tmp_path / "released.pth.tar"
        state = under("module.", trained.state_dict()) | {"module.infonce_log_scale": torch.tensor(3.5)}
        torch.save({"model": state, "epoch": 30}, path)
    elif form == "run":
        path = tmp_path / "run"
    first, second = tiny(2), tiny(3)
    said = load_start(first, path)
    load_start(second, path)
    assert "the head is taken" in said
    assert torch.equal(descriptors(first), descriptors(trained))
    assert torch.equal(descriptors(first), descriptors(second))  # nothing of the models' own is left
    if form == "released":
        assert "left aside: infonce_log_scale; loss.log_scale sets it" in said
    assert torch.equal(
        descriptors(build_descriptor(img_size=32, dim=8, backbone_options=TINY, weights=path)), descriptors(trained)
    )


def test_a_head_of_another_length_is_new(tmp_path: Path) -> None:
    trained, model = tiny(1), tiny(2, dim=4)
    head = model.heads["linear_head"].fc1.weight.clone()
    save_checkpoint(tmp_path / "model.safetensors", trained)
    said = load_start(model, tmp_path / "model.safetensors")
    assert "the head is new: the file's makes descriptors of 8, the model's of 4" in said
    assert any(sentence.startswith("left aside: heads.linear_head.bn.") for sentence in said)
    assert torch.equal(model.heads["linear_head"].fc1.weight, head)
    assert torch.equal(model.encoder.cls_token, trained.encoder.cls_token)


def test_half_a_head_is_refused(tmp_path: Path) -> None:
    state = tiny(1).state_dict()
    del state["heads.linear_head.bn.running_mean"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"does not fit the model; missing: heads\.linear_head\.bn\.running_mean"):
        load_start(tiny(), tmp_path / "model.safetensors")


def test_another_picture_size_resizes_the_positions(tmp_path: Path) -> None:
    trained, model = tiny(1), tiny(2, img_size=48)
    save_checkpoint(tmp_path / "model.safetensors", trained)
    said = load_start(model, tmp_path / "model.safetensors")
    assert "the position embedding is resized from 4 x 4 to 6 x 6 patches" in said
    assert torch.equal(model.encoder.pos_embed[:, 0], trained.encoder.pos_embed[:, 0])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"depth": 3}, "depth 2 instead of 3"),
        ({"patch_size": 16}, "patch_size 8 instead of 16"),
        ({"embed_dim": 48}, "embed_dim 24 instead of 48"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 4.0 instead of 2.0"),
    ],
)
def test_an_encoder_of_another_shape_is_refused(tmp_path: Path, options: dict[str, object], fault: str) -> None:
    save_checkpoint(tmp_path / "model.safetensors", tiny(1))
    model = tiny(2, backbone_options={**TINY, **options})
    before = descriptors(model)
    with pytest.raises(DataError, match=rf"does not fit the model: its encoder has {fault}; choose model\.backbone"):
        load_start(model, tmp_path / "model.safetensors")
    assert torch.equal(descriptors(model), before)


def test_what_shapes_do_not_tell_is_compared_where_the_file_tells_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.safetensors", tiny(1))
    with pytest.raises(DataError, match="was trained with num_heads 2, the model has 3"):
        load_start(tiny(backbone_options={**TINY, "num_heads": 3}), tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="was trained with the activation GELU, the model has ReLU"):
        load_start(tiny(backbone_options={**TINY, "act_layer": "relu"}), tmp_path / "model.safetensors")
    said = load_start(tiny(norm_eps=1e-6), tmp_path / "model.safetensors")
    assert "it was trained with norm_eps 0.0001, the model has 1e-06" in said


def test_heads_that_nobody_tells_are_asked_for_or_said(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"

    def model(**options: int) -> Descriptor:
        return build_descriptor(img_size=32, backbone_options={"depth": 1, **options})

    torch.save(model(embed_dim=96).encoder.state_dict(), path)
    with pytest.raises(ConfigError, match=r"sets embed_dim 96 without num_heads, and .*backbone\.pth does not tell"):
        load_start(model(embed_dim=96), path)
    said = load_start(model(embed_dim=96, num_heads=3), path)
    assert "the file does not tell its attention heads: the model's 3 are taken" in said
    torch.save(model().encoder.state_dict(), path)
    assert not any("attention heads" in sentence for sentence in load_start(model(), path))
    said = load_start(model(num_heads=12), path)
    assert any("the model's 12 are taken; known models of this width have 6" in sentence for sentence in said)


def test_the_encoder_is_found_under_any_prefix() -> None:
    tensors = {"deep.down.patch_embed.proj.weight": torch.ones(4, 3, 2, 2), "deep.down.norm.bias": torch.ones(4)}
    found = find_encoder(WeightFile(Path("x"), {**tensors, "unpatch_embed.proj.weight": torch.ones(1)}, {}))
    assert found.place == "deep.down"
    assert list(found.tensors) == ["encoder.patch_embed.proj.weight", "encoder.norm.bias"]
    with pytest.raises(DataError, match=r"holds no vision transformer with timm's names: it has conv1\.weight"):
        find_encoder(WeightFile(Path("x"), {"conv1.weight": torch.ones(1)}, {}))
