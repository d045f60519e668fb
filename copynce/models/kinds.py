"""The kinds of models: what a checkpoint calls each, what it is built from, and how a released file is read as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from copynce.errors import ConfigError, DataError
from copynce.models.descriptor import Descriptor
from copynce.models.matcher import Matcher
from copynce.models.names import Model, count_blocks, is_matcher, is_resnet, shape_facts, square_root
from copynce.models.settings import BackboneConfig, DescriptorConfig, MatcherConfig

AnyModel = Descriptor | Matcher

#: Attention heads by width in all known models, for a state dict does not tell: 64 channels each.
KNOWN_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}


_RESNET_SIDE = 448  # pixels (PROTOCOLS 9.6)


@dataclass(frozen=True)
class Kind:
    """A kind of model. ``released(found, path, num_heads)``: the config of a released file, read off its tensors."""

    name: str
    model: Callable[[Any], AnyModel]
    config: type[BackboneConfig]
    released: Callable[[Model, Path, int | None], BackboneConfig]


def _released_descriptor(found: Model, path: Path, num_heads: int | None) -> DescriptorConfig:
    linear = found.tensors.get("heads.linear_head.fc1.weight")
    if linear is None:
        raise DataError(
            f"{path} holds an encoder but no descriptor's head and no config of ours: it is a bare backbone, to start "
            "a training from (weights=FILE), or to be read with the config of a descriptor with head='cls'"
        )
    return DescriptorConfig(**backbone_fields(found, path, num_heads), dim=linear.shape[0])


def _released_matcher(found: Model, path: Path, num_heads: int | None) -> MatcherConfig:
    fusion_blocks = count_blocks(found.tensors, "fusion")
    if fusion_blocks == 0:
        raise DataError(f"{path} is no matcher's: it has parts called fusion.*, but no fusion.blocks.*")
    fields = backbone_fields(found, path, num_heads)
    depth = fields["backbone_options"].pop("depth")
    return MatcherConfig(**fields, encoder_blocks=depth, fusion_blocks=fusion_blocks)


def backbone_fields(found: Model, path: Path, num_heads: int | None, *, bare: bool = False) -> dict[str, Any]:
    """`backbone`, `backbone_options` and `img_size` of an encoder, read off the names and shapes of its tensors.

    bare: whether it may be any backbone, not only of the released form, and its heads may be told elsewhere: they are
    left out if nothing here tells them. A ResNet does not tell the side of its input, so that is the paper's. Raises
    DataError if they do not tell it, ConfigError for a `num_heads` that is none of this encoder.
    """
    facts: dict[str, Any] = shape_facts(found.tensors)
    if is_resnet(found.tensors):
        if num_heads is not None:
            raise ConfigError(f"num_heads must be left out: {path} holds a ResNet, which has no attention heads")
        bottlenecks = "encoder.layer1.0.conv3.weight" in found.tensors
        name, layers = ("resnet50", [3, 4, 6, 3]) if bottlenecks else ("resnet18", [2, 2, 2, 2])
        usual = {"layers": layers, "channels": [64, 128, 256, 512]}
        options = {key: value for key, value in facts.items() if value != usual[key]}
        return {"backbone": name, "backbone_options": options, "img_size": _RESNET_SIDE}
    width, patch = facts["embed_dim"], facts["patch_size"]
    if bare:
        facts |= _beyond_released(found, path)
    position = found.tensors.get("encoder.pos_embed")
    count = position.shape[1] if position is not None and position.ndim == 3 else 0
    grid = square_root(count - 1)
    if grid is None and facts.get("no_embed_class"):
        grid = square_root(count)
    if grid is None:
        raise DataError(f"{path} is no model's: encoder.pos_embed must be a class position and a square of patches")
    if num_heads is not None and (num_heads < 1 or width % num_heads):
        raise ConfigError(
            f"num_heads must be a positive number that divides the width {width} of the encoder in {path}, "
            f"got {num_heads}"
        )
    heads = num_heads or KNOWN_HEADS.get(width)
    if heads is None and not bare:
        raise heads_unknown(path, width)
    options = facts if heads is None else {**facts, "num_heads": heads}
    return {"backbone": "vit_small_patch16_224", "backbone_options": options, "img_size": grid * patch}


def heads_unknown(path: Path, width: int) -> DataError:
    """The error of an encoder whose attention heads nobody tells."""
    return DataError(
        f"{path} does not tell how many attention heads its encoder has, and its width {width} is that of no known "
        f"model ({', '.join(map(str, KNOWN_HEADS))}); give num_heads or a config"
    )


def _beyond_released(found: Model, path: Path) -> dict[str, Any]:
    """timm's options of parts that the released encoders do not have."""
    tensors, block = found.tensors, "encoder.blocks.0"
    options: dict[str, Any] = {}
    up, down = tensors.get(f"{block}.mlp.fc1.weight"), tensors.get(f"{block}.mlp.fc2.weight")
    if up is not None and down is not None and up.shape[0] != down.shape[1]:
        raise DataError(f"{path} has a gated MLP, which names do not tell whole; give its backbone, as timm calls it")
    if f"{block}.ls1.gamma" in tensors:
        options["init_values"] = 1e-5
    if f"{block}.attn.qkv.bias" not in tensors:
        options["qkv_bias"] = False
    if "encoder.reg_token" in tensors:
        options |= {"reg_tokens": tensors["encoder.reg_token"].shape[1], "no_embed_class": True}
    return options


KINDS = {
    kind.name: kind
    for kind in [
        Kind("descriptor", Descriptor, DescriptorConfig, _released_descriptor),
        Kind("matcher", Matcher, MatcherConfig, _released_matcher),
    ]
}


def released_kind(found: Model) -> Kind:
    """The kind of the model in a released file, by the names of its tensors."""
    return KINDS["matcher" if is_matcher(found.tensors) else "descriptor"]


def build_model(config: BackboneConfig) -> AnyModel:
    """The model of a config, with new weights. Raises ValueError for a config that fits no model."""
    for kind in KINDS.values():
        if type(config) is kind.config:
            return kind.model(config)
    raise TypeError(f"config must be that of one of {', '.join(KINDS)}, got {type(config).__name__}")


def kind_of(model: nn.Module) -> Kind:
    """The kind of a model. Raises TypeError for a module that is none."""
    for kind in KINDS.values():
        if type(model) is kind.model:
            return kind
    raise TypeError(f"model must be one of {', '.join(KINDS)}, got {type(model).__name__}")
