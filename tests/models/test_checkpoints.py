from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from copynce.data import DataError
from copynce.models import (
    Descriptor,
    DescriptorConfig,
    build_descriptor,
    load_backbone,
    load_checkpoint,
    read_checkpoint_metadata,
    save_checkpoint,
)
from copynce.models.checkpoints import _resample_position

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
    for loaded in (load_checkpoint(path), load_checkpoint(path, model.config)):
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
        load_checkpoint(tmp_path / "plain.pth")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    text = tmp_path / "notes.safetensors"
    text.write_text("not a model")
    with pytest.raises(DataError, match=r"notes\.safetensors is neither safetensors nor a torch file"):
        load_checkpoint(text)
    with pytest.raises(DataError, match="is not a safetensors file"):
        read_checkpoint_metadata(text)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(DataError, match=r"empty\.pth is neither"):
        load_checkpoint(tmp_path / "empty.pth")
    whole = tmp_path / "model.safetensors"
    save_checkpoint(whole, tiny())
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_checkpoint(whole)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(DataError, match="holds no model config: it is a bare backbone"):
        load_checkpoint(tmp_path / "bare.safetensors")
    torch.save({"model": {"encoder.pos_embed": torch.zeros(1), "fusion.norm.weight": torch.zeros(1)}}, whole)
    with pytest.raises(DataError, match="holds a matcher"):
        load_checkpoint(whole)
    torch.save({"epoch": 3}, whole)
    with pytest.raises(DataError, match="must hold a state dict"):
        load_checkpoint(whole)
    torch.save({"model": Descriptor}, whole)  # needs unpickling of a class: refused
    with pytest.raises(DataError, match="neither safetensors nor a torch file of tensors"):
        load_checkpoint(whole)


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
    assert load_backbone(second, tmp_path / "model.safetensors") == []
    torch.testing.assert_close(outputs(second)[1], outputs(first)[1], rtol=0, atol=0)


def test_backbone_that_does_not_fit(backbone: Path) -> None:
    with pytest.raises(DataError, match=r"unexpected: .*ls1\.gamma"):
        load_backbone(tiny(), backbone)
    with pytest.raises(DataError, match=r"missing: blocks\.2\."):
        build_descriptor(
            "vit_small_patch14_dinov2", img_size=32, backbone_options={**TINY, "depth": 3}, weights=backbone
        )


def test_position_embedding_grows_as_the_released_models(oracle: Path) -> None:
    arrays = np.load(oracle / "features.npz")
    grown = _resample_position(torch.from_numpy(arrays["pos_embed_14"]).float(), 21, 1, Path("x"))
    np.testing.assert_allclose(grown, arrays["pos_embed_21"], atol=1e-5)
    with pytest.raises(DataError, match="no square grid"):
        _resample_position(torch.zeros(1, 8, 4), 3, 1, Path("x"))
