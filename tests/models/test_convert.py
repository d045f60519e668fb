"""Files of models in other forms: nothing of a model is lost, and what went where is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from copynce.cli import main
from copynce.errors import ConfigError, DataError
from copynce.models import (
    Descriptor,
    Matcher,
    build_descriptor,
    build_matcher,
    convert,
    load_checkpoint,
    load_descriptor,
    load_start,
    read_checkpoint_metadata,
    save_checkpoint,
)

KNOWN = {"embed_dim": 192, "num_heads": 3, "patch_size": 16, "mlp_ratio": 0.5}  # a width whose heads are known


def model(kind: str, **settings: object) -> Descriptor | Matcher:
    torch.manual_seed(7)
    if kind == "descriptor":
        made: Descriptor | Matcher = build_descriptor(
            **{"img_size": 32, "dim": 8, "backbone_options": {**KNOWN, "depth": 3}, **settings}
        )
    else:
        options = {"encoder_blocks": 2, "fusion_blocks": 1, "backbone_options": KNOWN}
        made = build_matcher(**{"img_size": 32, **options, **settings})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def released(folder: Path, kind: str) -> tuple[Path, dict[str, Tensor]]:
    state = model(kind).state_dict()
    if kind == "descriptor":
        state["infonce_log_scale"] = torch.tensor(3.2)
    path = folder / f"{kind}.pth.tar"
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 29}, path)
    return path, state


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("kind", ["descriptor", "matcher"])
def test_there_and_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    path, state = released(tmp_path, kind)
    done = convert(path, tmp_path / "ours.safetensors")
    ours = {name: value for name, value in state.items() if name != "infonce_log_scale"}
    assert same(load_file(tmp_path / "ours.safetensors"), ours)
    assert [" ".join(line.split()) for line in done.moved if "blocks" in line] == [
        f"model.module.encoder.blocks.0-{2 if kind == 'descriptor' else 1} -> "
        f"encoder.blocks.0-{2 if kind == 'descriptor' else 1}",
        *(["model.module.fusion.blocks.0 -> fusion.blocks.0"] if kind == "matcher" else []),
    ]
    assert "beside it: epoch 29" in done.said
    metadata = read_checkpoint_metadata(tmp_path / "ours.safetensors")
    assert metadata["converted_from"]["file"] == path.name
    convert(tmp_path / "ours.safetensors", tmp_path / "folder")
    assert read_checkpoint_metadata(tmp_path / "folder") == metadata
    done = convert(tmp_path / "folder", tmp_path / "again.pth.tar")
    again = torch.load(tmp_path / "again.pth.tar", weights_only=True)
    assert again.keys() == {"model", "epoch"}
    assert again["epoch"] == 29
    assert same(again["model"], state)
    assert done.said[-1] == "the released form has no place for what was noted: converted_from"


def test_what_the_released_form_does_not_tell(tmp_path: Path) -> None:
    options = {"embed_dim": 24, "num_heads": 2, "depth": 1, "patch_size": 8}
    made = model("descriptor", norm_eps=1e-6, tokens_block=0, backbone_options=options)
    save_checkpoint(tmp_path / "a.safetensors", made)
    said = convert(tmp_path / "a.safetensors", tmp_path / "a.pth.tar").said
    assert any("does not tell its 2 attention heads: whoever reads it must give them" in line for line in said)
    assert any("norm_eps 1e-06, which is read back as 0.0001" in line for line in said)
    again = convert(tmp_path / "a.pth.tar", tmp_path / "b.safetensors", num_heads=2)
    assert same(load_file(tmp_path / "b.safetensors"), made.state_dict())
    assert "heads.linear_head.bn" in " ".join(again.moved)
    made = model("descriptor", backbone="vit_small_patch14_dinov2", backbone_options={**KNOWN, "depth": 1})
    save_checkpoint(tmp_path / "a.safetensors", made)
    with pytest.raises(DataError, match=r"the released code has no such model, .*encoder\.blocks\.0\.ls1\.gamma"):
        convert(tmp_path / "a.safetensors", tmp_path / "c.pth.tar")
    assert not (tmp_path / "c.pth.tar").exists()
    torch.save({"model": model("matcher").half().state_dict()}, tmp_path / "half.pth")
    assert "its float16 weights are converted to float32" in convert(tmp_path / "half.pth", tmp_path / "f").said


def dino(folder: Path, depth: int = 3) -> tuple[Path, dict[str, Tensor]]:
    made = model("descriptor", head="cls", backbone_options={**KNOWN, "depth": depth})
    state = {name.removeprefix("encoder."): value for name, value in made.state_dict().items()}
    path = folder / "dino.pth"
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, path)
    return path, state


def test_a_backbone_becomes_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, state = dino(tmp_path)
    out = tmp_path / "start.safetensors"
    assert main(["convert", str(path), str(out), "--as", "matcher", "img_size=48", "encoder_blocks=1"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for expected in (
        "teacher.backbone.blocks.0 -> encoder.blocks.0",
        "teacher.backbone.blocks.1-2 -> fusion.blocks.0-1",
        "teacher.backbone.norm -> fusion.norm",
        "teacher.backbone.patch_embed.proj -> encoder.patch_embed.proj",
        "the position embedding is resized from 2 x 2 to 3 x 3 patches",
        "new: heads.cls_head.norm, heads.cls_head.classifier, heads.fusion_head.norm, fusion.cls_token",
        f"written: {out}",
    ):
        assert expected in lines
    loaded = load_checkpoint(out)
    assert isinstance(loaded, Matcher)
    assert (loaded.config.encoder_blocks, loaded.config.fusion_blocks, loaded.img_size) == (1, 2, 48)
    assert torch.equal(loaded.fusion.blocks[1].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"])
    assert read_checkpoint_metadata(out)["start"]["file"] == "dino.pth"
    expected_model = build_matcher(img_size=48, encoder_blocks=1, fusion_blocks=2, backbone_options=KNOWN)
    load_start(expected_model, path)
    assert torch.equal(loaded.encoder.pos_embed, expected_model.encoder.pos_embed)
    # The same command makes the same model, new parts included.
    convert(path, tmp_path / "again.safetensors", "matcher", ["img_size=48", "encoder_blocks=1"])
    assert same(load_file(tmp_path / "again.safetensors"), load_file(out))


@pytest.mark.parametrize(
    ("settings", "split"),
    [([], (2, 1)), (["fusion_blocks=2"], (1, 2)), (["encoder_blocks=2", "fusion_blocks=1"], (2, 1))],
)
def test_blocks_are_divided_as_asked(tmp_path: Path, settings: list[str], split: tuple[int, int]) -> None:
    path, _ = dino(tmp_path)
    convert(path, tmp_path / "a.safetensors", "matcher", settings)
    config = load_checkpoint(tmp_path / "a.safetensors").config
    assert (config.encoder_blocks, config.fusion_blocks) == split


def test_descriptors_start_from_backbones_and_from_each_other(tmp_path: Path) -> None:
    path, _ = dino(tmp_path)
    done = convert(path, tmp_path / "a.safetensors", "descriptor", ["dim=16"])
    assert "left aside: norm" in done.said
    assert "new: heads.linear_head.fc1, heads.linear_head.bn" in done.said
    first = load_descriptor(tmp_path / "a.safetensors")
    assert (first.dim, first.img_size, len(first.encoder.blocks)) == (16, 32, 3)
    done = convert(tmp_path / "a.safetensors", tmp_path / "b", "descriptor", ["img_size=64"])
    second = load_descriptor(tmp_path / "b")
    assert (second.dim, second.img_size) == (16, 64)
    assert torch.equal(first.heads["linear_head"].fc1.weight, second.heads["linear_head"].fc1.weight)
    convert(tmp_path / "b", tmp_path / "c.safetensors", "matcher")
    assert load_checkpoint(tmp_path / "c.safetensors").img_size == 64


def test_a_dinov2_backbone_tells_its_parts(tmp_path: Path) -> None:
    options = {**KNOWN, "depth": 1, "patch_size": 8}
    made = build_descriptor("vit_small_patch14_reg4_dinov2", img_size=32, head="cls", backbone_options=options)
    torch.save(made.encoder.state_dict(), tmp_path / "dinov2.pth")
    convert(tmp_path / "dinov2.pth", tmp_path / "a.safetensors", "descriptor")
    found = load_descriptor(tmp_path / "a.safetensors").encoder
    assert torch.equal(found.reg_token, made.encoder.reg_token)
    assert torch.equal(found.blocks[0].ls1.gamma, made.encoder.blocks[0].ls1.gamma)
    convert(tmp_path / "dinov2.pth", tmp_path / "b.safetensors", "descriptor",
            ["backbone=vit_small_patch14_reg4_dinov2", "backbone_options={embed_dim: 192, num_heads: 3, depth: 1, "
             "patch_size: 8, mlp_ratio: 0.5}"])  # fmt: skip
    assert torch.equal(load_descriptor(tmp_path / "b.safetensors").encoder.pos_embed, found.pos_embed)


def test_heads_are_told_once_and_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"embed_dim": 24, "num_heads": 2, "depth": 1, "patch_size": 8}
    made = model("descriptor", backbone_options=options)
    torch.save(made.state_dict(), tmp_path / "a.pth")
    save_checkpoint(tmp_path / "ours.safetensors", made)
    out = tmp_path / "out.safetensors"
    as_descriptor = ["--as", "descriptor"]
    for arguments, sentence in (
        (["a.pth"], "does not tell how many attention heads"),
        (["a.pth", *as_descriptor], "does not tell how many attention heads"),
        *(
            (["a.pth", "--num-heads", heads, *kind], "must be a positive number that divides the width 24 of the enc")
            for heads in ("-2", "0", "5")
            for kind in ([], as_descriptor)
        ),
        (["a.pth", *as_descriptor, "backbone_options={num_heads: 0}"], "num_heads must be at least 1, got 0"),
        (["a.pth", *as_descriptor, "backbone_options.num_heads=5"], "must be a multiple of num_heads, got 24 and 5"),
        (["a.pth", *as_descriptor, "backbone_options.num_heads=3", "--num-heads", "2"], "or a setting tells 3, got 2"),
        (["ours.safetensors", "--num-heads", "3"], r"ours\.safetensors tells 2, got 3"),
        (["ours.safetensors", "--num-heads", "0", *as_descriptor], "tells 2, got 0"),
    ):
        assert main(["convert", str(tmp_path / arguments[0]), str(out), *arguments[1:]]) == 2
        assert re.search(sentence, capsys.readouterr().err)
        assert not out.exists()
    for arguments in (
        ["ours.safetensors", "--num-heads", "2"],
        ["a.pth", *as_descriptor, "--num-heads", "2"],
        ["a.pth", *as_descriptor, "backbone_options={num_heads: 2}"],
        ["a.pth", *as_descriptor, "backbone_options.num_heads=2"],
    ):
        assert main(["convert", str(tmp_path / arguments[0]), str(out), *arguments[1:]]) == 0
        found = load_descriptor(out)
        assert found.encoder.blocks[0].attn.num_heads == 2
        assert same(found.state_dict(), made.state_dict())


def test_wrong_conversions_are_told_and_write_nothing(tmp_path: Path) -> None:
    path, _ = dino(tmp_path)
    whole, _ = released(tmp_path, "matcher")
    out = tmp_path / "out.safetensors"
    for source, target, kind, settings, sentence in (
        (path, out, None, [], "it is a bare backbone"),
        (path, tmp_path / "out.npz", None, [], r"out\.npz: expected a name that ends in"),
        (whole, out, None, ["img_size=64"], "a model is taken as it is, .*--as descriptor or --as matcher"),
        (whole, out, "descriptor", [], "which is no start for a descriptor"),
        (whole, whole, None, [], r"is the file itself"),
        (path, out, "matcher", ["encoder_block=1"], "did you mean encoder_blocks"),
        (path, out, "matcher", ["img_size=40"], "img_size must be a multiple of the patch size 16"),
        (path, out, "matcher", ["encoder_blocks=3"], "fusion_blocks 0 instead of 1"),
        (path, out, "descriptor", ["backbone_options.depth=2"], "its encoder has depth 3 instead of 2"),
    ):
        with pytest.raises((ConfigError, DataError), match=sentence):
            convert(source, target, kind, settings)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dino.pth", "matcher.pth.tar"]


@pytest.mark.parametrize("kind", ["descriptor", "matcher"])
def test_a_matchers_and_a_descriptors_faults_are_listed(tmp_path: Path, kind: str) -> None:
    path, state = released(tmp_path, kind)
    lost = "heads.cls_head.norm.bias" if kind == "matcher" else "heads.linear_head.bn.bias"
    state.pop(lost)
    state["encoder.blocks.0.norm1.weight"] = torch.ones(5)
    torch.save({"model": {**state, "heads.more": torch.ones(1)}}, path)
    with pytest.raises(DataError) as error:
        convert(path, tmp_path / "a.safetensors")
    for part in (f"missing: {lost}", "unexpected: heads.more", "encoder.blocks.0.norm1.weight [5] instead of [192]"):
        assert part in str(error.value)
    torch.save(model(kind), path)
    with pytest.raises(DataError, match=r"a pickle with Python objects .*torch\.save\(model\.state_dict\(\), FILE\)"):
        convert(path, tmp_path / "a.safetensors")
