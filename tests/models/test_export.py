"""Models as programs: they compute what the model does, for any number of pictures, or are not written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from copynce.errors import ConfigError, ExportError
from copynce.models import Descriptor, Matcher, build_descriptor, build_matcher, convert, save_checkpoint
from copynce.models.export import export

TINY = {"embed_dim": 24, "num_heads": 3}


def descriptor() -> Descriptor:
    return build_descriptor(img_size=32, dim=8, backbone_options={**TINY, "depth": 2}).eval()


def matcher() -> Matcher:
    return build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=1, backbone_options=TINY).eval()


def test_a_descriptors_program(tmp_path: Path) -> None:
    model = descriptor()
    save_checkpoint(tmp_path / "a.safetensors", model)
    said = convert(tmp_path / "a.safetensors", tmp_path / "a.pt2", part="tokens").said
    assert said[-1].startswith("largest difference from the model: ")
    texts = {"copynce.config": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=texts).module()
    assert json.loads(texts["copynce.config"])["model"] == "descriptor"
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(model(images), program(images), strict=True):
            torch.testing.assert_close(theirs, ours)


def test_a_matchers_halves(tmp_path: Path) -> None:
    model = matcher().train()
    export(model, tmp_path / "fuse.pt2", "fuse")
    assert model.training  # as it was
    model.eval()
    program = torch.export.load(tmp_path / "fuse.pt2").module()
    query, reference = torch.randn(3, 5, 24), torch.randn(3, 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(program(query, reference), model.fuse(query, reference))


def test_onnx(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model = matcher()
    assert export(model, tmp_path / "pair.onnx") < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "pair.onnx", providers=["CPUExecutionProvider"])
    query, reference = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    (logits,) = session.run(["logits"], {"query": query.numpy(), "reference": reference.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(query, reference), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_exported_is_told_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ExportError, match=r"a\.pt2 is not written: the program differs from the model by .*, at most -1"
    ):
        export(matcher(), tmp_path / "a.pt2", "encode", tolerance=-1)
    with pytest.raises(ConfigError, match="part of a matcher must be one of pair, encode, fuse, got tokens"):
        export(matcher(), tmp_path / "a.pt2", "tokens")
    with pytest.raises(ConfigError, match=r"must end in \.onnx or \.pt2"):
        export(matcher(), tmp_path / "a.pt")
    save_checkpoint(tmp_path / "m.safetensors", matcher())
    with pytest.raises(ConfigError, match="part=fuse is that of a program"):
        convert(tmp_path / "m.safetensors", tmp_path / "folder", part="fuse")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"ONNX needs .*onnxscript.*pip install 'copynce\[export\]'"):
        export(matcher(), tmp_path / "a.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
