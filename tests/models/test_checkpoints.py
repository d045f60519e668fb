from __future__ import annotations

import hashlib
import resource
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from copynce.errors import DataError, WriteError
from copynce.models import (
    Descriptor,
    DescriptorConfig,
    build_descriptor,
    load_backbone,
    load_checkpoint,
    load_start,
    read_checkpoint_metadata,
    save_checkpoint,
    start_card,
)
from copynce.models.starts import resample_position

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 8}


def tiny(**settings: object) -> Descriptor:
    return build_descriptor(**{"img_size": 32, "dim": 8, "backbone_options": TINY, **settings})


def outputs(model: Descriptor) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, model.img_size, model.img_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(images)


@pytest.mark.parametrize("head", ["linear_bn", "cls"])
def test_what_was_saved_comes_back(tmp_path: Path, head: str) -> None:
    model = tiny(head=head, tokens_block=0)
    model.train()(torch.randn(4, 3, 32, 32), sides=2)  # running statistics that are not the initial ones
    path = tmp_path / "run" / "model.safetensors"
    save_checkpoint(path, model, {"epoch": 3, "uap": 0.5})
    loaded = load_checkpoint(path)
    assert loaded.config == model.config
    assert not loaded.training
    for ours, theirs in zip(outputs(loaded), outputs(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert read_checkpoint_metadata(path) == {"epoch": 3, "uap": 0.5}
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    assert load_checkpoint(path.parent).config == model.config


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tiny(), {"epoch": 1})
    with pytest.raises(TypeError):
        save_checkpoint(path, tiny(), {"epoch": object()})
    assert read_checkpoint_metadata(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_released_checkpoint(tmp_path: Path) -> None:
    model = tiny()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module.infonce_log_scale"] = torch.tensor(3.2)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"model": state, "epoch": 30}, path)
    for loaded in (load_checkpoint(path, num_heads=1), load_checkpoint(path, model.config)):
        for ours, theirs in zip(outputs(loaded), outputs(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (loaded.img_size, loaded.patch_size, loaded.dim) == (32, 8, 8)
    twice_as_many_heads = DescriptorConfig(img_size=32, dim=8, backbone_options={**TINY, "num_heads": 2})
    assert not torch.equal(outputs(load_checkpoint(path, twice_as_many_heads))[0], outputs(model)[0])


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tiny())
    torch.save(load_file(path), tmp_path / "plain.pth")
    with pytest.raises(DataError, match=r"of another shape: .*pos_embed \[1, 17, 64\] instead of \[1, 65, 64\]"):
        load_checkpoint(tmp_path / "plain.pth", DescriptorConfig(img_size=64, dim=8, backbone_options=TINY))
    state = load_file(path)
    del state["encoder.cls_token"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "plain.pth")
    with pytest.raises(DataError, match=r"missing: encoder\.cls_token; unexpected: extra"):
        load_checkpoint(tmp_path / "plain.pth", num_heads=1)


def test_the_number_of_heads_is_never_guessed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"model": tiny().state_dict(), "epoch": 30}, path)
    with pytest.raises(DataError, match=r"does not tell how many attention heads .* its width 64 .*; give num_heads"):
        load_checkpoint(path)
    known = build_descriptor(img_size=32, dim=8, backbone_options={"embed_dim": 192, "depth": 1, "num_heads": 3})
    torch.save({"model": known.state_dict(), "epoch": 30}, path)
    assert load_checkpoint(path).config.backbone_options["num_heads"] == 3
    assert load_checkpoint(path, num_heads=6).config.backbone_options["num_heads"] == 6


@pytest.mark.parametrize("size", [224, 336])
def test_the_released_models_file_gives_its_own_outputs(oracle: Path, tmp_path: Path, size: int) -> None:
    source = oracle / f"model_descriptor_{size}.npz"
    if not source.exists():
        pytest.skip(f"{source.name} is not among the oracle's files")
    arrays = dict(np.load(source))
    state = {name.removeprefix("state/"): torch.from_numpy(a) for name, a in arrays.items() if name[:6] == "state/"}
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 30}, tmp_path / "x.pth")
    model = load_checkpoint(tmp_path / "x.pth", num_heads=3)  # 32 channels a head
    pictures = torch.from_numpy(arrays["images_que_uint8"]).float() / 255
    pictures = (pictures - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.inference_mode():
        np.testing.assert_allclose(model(pictures)[0], arrays["eval_feat"], atol=1e-6)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    text = tmp_path / "notes.safetensors"
    text.write_text("not a model")
    with pytest.raises(DataError, match=r"notes\.safetensors holds no metadata of copynce"):
        read_checkpoint_metadata(text)
    whole = tmp_path / "model.safetensors"
    save_checkpoint(whole, tiny())
    whole.write_bytes(whole.read_bytes()[:-100])
    for read in (load_checkpoint, read_checkpoint_metadata):
        with pytest.raises(DataError, match=r"model\.safetensors was cut: it has [\d,]+ bytes of at least"):
            read(whole)
    save_file(tiny().encoder.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(DataError, match=r"no descriptor's head and no config of ours: it is a bare backbone"):
        load_checkpoint(tmp_path / "bare.safetensors")
    torch.save({"model": {**tiny().state_dict(), "fusion.norm.weight": torch.zeros(1)}}, whole)
    with pytest.raises(DataError, match=r"no matcher's: it has parts called fusion\.\*"):
        load_checkpoint(whole)


def test_a_config_that_cannot_be_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = tiny().state_dict()
    for text, sentence in (
        ("{", "what copynce stored beside the tensors is no JSON"),
        ("[1]", "what copynce stored beside the tensors is no JSON object"),
        ('{"model": "sorter"}', "holds a sorter, expected a descriptor or a matcher"),
        ('{"model": ["descriptor"]}', "expected a descriptor"),
        ('{"from_later": 1}', "was written by a newer version: its config has from_later"),
        ('{"dim": 0}', "the model config that it holds is wrong: dim must be at least 1"),
        ('{"dim": "many"}', "the model config that it holds is wrong"),
        ('{"backbone": "vit_of_later"}', "its model cannot be built here: backbone must name"),
        ('{"backbone_options": {"embed_dim": "x"}}', "its model cannot be built here"),
    ):
        save_file(tensors, path, metadata={"copynce.config": text})
        with pytest.raises(DataError, match=rf"model\.safetensors.*{sentence}"):
            load_checkpoint(path)
        with pytest.raises(DataError, match=rf"model\.safetensors.*{sentence}"):
            load_start(tiny(), path)


def spoiled(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tiny().state_dict(), name: value}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "encoder.cls_token",
            torch.full((1, 1, 64), torch.nan),
            r"not finite \(NaN, infinity\): encoder.cls_token \(64 of 64\)",
        ),
        (
            "heads.linear_head.fc1.weight",
            torch.eye(8, 64) / 0,
            r"not finite .*: heads.linear_head.fc1.weight \(512 of 512\)",
        ),
        (
            "heads.linear_head.fc1.weight",
            torch.full((8, 64), 1e300, dtype=torch.float64),
            r"not finite .*heads.linear_head.fc1.weight",
        ),
        ("encoder.cls_token", torch.ones(1, 1, 64, dtype=torch.int8), "no floats: encoder.cls_token int8"),
        ("encoder.cls_token", torch.ones(1, 1, 64, dtype=torch.bool), "no floats: encoder.cls_token bool"),
        ("encoder.cls_token", torch.ones(1, 1, 64, dtype=torch.complex64), "no floats: encoder.cls_token complex64"),
        ("encoder.cls_token", torch.ones(1, 1, 64).to_sparse(), "no floats: encoder.cls_token sparse_coo"),
    ],
)
def test_weights_that_are_no_finite_floats_are_refused(
    tmp_path: Path, name: str, value: torch.Tensor, sentence: str
) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": spoiled(name, value)}, path)
    model = tiny()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for load in (lambda: load_checkpoint(path, num_heads=1), lambda: load_start(model, path)):
        with pytest.raises(DataError, match=rf"model\.pth holds weights that are {sentence}"):
            load()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("encoder.blocks.1.attn.qkv.weight", torch.zeros(192, 64), "weights that are all zero, .*: encoder.blocks.1"),
        ("heads.linear_head.bn.running_var", torch.full((8,), -1.0), "negative variances: heads.linear_head.bn"),
    ],
)
def test_values_that_no_training_leaves_are_refused(
    tmp_path: Path, name: str, value: torch.Tensor, sentence: str
) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": spoiled(name, value)}, path)
    for load in (lambda: load_checkpoint(path, num_heads=1), lambda: load_start(tiny(), path)):
        with pytest.raises(DataError, match=rf"model\.pth holds {sentence}"):
            load()


def test_a_card_tells_the_whole_line_of_starts(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    torch.save(tiny().encoder.state_dict(), tmp_path / "backbone.pth")
    save_checkpoint(first, tiny(), {"step": 3, "start": start_card(tmp_path / "backbone.pth")})
    save_checkpoint(second, tiny(), {"step": 5, "trained_on": "pictures.csv", "start": start_card(first)})
    card = read_checkpoint_metadata(second)
    assert (card["step"], card["trained_on"]) == (5, "pictures.csv")
    assert card["start"]["file"] == "first.safetensors"
    assert card["start"]["sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert card["start"]["card"]["step"] == 3
    digest = hashlib.sha256((tmp_path / "backbone.pth").read_bytes()).hexdigest()
    assert card["start"]["card"]["start"] == {"file": "backbone.pth", "sha256": digest}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.pth"
    model = tiny()
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}  # the counter of BatchNorm too
    torch.save({"model": state}, path)
    loaded = load_checkpoint(path, num_heads=1)
    assert loaded.state_dict()["heads.linear_head.bn.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(loaded.encoder.cls_token, state["encoder.cls_token"].float())
    name = str(dtype).removeprefix("torch.")
    assert f"its {name} weights are converted to float32" in load_start(tiny(), path)


def test_a_full_disk_is_told_with_the_path_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tiny(), {"epoch": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the system refuses more, as a full disk does
    try:
        with pytest.raises(
            WriteError, match=r"model\.safetensors could not be written: File too large; free some space"
        ):
            save_checkpoint(path, tiny(), {"epoch": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint_metadata(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A timm transformer with LayerScale, final norm and classifier, on an 8 x 8 grid."""
    torch.manual_seed(5)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=64, num_classes=3, **TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path / "backbone.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_backbone_of_another_size_equals_timms_own_loading(backbone: Path) -> None:
    name = "vit_small_patch14_dinov2"
    model = build_descriptor(name, img_size=32, head="cls", backbone_options=TINY)
    assert load_backbone(model, backbone) == ["head.bias", "head.weight"]
    own = timm.create_model(
        name, img_size=32, num_classes=3, pretrained=True, pretrained_cfg_overlay={"file": str(backbone)}, **TINY
    )
    own.reset_classifier(0)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(own.eval()(images), dim=-1)
        descriptor, _ = model.eval()(images)
    torch.testing.assert_close(descriptor, expected)


def test_backbone_under_the_released_head(backbone: Path) -> None:
    settings = {"img_size": 64, "dim": 8, "backbone_options": TINY}
    model = build_descriptor("vit_small_patch14_dinov2", weights=backbone, **settings)
    assert load_backbone(model, backbone) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    stored = load_file(backbone)
    assert torch.equal(model.encoder.blocks[1].ls2.gamma, stored["blocks.1.ls2.gamma"])
    assert torch.equal(model.encoder.pos_embed, stored["pos_embed"])


def test_backbone_of_a_descriptors_checkpoint(tmp_path: Path) -> None:
    first, second = tiny(), tiny(dim=4)
    save_checkpoint(tmp_path / "model.safetensors", first)
    left = load_backbone(second, tmp_path / "model.safetensors")
    assert left
    assert all(name.startswith("heads.linear_head.") for name in left)
    torch.testing.assert_close(outputs(second)[1], outputs(first)[1], rtol=0, atol=0)


def test_backbone_that_does_not_fit(backbone: Path) -> None:
    with pytest.raises(DataError, match=r"unexpected: .*ls1\.gamma"):
        load_backbone(tiny(), backbone)
    with pytest.raises(DataError, match=r"its encoder has depth 2 instead of 3; choose model\.backbone"):
        build_descriptor(
            "vit_small_patch14_dinov2", img_size=32, backbone_options={**TINY, "depth": 3}, weights=backbone
        )


def test_position_embedding_grows_as_the_released_models(oracle: Path) -> None:
    arrays = np.load(oracle / "features.npz")
    grown = resample_position(torch.from_numpy(arrays["pos_embed_14"]).float(), 14, 21, 1)
    np.testing.assert_allclose(grown, arrays["pos_embed_21"], atol=1e-5)
