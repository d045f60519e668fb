"""Models in files: our checkpoints, and the method's released `.pth.tar`.

Ours are safetensors files whose metadata holds two JSON texts: `copynce.config`, from which the model is rebuilt, and
`copynce.metadata`, whatever the writer noted (epoch, commit, scores). The tensors have the released names. A file is
taken whole here, or as a start (`copynce.models.starts`); what does not fit ends it with an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save

from copynce.errors import DataError
from copynce.files import file_sha256, whole_file
from copynce.models.descriptor import Descriptor
from copynce.models.eight_bits import quantized
from copynce.models.kinds import KINDS, AnyModel, build_model, kind_of, released_kind
from copynce.models.matcher import Matcher
from copynce.models.names import LOG_SCALE, find_encoder
from copynce.models.settings import BackboneConfig
from copynce.models.strict import load_strictly
from copynce.models.weight_files import EIGHT_BITS, SHARED, WeightFile, file_of, read_texts, read_weights

_CONFIG = "copynce.config"
_METADATA = "copynce.metadata"

_M = TypeVar("_M", Descriptor, Matcher)


def save_checkpoint(
    path: str | Path,
    model: AnyModel,
    metadata: Mapping[str, Any] | None = None,
    *,
    eight_bits: bool = False,
    shares: str | Path | None = None,
) -> None:
    """Write a model as safetensors; the file appears whole or not at all.

    metadata: the model's card, anything JSON can hold, such as `step`, `commit`, `trained_on`, and `start` as
    `start_card` tells it; `read_checkpoint_metadata` returns it. eight_bits: matrices at 8 bits a number, a
    quarter of the size (`copynce.models.eight_bits`). shares: a file beside it; tensors that are the same there, under
    the same name, are left out and read from it: a matcher with a descriptor's blocks. Raises TypeError if JSON cannot,
    WriteError if the disk takes no file, ValueError for a `shares` that is not beside it.
    """
    path = Path(path)
    texts = {
        "format": "pt",
        _CONFIG: json.dumps(stored_config(model)),
        _METADATA: json.dumps(dict(metadata or {})),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if shares is not None:
        other = file_of(shares)
        if other.absolute().parent != path.absolute().parent:
            raise ValueError(f"shares must be a file beside {path}, got {other}")
        there = read_weights(other).tensors
        same = sorted(name for name, tensor in tensors.items() if name in there and torch.equal(tensor, there[name]))
        tensors = {name: tensor for name, tensor in tensors.items() if name not in same}
        texts[SHARED] = json.dumps({"file": other.name, "sha256": file_sha256(other), "tensors": same})
    if eight_bits:
        tensors = quantized(tensors)
        texts[EIGHT_BITS] = "rows"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(save(tensors, metadata=texts))


def stored_config(model: AnyModel) -> dict[str, Any]:
    """What a file says of a model's settings: its kind, `model`, and the fields of its config."""
    return {"model": kind_of(model).name, **model.config.to_dict()}


def read_checkpoint_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_checkpoint` stored. Raises DataError if the file is none of ours."""
    texts = read_texts(path)
    if _METADATA not in texts:
        raise DataError(f"{path} holds no metadata of copynce")
    return _json_object(texts[_METADATA], file_of(path))


def start_card(path: str | Path) -> dict[str, Any]:
    """What a model's card tells of the file that it started from: its `file` name, `sha256`, and, if the file is one
    of ours, its own `card`, which tells what that started from. Raises DataError or RunError if there is no such file.
    """
    path = file_of(path)
    card: dict[str, Any] = {"file": path.name, "sha256": file_sha256(path)}
    texts = read_texts(path)
    if _METADATA in texts:
        card["card"] = _json_object(texts[_METADATA], path)
    return card


def load_checkpoint(
    path: str | Path, config: BackboneConfig | None = None, *, num_heads: int | None = None
) -> AnyModel:
    """A descriptor or a matcher rebuilt from a file, in evaluation mode on the CPU.

    path: a file of `save_checkpoint`, `default` or another box (its descriptor), a folder of `save_pretrained`, a
    checkpoint folder or a run of ours (its newest), or a released `.pth.tar` (`{"model": state dict, "epoch": int}`;
    any prefix and the loss's `infonce_log_scale` are dropped).
    config, num_heads: only for released files, which hold no config. Without config, width, depth, patch and picture
    size are read off the tensors; the number of attention heads is not in them: it is `num_heads`, or 64 channels a
    head for the widths of known models (192, 384, 768, 1024).
    Raises DataError if the file is unreadable, does not fit, does not tell its heads, or holds values that are no
    finite floats; ConfigError for `num_heads` that do not divide the width; RunError if a folder holds no checkpoint.
    """
    file = read_weights(path)
    found = find_encoder(file)
    found.tensors.pop(LOG_SCALE, None)
    own = own_config(file)
    if own is not None:
        model = build_from(own, file.path)
    else:
        model = build_model(config or released_kind(found).released(found, file.path, num_heads))
        # Fine-tuned without CopyNCE, a released matcher has lost the head that only CopyNCE asks.
        kept = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("heads.fusion_head.")}
        if not kept.keys() & found.tensors.keys():
            found.tensors.update(kept)
    load_strictly(model, found.tensors, file.path)
    return model.eval()


def load_descriptor(path: str | Path, *, num_heads: int | None = None) -> Descriptor:
    """As `load_checkpoint`; DataError for a file that holds another kind of model."""
    return of_kind(Descriptor, load_checkpoint(path, num_heads=num_heads), path)


def load_matcher(path: str | Path, *, num_heads: int | None = None) -> Matcher:
    """As `load_checkpoint`; DataError for a file that holds another kind of model."""
    return of_kind(Matcher, load_checkpoint(path, num_heads=num_heads), path)


def of_kind(kind: type[_M], model: AnyModel, path: str | Path) -> _M:
    """`model`, which came out of `path`; DataError if it is of another kind."""
    if not isinstance(model, kind):
        raise DataError(f"{path} holds a {kind_of(model).name}, expected a {kind.__name__.lower()}")
    return model


def build_from(config: BackboneConfig, path: Path) -> AnyModel:
    """The model of a config that came out of a file, and so may hold anything."""
    try:
        return build_model(config)
    except Exception as error:
        raise DataError(f"{path}: its model cannot be built here: {error}") from error


def own_config(file: WeightFile) -> BackboneConfig | None:
    """The config in a file of `save_checkpoint`, or in `config.json` beside one that has lost it, if there is any.

    Raises DataError if both are there and differ.
    """
    beside = _config_beside(file.path)
    if _CONFIG in file.texts:
        settings = _json_object(file.texts[_CONFIG], file.path)
        if beside is not None and beside != settings:
            differ = [name for name in settings | beside if settings.get(name) != beside.get(name)]
            listed = ", ".join(f"{name} {beside.get(name)} instead of {settings.get(name)}" for name in differ)
            raise DataError(
                f"{file.path.with_name('config.json')} is not that of the weights beside it: it has {listed}; remove "
                "it, or put theirs there"
            )
    elif beside is not None:
        settings = beside
    else:
        return None
    name = settings.pop("model", "descriptor")
    if not isinstance(name, str) or name not in KINDS:
        raise DataError(f"{file.path} holds a {name}, expected a {' or a '.join(KINDS)}")
    kind = KINDS[name].config
    unknown = settings.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise DataError(f"{file.path} was written by a newer version: its config has {', '.join(sorted(unknown))}")
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file.path}: the model config that it holds is wrong: {error}") from error


def _config_beside(path: Path) -> dict[str, Any] | None:
    """What `config.json` beside a `model.safetensors` says, if it is ours."""
    place = path.with_name("config.json")
    if path.name != "model.safetensors" or not place.is_file():
        return None
    try:
        settings = _json_object(place.read_text(encoding="utf-8"), place)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place} cannot be read: {error}") from error
    return settings if settings.pop("library_name", None) == "copynce" else None


def _json_object(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: what copynce stored beside the tensors is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: what copynce stored beside the tensors is no JSON object: {text[:40]}")
    return found
