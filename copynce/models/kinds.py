"""The kinds of models: what a checkpoint calls each, what it is built from, and how a released file is read as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from copynce.errors import DataError
from copynce.models.convert import Model, count_blocks, is_matcher, shape_facts, square_root
from copynce.models.descriptor import Descriptor
from copynce.models.matcher import Matcher
from copynce.models.settings import BackboneConfig, DescriptorConfig, MatcherConfig

AnyModel = Descriptor | Matcher

#: Attention heads by width in all known models, for a state dict does not tell: 64 channels each.
KNOWN_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}


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
    facts, img_size = _encoder_facts(found, path, num_heads)
    return DescriptorConfig(
        backbone="vit_small_patch16_224", backbone_options=facts, img_size=img_size, dim=linear.shape[0]
    )


def _released_matcher(found: Model, path: Path, num_heads: int | None) -> MatcherConfig:
    fusion_blocks = count_blocks(found.tensors, "fusion")
    if fusion_blocks == 0:
        raise DataError(f"{path} is no matcher's: it has parts called fusion.*, but no fusion.blocks.*")
    facts, img_size = _encoder_facts(found, path, num_heads)
    return MatcherConfig(
        backbone="vit_small_patch16_224",
        encoder_blocks=int(facts.pop("depth")),
        fusion_blocks=fusion_blocks,
        backbone_options=facts,
        img_size=img_size,
    )


def _encoder_facts(found: Model, path: Path, num_heads: int | None) -> tuple[dict[str, Any], int]:
    """timm's options of a released encoder, read off the shapes of its tensors, and the side of its input."""
    facts: dict[str, Any] = shape_facts(found.tensors)
    width, patch = facts["embed_dim"], facts["patch_size"]
    position = found.tensors.get("encoder.pos_embed")
    grid = square_root(position.shape[1] - 1) if position is not None and position.ndim == 3 else None
    if grid is None:
        raise DataError(f"{path} is no model's: encoder.pos_embed must be a class position and a square of patches")
    heads = num_heads or KNOWN_HEADS.get(width)
    if heads is None:
        raise DataError(
            f"{path} does not tell how many attention heads its encoder has, and its width {width} is that of no known "
            f"model ({', '.join(map(str, KNOWN_HEADS))}); give num_heads or a config"
        )
    return {**facts, "num_heads": heads}, grid * patch


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
