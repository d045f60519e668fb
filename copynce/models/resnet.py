"""A ResNet as a descriptor's backbone: timm's, whose names are torchvision's (PROTOCOLS 9.6).

    image [B, 3, S, S] -> stem [B, 64, S/2, S/2] -> four stages, the last [B, 2048, S/32, S/32]
                       -> global average = what stands for the class token [B, 2048]

The cells of a map are patch tokens, so their patch size is the map's stride. There is no patch embedding that could be
frozen, and no LayerNorm. BatchNorm takes the statistics of all pictures of a process, both sides of the pairs together;
processes have statistics of their own, and the running ones that are kept are those of the first (as torchvision
trains).
"""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import Any

import timm
from timm.models.resnet import ResNet
from torch import Tensor

from copynce.models.settings import BackboneConfig

#: What a map of the whole picture asks of `img_size`.
_STRIDE = 32

_OWN_OPTIONS = ("block", "num_classes", "in_chans", "output_stride", "global_pool", "act_layer", "norm_layer",
                "aa_layer", "drop_path_rate", "block_args", "device", "dtype")  # fmt: skip


@functools.cache
def _names() -> list[str]:
    return timm.list_models(module="resnet")


def is_resnet_name(backbone: str) -> bool:
    """Whether timm calls one of its ResNets so."""
    return backbone in _names()


def build_resnet(config: BackboneConfig) -> ResNet:
    """The timm ResNet of a config, without classifier; ValueError where options or picture size do not fit."""
    known = [name for name in inspect.signature(ResNet.__init__).parameters if name not in ("self", *_OWN_OPTIONS)]
    for name in config.backbone_options:
        if name in _OWN_OPTIONS:
            raise ValueError(f"backbone_options may not set {name!r} of {config.backbone!r}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or ["layers", "channels", "stem_width"]
            raise ValueError(f"backbone_options of {config.backbone!r} has no {name!r}; near names: {', '.join(near)}")
    if config.norm_eps is not None:
        raise ValueError(f"norm_eps is that of LayerNorm, which {config.backbone!r} does not have; leave it out")
    if config.img_size < _STRIDE or config.img_size % _STRIDE:
        raise ValueError(
            f"img_size must be a multiple of the stride {_STRIDE} of {config.backbone!r}, got {config.img_size}"
        )
    options: dict[str, Any] = {**config.backbone_options, "drop_path_rate": config.drop_path}
    encoder = timm.create_model(config.backbone, pretrained=False, num_classes=0, **options)
    if not isinstance(encoder, ResNet):
        raise ValueError(f"backbone must be a plain ResNet of timm, got {config.backbone!r}")
    return encoder


def stages_of(encoder: ResNet) -> list[tuple[int, int]]:
    """(stride, channels) of the maps of the stem and the four stages."""
    stages: Any = encoder.feature_info
    return [(stage["reduction"], stage["num_chs"]) for stage in stages]


def pooled_of(encoder: ResNet, images: Tensor) -> Tensor:
    """The global average [B, C] of the last stage."""
    pooled: Tensor = encoder.global_pool(encoder.forward_features(images))
    return pooled


def stage_tokens_of(encoder: ResNet, images: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """The global average [B, C] of the last stage, and the cells [B, L, C'] of a map, row-major."""
    last, maps = encoder.forward_intermediates(images, indices=[stage])
    pooled: Tensor = encoder.global_pool(last)
    return pooled, maps[0].flatten(2).transpose(1, 2)
