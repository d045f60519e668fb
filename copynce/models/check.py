"""Whether the model of some settings can be built here, found without making its weights."""

from __future__ import annotations

import functools
import json
import os

import torch

from copynce.config import require_number
from copynce.errors import ConfigError
from copynce.models.kinds import KINDS, build_model
from copynce.models.settings import BackboneConfig

_MOST_BLOCKS = 1000
_LARGEST_SIDE = 8192  # pixels; the largest models take 1,024


def check_model(config: BackboneConfig) -> int:
    """The number of patches of the model that ``config`` describes, found without making its weights.

    Raises ConfigError if there is no such model, or if this machine cannot hold its weights.
    """
    kind = next(name for name, kind in KINDS.items() if type(config) is kind.config)
    return _check_model(kind, json.dumps(config.to_dict(), default=repr))


@functools.lru_cache(maxsize=64)
def _check_model(kind: str, described: str) -> int:
    config = KINDS[kind].config(**json.loads(described))
    require_number("model.img_size", config.img_size, least=1, most=_LARGEST_SIDE)
    if config.norm_eps is not None:
        require_number("model.norm_eps", config.norm_eps, above=0, below=1)
    depths = {
        "backbone_options.depth": config.backbone_options.get("depth"),
        **{name: getattr(config, name, None) for name in ("encoder_blocks", "fusion_blocks")},
    }
    layers = config.backbone_options.get("layers")
    if isinstance(layers, list) and all(isinstance(number, int) for number in layers):
        depths["backbone_options.layers"] = sum(layers)
    for name, depth in depths.items():
        if isinstance(depth, int):  # else a billion blocks are built before anyone can say that they are too many
            require_number(f"model.{name}", depth, least=1, most=_MOST_BLOCKS)
    try:
        with torch.device("meta"):  # shapes without numbers
            model = build_model(config)
            model.encoder.forward_intermediates(torch.empty(2, 3, config.img_size, config.img_size), indices=1)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    except Exception as error:  # whatever timm and torch raise for arguments that they cannot use
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"model: {config.backbone} cannot be built with backbone_options {config.backbone_options} "
            f"({type(error).__name__}: {reason})"
        ) from error
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ConfigError(
            f"model: its weights take {size / 1e9:.1f} GB, this machine has {memory / 1e9:.1f} GB of memory; choose a "
            "smaller model.img_size, model.dim or model.backbone_options"
        )
    return model.grid**2
