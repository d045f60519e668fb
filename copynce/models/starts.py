"""Models that start from a file: a trained model, or the backbone of another training (PROTOCOLS 9.5)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from copynce.errors import ConfigError, DataError
from copynce.models.backbone import blocks_of
from copynce.models.checkpoints import build_from, own_config
from copynce.models.kinds import KNOWN_HEADS, AnyModel
from copynce.models.matcher import Matcher
from copynce.models.names import (
    LOG_SCALE,
    Model,
    count_blocks,
    divided,
    find_encoder,
    is_matcher,
    is_resnet,
    shape_facts,
    square_root,
)
from copynce.models.settings import BackboneConfig
from copynce.models.strict import listed, load_strictly
from copynce.models.weight_files import read_weights

#: What of a fusion a backbone does not have: no class token, and a descriptor's no norm.
_NEW = ("fusion.cls_token", "fusion.norm.weight", "fusion.norm.bias")

#: Parts of others' models that do not change what the encoder does: what comes after it or only serves their training.
_LEFT = re.compile(r"encoder\.((norm|fc_norm|pre_logits|mask_token)\b|(\w*(head|decoder)\w*|fc)\.|decoder\w*$)")


@dataclasses.dataclass(frozen=True)
class Start:
    """What a model took from a file."""

    said: list[str]
    """Sentences for people."""
    taken: dict[str, str]
    """{name of the model's: name in the file}"""
    new: list[str]
    """Names of the model's whose values are those that it had."""
    left: list[str]
    """Names of the file's encoder and heads for which the model has no place."""


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
    return begin(model, path).said


def load_backbone(model: AnyModel, path: str | Path) -> list[str]:
    """As `load_start`, but without heads; returns the names in the file that the model has no place for."""
    return begin(model, path, head=False).left


def begin(model: AnyModel, path: str | Path, *, head: bool = True) -> Start:
    """As `load_start`, head: whether the head is taken where it fits; returns what went where."""
    file = read_weights(path)
    found = find_encoder(file)
    state = model.state_dict()
    whose = f" of {found.place}" if found.place not in ("", "encoder") else ""
    instead = f", not of {', '.join(found.others)}" if found.others else ""
    said = [f"{file.path}: the encoder{whose} is taken{instead}"]
    divided_here = isinstance(model, Matcher) and not is_matcher(found.tensors)
    found, sentences = _divide(model, found, file.path)
    said += sentences

    if is_resnet(state) != is_resnet(found.tensors):
        kinds = ("a vision transformer", "a ResNet")
        raise DataError(
            f"{file.path} holds {kinds[is_resnet(found.tensors)]}, the model's backbone {model.config.backbone!r} is "
            f"{kinds[is_resnet(state)]}; choose model.backbone by the file, or another file"
        )
    ours, theirs = _part_facts(state), _part_facts(found.tensors)
    differ = [f"{name} {value} instead of {ours[name]}" for name, value in theirs.items() if ours.get(name) != value]
    if differ:
        raise DataError(
            f"{file.path} does not fit the model: its encoder has {', '.join(differ)}; choose model.backbone and "
            "model.backbone_options by the file, or another file"
        )
    said += _compare_attention(model, own_config(file), file.path)

    tensors = {name: tensor for name, tensor in found.tensors.items() if name.startswith(("encoder.", "fusion."))}
    left = [name for name in tensors if name not in state and _LEFT.match(name)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left}
    said += _fit_position(model, tensors, file.path)
    beside = {name: tensor for name, tensor in found.tensors.items() if name not in tensors and name not in left}
    head_tensors: dict[str, Tensor] = {}
    if head:
        head_tensors, sentence = _fit_head(state, beside)
        said += [sentence] if sentence else []
    left += [name for name in beside if name not in head_tensors]
    new = {name: tensor for name, tensor in state.items() if _is_new(name, head_tensors)}
    if divided_here:
        new |= {name: state[name] for name in _NEW if name not in tensors}
        said.append(f"new: {listed([name for name in new if name.startswith('fusion.')])}")
    tensors |= head_tensors
    said += load_strictly(model, tensors | new, file.path)
    left = sorted(name.removeprefix("encoder.") for name in left)
    if left:
        said.append(f"left aside: {listed(left)}" + ("; loss.log_scale sets it" if LOG_SCALE in left else ""))
    return Start(said, {name: found.names[name] for name in state if name in tensors}, list(new), left)


def _is_new(name: str, head: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of the model stays as it was: heads where none was taken, and the one that only CopyNCE asks."""
    part = "heads.fusion_head." if head else "heads."
    return name.startswith(part) and not any(theirs.startswith(part) for theirs in head)


def _divide(model: AnyModel, found: Model, path: Path) -> tuple[Model, list[str]]:
    """What was found under the names of the model, and sentences."""
    if is_matcher(found.tensors):
        if not isinstance(model, Matcher):
            raise DataError(f"{path} holds a matcher (it has fusion blocks), which is no start for a descriptor")
        return found, []
    if not isinstance(model, Matcher):
        return found, []
    first = model.config.encoder_blocks
    last = first + model.config.fusion_blocks - 1
    names, tensors = divided(found.names, first), divided(found.tensors, first)
    said = [f"its blocks {first} to {last} are the fusion's"]
    return dataclasses.replace(found, tensors=tensors, names=names), said


def _part_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The shapes of an encoder, and how many fusion blocks there are."""
    return {**shape_facts(tensors), "fusion_blocks": count_blocks(tensors, "fusion")}


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
    encoder: Any = model.encoder
    name, cls_token = "encoder.pos_embed", "encoder.cls_token"
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
    ours = unseen(model)
    if own is not None:
        with torch.device("meta"):
            theirs = unseen(build_from(own, path))
        for name in ("num_heads", "the activation"):
            if name in theirs and theirs[name] != ours[name]:
                raise DataError(
                    f"{path} was trained with {name} {theirs[name]}, the model has {ours[name]}; choose model.backbone "
                    "and model.backbone_options by the file"
                )
        if theirs.get("norm_eps") != ours.get("norm_eps"):
            return [f"it was trained with norm_eps {theirs['norm_eps']}, the model has {ours['norm_eps']}"]
        return []
    if not ours:
        return []
    heads = ours["num_heads"]
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


def unseen(model: AnyModel) -> dict[str, Any]:
    """What no tensor's shape tells: `num_heads`, `the activation`, `norm_eps`; nothing of a ResNet."""
    for block in blocks_of(model.encoder):
        made: Any = block
        return {
            "num_heads": made.attn.num_heads,
            "the activation": type(made.mlp.act).__name__,
            "norm_eps": made.norm1.eps,
        }
    return {}
