"""Weights in files: our checkpoints, timm-named backbones, and the method's released `.pth.tar`.

Ours are safetensors files whose metadata holds two JSON texts: `copynce.config`, from which the model is rebuilt, and
`copynce.metadata`, whatever the writer noted (epoch, commit, scores). The tensors have the released names. Every load
is strict: names that are missing, unexpected or of another shape end it with an error that lists them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from copynce.data import DataError
from copynce.models.descriptor import Descriptor, DescriptorConfig

_CONFIG = "copynce.config"
_METADATA = "copynce.metadata"
_RELEASED_HEAD_WIDTH = 64  # channels of one attention head in every released model; a state dict does not tell


def save_checkpoint(path: str | Path, model: Descriptor, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a descriptor as safetensors; the file appears whole or not at all.

    metadata: anything JSON can hold; `read_checkpoint_metadata` returns it. Raises TypeError if JSON cannot.
    """
    path = Path(path)
    texts = {
        "format": "pt",
        _CONFIG: json.dumps({"model": "descriptor", **model.config.to_dict()}),
        _METADATA: json.dumps(dict(metadata or {})),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(save(tensors, metadata=texts))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_checkpoint` stored. Raises DataError if the file is none of ours."""
    return json.loads(_header(Path(path)).get(_METADATA, "{}"))


def load_checkpoint(path: str | Path, config: DescriptorConfig | None = None) -> Descriptor:
    """A descriptor rebuilt from a file, in evaluation mode on the CPU.

    path: a file of `save_checkpoint`, or a released `.pth.tar` (`{"model": state dict, "epoch": int}`; a `module.`
    prefix and the loss's `infonce_log_scale` are dropped). config: only for released files, which hold none; without
    it width, depth, patch and picture size are read off the tensors, and heads of 64 channels are assumed, as in every
    released model. Raises DataError if the file is unreadable or does not fit, FileNotFoundError if it is absent.
    """
    path = Path(path)
    if _is_safetensors(path):
        texts = _header(path)
        if _CONFIG not in texts:
            raise DataError(
                f"{path} holds no model config: it is a bare backbone, to be given as weights of build_descriptor"
            )
        settings = json.loads(texts[_CONFIG])
        kind = settings.pop("model", "descriptor")
        if kind != "descriptor":
            raise DataError(f"{path} holds a {kind}, expected a descriptor")
        unknown = settings.keys() - {field.name for field in dataclasses.fields(DescriptorConfig)}
        if unknown:
            raise DataError(f"{path} was written by a newer version: its config has {', '.join(sorted(unknown))}")
        config = DescriptorConfig(**settings)
    tensors = _read_tensors(path)
    tensors.pop("infonce_log_scale", None)
    if config is None:
        config = _released_config(tensors, path)
    model = Descriptor(config)
    _load_strictly(model, tensors, path)
    return model.eval()


def load_backbone(model: Descriptor, path: str | Path) -> list[str]:
    """Put a backbone's weights into `model.encoder`; returns the names in the file that the encoder has no place for.

    path: safetensors (or a torch file of a plain state dict) with timm's names, `patch_embed.*`, `blocks.*`,
    `cls_token`, `pos_embed`, also under the prefix `encoder.` of a descriptor's own checkpoint. The position embedding
    is resampled bicubically to the model's grid, class position kept: antialiased where the grid shrinks, plain where
    it grows, as the released models were. Classifier (`head.*`), `mask_token`, and, for heads other than `cls`,
    the final norm (`norm.*`) are left aside and returned; anything else missing, unexpected or of another shape
    raises DataError.
    """
    path = Path(path)
    tensors = _read_tensors(path)
    if any(name.startswith("encoder.") for name in tensors):
        tensors = {name.removeprefix("encoder."): value for name, value in tensors.items() if "encoder." in name}
    encoder = model.encoder
    expected = encoder.state_dict()
    left = [
        name
        for name in tensors
        if name not in expected and re.match(r"(norm|fc_norm|head|head_dist)\.|mask_token$", name)
    ]
    tensors = {name: value for name, value in tensors.items() if name not in left}
    position = tensors.get("pos_embed")
    if position is not None and encoder.pos_embed is not None:
        prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
        tensors["pos_embed"] = _resample_position(position, model.grid, prefix, path)
    _load_strictly(encoder, tensors, path)
    return sorted(left)


def _resample_position(position: Tensor, grid: int, prefix: int, path: Path) -> Tensor:
    """Position embedding [1, prefix + g * g, C] on another square grid, [1, prefix + grid * grid, C]."""
    count = position.shape[1] - prefix if position.ndim == 3 else -1
    old = math.isqrt(max(count, 0))
    if count < 1 or old * old != count:
        raise DataError(f"{path}: pos_embed {list(position.shape)} is no square grid after {prefix} prefix tokens")
    return resample_abs_pos_embed(
        position, new_size=[grid, grid], old_size=[old, old], num_prefix_tokens=prefix, antialias=grid < old
    )


def _released_config(tensors: Mapping[str, Tensor], path: Path) -> DescriptorConfig:
    """The config of a released descriptor, read off the shapes of its tensors."""
    if any(name.startswith("fusion.") for name in tensors):
        raise DataError(f"{path} holds a matcher (it has fusion blocks), expected a descriptor")
    needed = ("encoder.patch_embed.proj.weight", "encoder.pos_embed", "heads.linear_head.fc1.weight")
    absent = [name for name in needed if name not in tensors]
    if absent:
        raise DataError(f"{path} is no descriptor checkpoint: it lacks {', '.join(absent)}")
    projection, position, linear = (tensors[name] for name in needed)
    width, patch = projection.shape[0], projection.shape[-1]
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"encoder\.blocks\.(\d+)\.", name))}
    options = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": max(blocks, default=-1) + 1,
        "num_heads": max(width // _RELEASED_HEAD_WIDTH, 1),
    }
    return DescriptorConfig(
        backbone="vit_small_patch16_224",
        backbone_options=options,
        img_size=math.isqrt(position.shape[1] - 1) * patch,
        dim=linear.shape[0],
    )


def _is_safetensors(path: Path) -> bool:
    """Whether the content looks like safetensors: a little-endian length, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def _header(path: Path) -> dict[str, str]:
    if not _is_safetensors(path):
        raise DataError(f"{path} is not a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors or torch file on the CPU, a `module.` prefix removed."""
    if _is_safetensors(path):
        _header(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    else:
        try:
            with path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = str(error).split("\n", 1)[0]
            raise DataError(f"{path} is neither safetensors nor a torch file of tensors: {reason}") from error
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            content = content["model"]
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise DataError(f"{path} must hold a state dict, or one under the key 'model'")
        tensors = dict(content)
    return {str(name).removeprefix("module."): value for name, value in tensors.items()}


def _load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """`load_state_dict`, with one sentence that names every difference."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    faults = [
        f"{title}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise DataError(f"{path} does not fit the model; {'; '.join(faults)}")
    module.load_state_dict(dict(tensors), strict=True)
