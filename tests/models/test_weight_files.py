"""Whatever a person gives as weights: tensors, or one sentence that names the file, what it is, and the way out."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pathlib
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor, nn

from copynce.errors import DataError, RunError
from copynce.models import build_descriptor, load_checkpoint, load_start
from copynce.models.weight_files import read_weights

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Hostile:
    """An object whose unpickling would write a file."""

    def __init__(self, target: Path, call: Callable[..., object]) -> None:
        self.target, self.call = target, call

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        arguments = (f"touch {self.target}",) if self.call is os.system else (f"open({str(self.target)!r}, 'w')",)
        return self.call, arguments


def torch_bytes(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def bytes_of(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zip_bytes(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes.txt", "x")


def tar_bytes(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))


def picture(form: str) -> bytes:
    return bytes_of(lambda buffer: Image.new("RGB", (8, 8)).save(buffer, form))


OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty; expected safetensors or a file of torch.save: copy or download it again"),
    "LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 88264232\n",
        "is a Git LFS pointer instead of the weights; .* `git lfs pull`",
    ),
    "HTML page": (
        lambda: b"\n<!DOCTYPE html><html>Virus scan warning</html>",
        "is an HTML page; .*download the file itself, not the page",
    ),
    "XML": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML text"),
    "JSON": (lambda: b'{"weight_map": {}}', "is a JSON text, settings or an index; .*name the weights file itself"),
    "PNG": (lambda: picture("PNG"), "is a picture"),
    "JPEG": (lambda: picture("JPEG"), "is a picture"),
    "BMP": (lambda: picture("BMP"), "is a picture"),
    "WebP": (lambda: picture("WEBP"), "is a picture"),
    "gzip": (lambda: gzip.compress(torch_bytes(TENSORS)), "is a compressed archive; .*unpack it"),
    "tar": (lambda: bytes_of(tar_bytes), "is a tar archive; .*unpack it and name the weights file in it"),
    "ONNX": (lambda: b"\x08\x08\x12\x07pytorch\x1a\x032.0", "is an ONNX model"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
    "npy": (lambda: bytes_of(lambda buffer: np.save(buffer, np.ones(3))), "is a NumPy array"),
    "npz": (lambda: bytes_of(lambda buffer: np.savez(buffer, a=np.ones(3))), r"is an \.npz of NumPy arrays"),
    "zip": (lambda: bytes_of(zip_bytes), "is a zip archive, not of torch.save"),
    "bare pickle": (lambda: pickle.dumps({"a": 1}), "is a bare pickle, not of torch.save"),
    "zeros": (lambda: bytes(4096), "is zero bytes at its begin, so it was cut"),
    "text": (lambda: b"not a model", "holds no weights, it begins with 'not a model'"),
    "noise": (
        lambda: b"\x03\x9f\xe1\x00\x17\xfe\x88\x01\x99",
        "holds no weights, it begins with 03 9f e1 00 17 fe 88 01",
    ),
    "list": (lambda: torch_bytes([1, 2]), "holds no tensors by name but a list; expected a state dict"),
    "no tensors": (lambda: torch_bytes({"epoch": 3}), "holds no tensors by name but the keys epoch"),
    "empty dictionary": (lambda: torch_bytes({}), "holds no tensors by name but an empty dictionary"),
    "one record": (lambda: torch_bytes(argparse.Namespace(lr=1)), "holds no tensors by name but another object"),
    "one tensor": (lambda: torch_bytes(torch.ones(3)), "holds no tensors by name but a Tensor"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_holds_no_weights_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    make, sentence = OTHERS[kind]
    for name in ("model.safetensors", "model.pth"):  # what counts is the content
        path = tmp_path / name
        path.write_bytes(make())
        with pytest.raises(DataError, match=rf"{name} {sentence}") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
        with pytest.raises(DataError, match=name):
            load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_torchscript_is_refused_with_the_way_to_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(DataError, match=r"is a TorchScript program; .*torch\.jit\.load\(FILE\)\.state_dict\(\)"):
        read_weights(path)


def test_folders_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no such file or folder$"):
        read_weights(tmp_path / "no folder" / "model.pth")
    (tmp_path / "modell.pth").write_bytes(torch_bytes(TENSORS))
    with pytest.raises(DataError, match=r"there is no such file or folder; near names: modell\.pth"):
        read_weights(tmp_path / "model.pth")
    with pytest.raises(RunError, match=r"expected a run folder.*; name one of its files: modell\.pth"):
        read_weights(tmp_path)
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(DataError, match=r"cannot be read: File name too long|there is no such file"):
            read_weights(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is no regular file"):
        read_weights(tmp_path / "pipe")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [os.system, eval])
def test_code_in_a_pickle_is_named_and_does_not_run(tmp_path: Path, zipped: bool, call: Callable[..., object]) -> None:
    target = tmp_path / "was-run"
    content = {"model": TENSORS, "note": Hostile(target, call)}
    path = tmp_path / "model.pth"
    path.write_bytes(torch_bytes(content, zipped=zipped))
    name = r"posix\.system" if call is os.system else r"builtins\.eval"
    with pytest.raises(DataError, match=rf"Python objects that only running code could make \({name}\), which copynce"):
        read_weights(path)
    assert not target.exists()
    pickle.loads(pickle.dumps(content))  # what an unpickler would have done
    assert target.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_refused_with_the_way_to_its_weights(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pth"
    for module, name in (
        (build_descriptor(img_size=32, backbone_options={"embed_dim": 24, "depth": 1}), "copynce.models.descriptor."),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ):
        path.write_bytes(torch_bytes(module, zipped=zipped))
        with pytest.raises(DataError, match=rf"could make \({name}.*torch\.save\(model\.state_dict\(\), FILE\)"):
            read_weights(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_beside_the_tensors_are_passed_over(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    beside = {
        "args": argparse.Namespace(arch="vit_small", out=pathlib.Path("x"), nested=argparse.Namespace(lr=1.0)),
        "loss": np.float64(0.5),
        "history": np.ones(3),
        "seen": {"a", "b"},
        "frozen": frozenset([1]),
        "epoch": 3,
    }
    path.write_bytes(torch_bytes({"teacher": TENSORS, **beside}, zipped=zipped))
    found = read_weights(path).tensors
    assert list(found) == ["teacher.a.weight", "teacher.a.bias"]
    assert torch.equal(found["teacher.a.weight"], TENSORS["a.weight"])


def test_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, object] = dict(TENSORS)
    content["again"] = content
    (tmp_path / "model.pth").write_bytes(torch_bytes(content))
    assert list(read_weights(tmp_path / "model.pth").tensors) == list(TENSORS)


def test_a_file_larger_than_memory_costs_none(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 2**42  # 4 TiB, of which the disk holds the header alone
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(DataError, match=r"was cut: it has \d+ bytes of at least 4,398,046,511,1"):
        read_weights(path)
    os.truncate(path, 8 + len(header) + size)
    try:
        assert read_weights(path).tensors["x"].shape == (size // 4,)  # a view of the file
    except DataError as error:  # where the system promises no more memory than it has
        assert "needs more memory than this machine gives: the file has 4096.0 GiB" in str(error)  # noqa: PT017


WHOLE = {
    "safetensors": save(TENSORS),
    "safetensors of ours": save(TENSORS, metadata={"copynce.config": "{}"}),
    "zip": torch_bytes({"model": TENSORS, "epoch": 3}),
    "legacy": torch_bytes({"model": TENSORS, "epoch": 3}, zipped=False),
    "zip with settings": torch_bytes({"model": TENSORS, "args": argparse.Namespace(lr=1.0)}),
    "legacy with settings": torch_bytes({"model": TENSORS, "args": argparse.Namespace(lr=1.0)}, zipped=False),
}


@pytest.mark.parametrize("kind", WHOLE)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_was_cut_anywhere_is_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    whole = WHOLE[kind]
    path = tmp_path / "model.bin"
    path.write_bytes(whole)
    assert len(read_weights(path).tensors) == 2
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DataError, match=r"model\.bin") as caught:
        read_weights(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("kind", WHOLE)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_other_bytes_gives_tensors_or_is_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    try:
        found = read_weights(path).tensors
    except DataError as error:
        assert "model.bin" in str(error)  # noqa: PT017 - bytes that do not matter are no error
    else:
        assert all(isinstance(tensor, Tensor) for tensor in found.values())


def test_a_folder_of_ours_means_its_newest_weights(tmp_path: Path) -> None:
    for step in (2, 10):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file({"step": torch.tensor([float(step)])}, folder / "model.safetensors")
    (tmp_path / "run" / "checkpoints" / "step-00000011").mkdir()  # begun, not written
    assert read_weights(tmp_path / "run").tensors["step"] == 10
    assert read_weights(tmp_path / "run" / "checkpoints" / "step-00000002").tensors["step"] == 2
    with pytest.raises(DataError, match="holds no vision transformer with timm's names: it has step, expected"):
        load_start(build_descriptor(img_size=32), tmp_path / "run")
