"""A model as a folder with a config and a card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from copynce.errors import ConfigError, DataError
from copynce.models import (
    Descriptor,
    Matcher,
    build_descriptor,
    build_matcher,
    convert,
    load_checkpoint,
    load_descriptor,
    save_checkpoint,
)

TINY = {"embed_dim": 24, "num_heads": 2, "patch_size": 8}


def descriptor() -> Descriptor:
    return build_descriptor(img_size=32, dim=8, backbone_options={**TINY, "depth": 1})


def test_folders_come_back(tmp_path: Path) -> None:
    matcher = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=1, backbone_options=TINY)
    for made in (descriptor(), matcher):
        folder = tmp_path / type(made).__name__
        made.save_pretrained(folder, {"step": 3})
        assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        again = type(made).from_pretrained(folder)
        assert again.config == made.config
        assert not again.training
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())
        assert type(load_checkpoint(folder)) is type(made)
    with pytest.raises(DataError, match="holds a matcher, expected a descriptor"):
        Descriptor.from_pretrained(tmp_path / "Matcher")
    with pytest.raises(DataError, match="holds a descriptor, expected a matcher"):
        Matcher.from_pretrained(tmp_path / "Descriptor")
    with pytest.raises(DataError, match="is a file, expected a folder"):
        matcher.save_pretrained(tmp_path / "Matcher" / "config.json")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"README.md": "mine"}, r"holds other things than a model of copynce \(README\.md, \.\.\.\)"),
        ({"model.safetensors": "", "config.json": "{"}, "holds other things"),
        ({"model.safetensors": "", "config.json": '{"model_type": "of another library"}'}, "holds other things"),
        ({"config.json": '{"library_name": "copynce"}', "notes.txt": ""}, "holds other things"),
        ({"config.yaml": "out: run"}, r"is a run \(it has config\.yaml\), .*; choose a new folder"),
        ({"model.safetensors": "", "config.json": '{"library_name": "copynce"}', "checkpoints": ""}, "is a run"),
    ],
)
def test_what_is_no_models_folder_is_left_alone(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        descriptor().save_pretrained(folder)
    save_checkpoint(tmp_path / "a.safetensors", descriptor())
    with pytest.raises(ConfigError, match=sentence):
        convert(tmp_path / "a.safetensors", folder)
    assert {file.name: file.read_text() for file in folder.iterdir()} == files


def test_a_models_folder_is_written_anew(tmp_path: Path) -> None:
    descriptor().save_pretrained(tmp_path)
    (tmp_path / "notes.txt").touch()
    for lost in ((), ("notes.txt", "README.md", "model.safetensors")):  # the second: writing was cut short
        for name in lost:
            (tmp_path / name).unlink()
        made = descriptor()
        made.save_pretrained(tmp_path)
        assert torch.equal(load_descriptor(tmp_path).encoder.cls_token, made.encoder.cls_token)


def test_a_card_tells_what_is_known(tmp_path: Path) -> None:
    start = {"file": "second.safetensors", "card": {"start": {"file": "dino.pth"}}}
    metadata = {"step": 30, "trained_on": "train.csv", "start": start, "uap": 0.70512, "license": "mit"}
    descriptor().save_pretrained(tmp_path, metadata)
    card = (tmp_path / "README.md").read_text()
    for line in (
        'license: "mit"',
        "library_name: copynce",
        "# An image copy descriptor",
        "- input: RGB, 32 x 32 px, ImageNet's mean and deviation",
        "- patches: 4 x 4 of 8 px, tokens of 24 channels",
        "- trained on: train.csv",
        "- started from: `second.safetensors`, which started from `dino.pth`",
        "| uAP | 0.7051 |",
    ):
        assert line in card.splitlines()
    descriptor().save_pretrained(tmp_path / "bare")
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "Nothing was noted." in card
    assert "license" not in card
    assert "## Figures" not in card


def test_config_and_weights_belong_together(tmp_path: Path) -> None:
    descriptor().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_eps": 1e-6}))
    with pytest.raises(DataError, match=r"config\.json is not that of the weights beside it: it has norm_eps 1e-06"):
        load_descriptor(tmp_path)
    # Weights that another tool has written anew have lost their settings.
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert load_descriptor(tmp_path).config.norm_eps == 1e-6
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json.* is no JSON"):
        load_descriptor(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "of another library"}')
    with pytest.raises(DataError, match=r"does not tell how many attention heads"):
        load_descriptor(tmp_path)
