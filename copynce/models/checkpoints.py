"""Weights in files: our checkpoints, the method's released `.pth.tar`, and backbones to start from.

Ours are safetensors files whose metadata holds two JSON texts: `copynce.config`, from which the model is rebuilt, and
`copynce.metadata`, whatever the writer noted (epoch, commit, scores). The tensors have the released names. A file is
taken whole (`load_checkpoint`) or as a start (`load_start`); what does not fit ends it with an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from copynce.errors import ConfigError, DataError
from copynce.files import file_sha256, whole_file
from copynce.models.convert import Model, count_blocks, divided, find_encoder, is_matcher, shape_facts, square_root
from copynce.models.descriptor import Descriptor
from copynce.models.kinds import KINDS, KNOWN_HEADS, AnyModel, build_model, kind_of, released_kind
from copynce.models.matcher import Matcher
from copynce.models.settings import BackboneConfig
from copynce.models.weight_files import WeightFile, file_of, read_texts, read_weights

_CONFIG = "copynce.config"
_METADATA = "copynce.metadata"
_LOG_SCALE = "infonce_log_scale"  # the loss's own parameter in released files

_M = TypeVar("_M", Descriptor, Matcher)

#: What of a fusion a backbone does not have: no class token, and a descriptor's no norm.
_NEW = ("fusion.cls_token", "fusion.norm.weight", "fusion.norm.bias")

#: Parts of others' models that do not change what the encoder does: what comes after it or only serves their training.
_LEFT = re.compile(r"encoder\.((norm|fc_norm|pre_logits|mask_token)\b|\w*(head|decoder)\w*\.|decoder\w*$)")


def save_checkpoint(path: str | Path, model: AnyModel, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model as safetensors; the file appears whole or not at all.

    metadata: the model's card, anything JSON can hold, such as `step`, `commit`, `trained_on`, and `start` as
    `start_card` tells it; `read_checkpoint_metadata` returns it. Raises TypeError if JSON cannot, WriteError if the
    disk takes no file.
    """
    path = Path(path)
    texts = {
        "format": "pt",
        _CONFIG: json.dumps({"model": kind_of(model).name, **model.config.to_dict()}),
        _METADATA: json.dumps(dict(metadata or {})),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(save(tensors, metadata=texts))


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

    path: a file of `save_checkpoint`, a checkpoint folder or a run of ours (its newest), or a released `.pth.tar`
    (`{"model": state dict, "epoch": int}`; any prefix and the loss's `infonce_log_scale` are dropped).
    config, num_heads: only for released files, which hold no config. Without config, width, depth, patch and picture
    size are read off the tensors; the number of attention heads is not in them: it is `num_heads`, or 64 channels a
    head for the widths of known models (192, 384, 768, 1024).
    Raises DataError if the file is unreadable, does not fit, does not tell its heads, or holds values that are no
    finite floats; RunError if a folder holds no checkpoint.
    """
    file = read_weights(path)
    found = find_encoder(file)
    found.tensors.pop(_LOG_SCALE, None)
    own = _own_config(file)
    if own is not None:
        model = _build(own, file.path)
    else:
        model = build_model(config or released_kind(found).released(found, file.path, num_heads))
        # Fine-tuned without CopyNCE, a released matcher has lost the head that only CopyNCE asks.
        kept = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("heads.fusion_head.")}
        if not kept.keys() & found.tensors.keys():
            found.tensors.update(kept)
    _load_strictly(model, found.tensors, file.path)
    return model.eval()


def load_descriptor(path: str | Path, *, num_heads: int | None = None) -> Descriptor:
    """As `load_checkpoint`; DataError for a file that holds another kind of model."""
    return _of_kind(Descriptor, load_checkpoint(path, num_heads=num_heads), path)


def load_matcher(path: str | Path, *, num_heads: int | None = None) -> Matcher:
    """As `load_checkpoint`; DataError for a file that holds another kind of model."""
    return _of_kind(Matcher, load_checkpoint(path, num_heads=num_heads), path)


def _of_kind(kind: type[_M], model: AnyModel, path: str | Path) -> _M:
    if not isinstance(model, kind):
        raise DataError(f"{path} holds a {kind_of(model).name}, expected a {kind.__name__.lower()}")
    return model


def load_start(model: AnyModel, path: str | Path) -> list[str]:
    """Start a model from a file: encoder and head, as far as they fit; returns sentences about what was taken.

    path: as for `load_checkpoint`, or a backbone: safetensors or torch files with timm's names `patch_embed.*`,
    `blocks.*`, `cls_token`, `pos_embed`, under whatever prefix, such as the training checkpoints of DINO, DINOv2
    and Lightning; of student and teacher the teacher is taken. The position embedding is resampled bicubically to the
    model's grid, class position kept: antialiased where the grid shrinks, plain where it grows, as the released models
    were. A matcher takes a backbone, or a descriptor's, as its encoder's and its fusion's blocks, one after the other,
    and the final norm as the fusion's. A head of another length, or none, leaves the model's as it is. Classifiers,
    decoders, `mask_token` and, for descriptors with heads other than `cls`, the final norm are left aside.
    Raises DataError if the file is unreadable, if its encoder has another shape, or parts that the model lacks or the
    other way round, or holds values that are no finite floats; ConfigError if neither file nor config tells the number
    of attention heads. The model is then as it was.
    """
    return _start(model, path, head=True)[0]


def load_backbone(model: AnyModel, path: str | Path) -> list[str]:
    """As `load_start`, but without heads; returns the names in the file that the model has no place for."""
    return _start(model, path, head=False)[1]


def _start(model: AnyModel, path: str | Path, *, head: bool) -> tuple[list[str], list[str]]:
    """(sentences, names left aside) of a start."""
    file = read_weights(path)
    found = find_encoder(file)
    state = model.state_dict()
    whose = f" of {found.place}" if found.place not in ("", "encoder") else ""
    instead = f", not of {', '.join(found.others)}" if found.others else ""
    said = [f"{file.path}: the encoder{whose} is taken{instead}"]
    file_tensors, sentences = _divide(model, found, file.path)
    said += sentences

    ours, theirs = _part_facts(state), _part_facts(file_tensors)
    differ = [f"{name} {value} instead of {ours[name]}" for name, value in theirs.items() if ours.get(name) != value]
    if differ:
        raise DataError(
            f"{file.path} does not fit the model: its encoder has {', '.join(differ)}; choose model.backbone and "
            "model.backbone_options by the file, or another file"
        )
    said += _compare_attention(model, _own_config(file), file.path)

    tensors = {name: tensor for name, tensor in file_tensors.items() if name.startswith(("encoder.", "fusion."))}
    left = [name for name in tensors if name not in state and _LEFT.match(name)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left}
    said += _fit_position(model, tensors, file.path)
    beside = {name: tensor for name, tensor in file_tensors.items() if name not in tensors and name not in left}
    taken: dict[str, Tensor] = {}
    if head:
        taken, sentence = _fit_head(state, beside)
        said += [sentence] if sentence else []
    left += [name for name in beside if name not in taken]
    new = {} if taken else {name: tensor for name, tensor in state.items() if name.startswith("heads.")}
    if isinstance(model, Matcher) and not is_matcher(found.tensors):
        fusion = {name: state[name] for name in _NEW if name not in tensors}
        said.append(f"new: {_listed(list(fusion))}")
        new |= fusion
    said += _load_strictly(model, tensors | taken | new, file.path)
    left = sorted(name.removeprefix("encoder.") for name in left)
    if left:
        said.append(f"left aside: {_listed(left)}" + ("; loss.log_scale sets it" if _LOG_SCALE in left else ""))
    return said, left


def _divide(model: AnyModel, found: Model, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors under the names of the model, and sentences."""
    if not isinstance(model, Matcher):
        if is_matcher(found.tensors):
            raise DataError(f"{path} holds a matcher (it has fusion blocks), which is no start for a descriptor")
        return found.tensors, []
    if is_matcher(found.tensors):
        return found.tensors, []
    first = model.config.encoder_blocks
    last = first + model.config.fusion_blocks - 1
    return divided(found.tensors, first), [f"its blocks {first} to {last} are the fusion's"]


def _part_facts(tensors: Mapping[str, Tensor]) -> dict[str, int | float]:
    """The shapes of an encoder, and how many fusion blocks there are."""
    fusion = count_blocks(tensors, "fusion")
    return {**shape_facts(tensors), **({"fusion_blocks": fusion} if fusion else {})}


def _fit_head(state: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors of the file's heads if they are the model's, and a sentence."""
    ours = {name: tensor for name, tensor in state.items() if name.startswith("heads.")}
    theirs = {name: tensor for name, tensor in beside.items() if name.startswith("heads.")}
    if not ours:
        return {}, ""
    deciding = next(
        name for name in ("heads.linear_head.fc1.weight", "heads.cls_head.classifier.weight") if name in ours
    )
    if deciding not in theirs:
        return {}, "the head is new: the file holds none"
    if theirs[deciding].shape != ours[deciding].shape:
        lengths = f"{theirs[deciding].shape[0]}, the model's of {ours[deciding].shape[0]}"
        return {}, f"the head is new: the file's makes descriptors of {lengths}"
    return theirs, "the head is taken"


def _fit_position(model: AnyModel, tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Bring the position embedding among the tensors to the model's grid and prefix tokens; says what was done."""
    encoder, name, cls_token = model.encoder, "encoder.pos_embed", "encoder.cls_token"
    if name not in tensors or encoder.pos_embed is None or tensors[name].shape == encoder.pos_embed.shape:
        return []
    position = tensors[name].float()
    count = position.shape[1] if position.ndim == 3 else 0
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    said = []
    if prefix == 0 and square_root(count) is None and square_root(count - 1) is not None and cls_token in tensors:
        # What the blocks see is the sum of both, so the class token can hold its own position.
        tensors[cls_token] = tensors[cls_token].float() + position[:, :1]
        position, count = position[:, 1:], count - 1
        said.append("the position of the class token is added to it, as this backbone has it")
    side = square_root(count - prefix)
    if side is None:
        raise DataError(
            f"{path}: pos_embed {list(position.shape)} is no square grid of patches after the {prefix} prefix tokens "
            f"of {model.config.backbone!r}; choose model.backbone by the file"
        )
    if side != model.grid:
        said.append(f"the position embedding is resized from {side} x {side} to {model.grid} x {model.grid} patches")
    tensors[name] = resample_position(position, side, model.grid, prefix)
    return said


def resample_position(position: Tensor, old: int, new: int, prefix: int) -> Tensor:
    """Position embedding [1, prefix + old * old, C] on another square grid, [1, prefix + new * new, C]."""
    return resample_abs_pos_embed(
        position, new_size=[new, new], old_size=[old, old], num_prefix_tokens=prefix, antialias=new < old
    )


def _compare_attention(model: AnyModel, own: BackboneConfig | None, path: Path) -> list[str]:
    """What no tensor's shape tells: heads, activation and epsilon. Says what to know, raises where it differs."""
    heads, activation, epsilon = _unseen(model)
    if own is not None:
        with torch.device("meta"):
            their_heads, their_activation, their_epsilon = _unseen(_build(own, path))
        for name, theirs, ours in (
            ("num_heads", their_heads, heads),
            ("the activation", their_activation, activation),
        ):
            if theirs != ours:
                raise DataError(
                    f"{path} was trained with {name} {theirs}, the model has {ours}; choose model.backbone and "
                    "model.backbone_options by the file"
                )
        if their_epsilon != epsilon:
            return [f"it was trained with norm_eps {their_epsilon}, the model has {epsilon}"]
        return []
    options, known = model.config.backbone_options, KNOWN_HEADS.get(model.channels)
    if heads == known:
        return []
    if "embed_dim" in options and "num_heads" not in options:
        raise ConfigError(
            f"model.backbone_options sets embed_dim {model.channels} without num_heads, and {path} does not tell how "
            f"many attention heads it was trained with; set num_heads"
            + (f" ({known} in known models)" if known else "")
        )
    usual = f"; known models of this width have {known}" if known else ""
    return [f"the file does not tell its attention heads: the model's {heads} are taken{usual}"]


def _unseen(model: AnyModel) -> tuple[int, str, float]:
    block: Any = model.encoder.blocks[0]
    return block.attn.num_heads, type(block.mlp.act).__name__, block.norm1.eps


def _build(config: BackboneConfig, path: Path) -> AnyModel:
    """The model of a config that came out of a file, and so may hold anything."""
    try:
        return build_model(config)
    except Exception as error:
        raise DataError(f"{path}: its model cannot be built here: {error}") from error


def _own_config(file: WeightFile) -> BackboneConfig | None:
    """The config in a file of `save_checkpoint`; None if it holds none."""
    if _CONFIG not in file.texts:
        return None
    settings = _json_object(file.texts[_CONFIG], file.path)
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


def _json_object(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: what copynce stored beside the tensors is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: what copynce stored beside the tensors is no JSON object: {text[:40]}")
    return found


def _load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    """`load_state_dict`, with one sentence that names every difference; says which values were converted."""
    expected = module.state_dict()
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    _refuse(
        path,
        "does not fit the model",
        {
            "missing": [name for name in expected if name not in tensors],
            "unexpected": [name for name in tensors if name not in expected],
            "of another shape": shapes,
        },
    )
    types = {
        name: str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        for name, tensor in tensors.items()
    }
    # Counters (BatchNorm's num_batches_tracked) may be of any type, weights must be floats.
    odd = [
        f"{name} {types[name]}"
        for name, tensor in tensors.items()
        if tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.is_complex()
        or (expected[name].is_floating_point() and not tensor.is_floating_point())
    ]
    _refuse(path, "holds weights that are no floats", {"": odd})
    values = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    bad = {name: int((~value.isfinite()).sum()) for name, value in values.items()}
    _refuse(
        path,
        "holds weights that are not finite (NaN, infinity)",
        {"": [f"{name} ({count} of {values[name].numel()})" for name, count in bad.items() if count]},
    )
    empty = [name for name, value in values.items() if name.endswith(".weight") and value.ndim > 1 and not value.any()]
    _refuse(path, "holds weights that are all zero, as a file that was made but never filled", {"": empty})
    negative = [name for name, value in values.items() if name.endswith("running_var") and (value < 0).any()]
    _refuse(path, "holds negative variances", {"": negative})
    module.load_state_dict(values, strict=True)
    converted = sorted({types[name] for name in tensors if expected[name].is_floating_point()} - {"float32"})
    return [f"its {' and '.join(converted)} weights are converted to float32"] if converted else []


def _refuse(path: Path, what: str, faults: Mapping[str, list[str]]) -> None:
    """Raise a DataError if any of the lists holds something."""
    parts = [f"{title}: {_listed(names)}" if title else _listed(names) for title, names in faults.items() if names]
    if parts:
        raise DataError(f"{path} {what}{';' if list(faults) != [''] else ':'} {'; '.join(parts)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
