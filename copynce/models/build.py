"""Models from a few arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from copynce.models.descriptor import Descriptor
from copynce.models.matcher import Matcher
from copynce.models.settings import DescriptorConfig, MatcherConfig
from copynce.models.starts import load_start
from copynce.models.timm_weights import weights_file


def build_descriptor(
    backbone: str = "vit_small_patch16_224",
    *,
    img_size: int = 224,
    dim: int = 512,
    head: Literal["linear_bn", "cls"] = "linear_bn",
    tokens_block: int = -1,
    second_class_block: int | None = None,
    freeze_blocks: int = 0,
    backbone_options: Mapping[str, Any] | None = None,
    norm_eps: float | None = None,
    freeze_patch_embed: bool = True,
    drop_path: float = 0.0,
    weights: str | Path | None = None,
) -> Descriptor:
    """A `Descriptor` with random weights, those of a file as far as they fit (see `load_start`, which also tells what
    was taken), or timm's own of the backbone (`weights="timm"`, or `"timm:NAME.TAG"`).

    The arguments are the fields of `DescriptorConfig`. Raises ValueError on a value that does not fit.

    >>> import torch
    >>> model = build_descriptor(img_size=32, dim=8, backbone_options=dict(embed_dim=24, depth=2, num_heads=2))
    >>> descriptor, patch_tokens = model.eval()(torch.zeros(1, 3, 32, 32))
    >>> descriptor.shape, patch_tokens.shape
    (torch.Size([1, 8]), torch.Size([1, 4, 24]))
    """
    model = Descriptor(
        DescriptorConfig(
            backbone=backbone,
            backbone_options=dict(backbone_options or {}),
            img_size=img_size,
            dim=dim,
            head=head,
            tokens_block=tokens_block,
            second_class_block=second_class_block,
            freeze_blocks=freeze_blocks,
            norm_eps=norm_eps,
            freeze_patch_embed=freeze_patch_embed,
            drop_path=drop_path,
        )
    )
    if weights is not None:
        load_start(model, weights_file(weights, backbone))
    return model


def build_matcher(
    backbone: str = "vit_small_patch16_224",
    *,
    img_size: int = 224,
    encoder_blocks: int = 8,
    fusion_blocks: int = 4,
    freeze_encoder: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    norm_eps: float | None = None,
    freeze_patch_embed: bool = False,
    drop_path: float = 0.0,
    weights: str | Path | None = None,
) -> Matcher:
    """A `Matcher` with random weights, those of a file as far as they fit (see `load_start`), or timm's own of the
    backbone (`weights="timm"`, or `"timm:NAME.TAG"`).

    The arguments are the fields of `MatcherConfig`. Raises ValueError on a value that does not fit.

    >>> import torch
    >>> options = dict(embed_dim=24, num_heads=2)
    >>> model = build_matcher(img_size=32, encoder_blocks=2, fusion_blocks=1, backbone_options=options).eval()
    >>> tokens = model.encode(torch.zeros(2, 3, 32, 32))
    >>> tokens.shape, model.fuse(tokens[:1], tokens[1:]).shape
    (torch.Size([2, 5, 24]), torch.Size([1]))
    """
    model = Matcher(
        MatcherConfig(
            backbone=backbone,
            backbone_options=dict(backbone_options or {}),
            img_size=img_size,
            encoder_blocks=encoder_blocks,
            fusion_blocks=fusion_blocks,
            freeze_encoder=freeze_encoder,
            norm_eps=norm_eps,
            freeze_patch_embed=freeze_patch_embed,
            drop_path=drop_path,
        )
    )
    if weights is not None:
        load_start(model, weights_file(weights, backbone))
    return model
