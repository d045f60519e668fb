"""The backbone of every model: timm's vision transformer, or for descriptors a ResNet, and the tokens that it gives."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models import VisionTransformer
from timm.models.resnet import ResNet
from torch import Tensor, nn

from copynce.models.resnet import build_resnet, is_resnet_name, pooled_of, stage_tokens_of, stages_of
from copynce.models.settings import BackboneConfig
from copynce.models.training_block import TrainingBlock

Encoder = VisionTransformer | ResNet

RELEASED_NORM_EPS = 1e-4
"""LayerNorm epsilon that the released models were trained and evaluated with (DINO itself: 1e-6)."""

_OWN_OPTIONS = ("img_size", "in_chans", "num_classes", "global_pool", "class_token", "final_norm", "norm_layer",
                "drop_path_rate", "fc_norm", "device", "dtype", "block_fn")  # fmt: skip


def build_encoder(config: BackboneConfig, *, norm_eps: float | None, final_norm: bool) -> Encoder:
    """The encoder of a descriptor: `build_transformer`, or a ResNet where the config names one, which has no norms."""
    if is_resnet_name(config.backbone):
        return build_resnet(config)
    return build_transformer(config, norm_eps=norm_eps, final_norm=final_norm)


def build_transformer(
    config: BackboneConfig, *, norm_eps: float | None, final_norm: bool, depth: int | None = None
) -> VisionTransformer:
    """The timm transformer of a config, without classifier; ValueError where name or options do not fit.

    norm_eps: where the config tells none; None: the backbone's own. final_norm: whether it has a norm after its blocks.
    depth: number of blocks, where the model and not the backbone says it.
    """
    names = timm.list_models(module="vision_transformer")
    if config.backbone not in names:
        near = difflib.get_close_matches(config.backbone, names, n=4)
        hint = f"; near names: {', '.join(near)}" if near else ", for example vit_small_patch16_224"
        if is_resnet_name(config.backbone):
            raise ValueError(f"backbone must be a vision transformer for a matcher, got {config.backbone!r}")
        raise ValueError(
            f"backbone must name a plain vision transformer of timm, or a ResNet, got {config.backbone!r}{hint}"
        )
    known = [name for name in inspect.signature(VisionTransformer.__init__).parameters if name != "self"]
    for name in config.backbone_options:
        if name in _OWN_OPTIONS:
            raise ValueError(f"backbone_options may not set {name!r}: the model sets it itself")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or ["embed_dim", "depth", "num_heads", "patch_size"]
            raise ValueError(f"backbone_options has no {name!r}; near names: {', '.join(near)}")
    options: dict[str, Any] = dict(config.backbone_options)
    width, heads = options.get("embed_dim"), options.get("num_heads")
    if isinstance(heads, int) and heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {heads}")
    if width is not None and heads is not None and width % heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads, got {width} and {heads}")
    eps = norm_eps if config.norm_eps is None else config.norm_eps
    if depth is not None:
        if "depth" in options:
            raise ValueError("backbone_options may not set 'depth': encoder_blocks and fusion_blocks say it")
        options["depth"] = depth
    if eps is not None:
        options["norm_layer"] = partial(nn.LayerNorm, eps=eps)
    encoder = timm.create_model(
        config.backbone,
        pretrained=False,
        img_size=config.img_size,
        num_classes=0,
        drop_path_rate=config.drop_path,
        final_norm=final_norm,
        block_fn=TrainingBlock,
        **options,
    )
    if not isinstance(encoder, VisionTransformer) or not encoder.has_class_token:
        raise ValueError(f"backbone must have a class token, {config.backbone!r} has none")
    patch = encoder.patch_embed.patch_size
    if patch[0] != patch[1] or config.img_size < patch[0] or config.img_size % patch[0]:
        raise ValueError(
            f"img_size must be a multiple of the patch size {patch[0]} of {config.backbone!r}, got {config.img_size}"
        )
    if config.freeze_patch_embed:
        encoder.patch_embed.requires_grad_(False)
    return encoder


def levels_of(encoder: Encoder) -> list[tuple[int, int]]:
    """(patch size in pixels, channels) of everything that can give patch tokens, in order: the blocks, or the stem and
    the four stages of a ResNet."""
    if isinstance(encoder, ResNet):
        return stages_of(encoder)
    return [(int(encoder.patch_embed.patch_size[0]), int(encoder.embed_dim))] * len(encoder.blocks)


def blocks_of(encoder: Encoder) -> Iterable[nn.Module]:
    """The blocks with attention."""
    return () if isinstance(encoder, ResNet) else encoder.blocks


def normal(encoder: Encoder, token: Tensor) -> Tensor:
    """Class token [B, C] after the encoder's final norm; a ResNet has none."""
    return token if isinstance(encoder, ResNet) else encoder.norm(token)


def freeze_first(encoder: Any, blocks: int) -> None:
    """Exclude the first blocks from training, and all that comes before them."""
    depth = len(encoder.blocks)
    if not 0 < blocks <= depth:
        raise ValueError(f"freeze_blocks must lie in [0, {depth}] for this backbone, got {blocks}")
    later = {id(parameter) for block in encoder.blocks[blocks:] for parameter in block.parameters()}
    later |= {id(parameter) for parameter in encoder.norm.parameters()}
    for parameter in encoder.parameters():
        if id(parameter) not in later:
            parameter.requires_grad_(False)


def class_blocks(encoder: VisionTransformer, second: int | None) -> list[int]:
    """The blocks whose class tokens a head reads, in its order: the last one, and a second one if there is any."""
    last = len(encoder.blocks) - 1
    return [last] if second is None else [last, second]


def tokens_of(encoder: Encoder, images: Tensor, level: int, second: int | None = None) -> tuple[Tensor, Tensor]:
    """Class token [B, C] of the last block, that of a second block beside it [B, 2 C], and patch tokens [B, L, C'] of
    one of the levels: raw residual streams."""
    if isinstance(encoder, ResNet):
        return stage_tokens_of(encoder, images, level)
    wanted = class_blocks(encoder, second)
    outputs = outputs_of(encoder, images, [level, *wanted])
    return torch.cat([outputs[block][1][:, 0] for block in wanted], dim=1), outputs[level][0]


def class_token_of(encoder: Encoder, images: Tensor, second: int | None = None) -> Tensor:
    """The class token of `tokens_of`, in evaluation by `first_token_of`; of a ResNet what stands for it."""
    if isinstance(encoder, ResNet):
        return pooled_of(encoder, images)
    last, *others = class_blocks(encoder, second)
    before = [last] if last == 0 or encoder.training else [last - 1]
    outputs = outputs_of(encoder, images, [*before, *others])
    if before == [last]:
        token = outputs[last][1][:, 0]
    else:
        patch_tokens, prefix = outputs[last - 1]
        token = first_token_of(encoder.blocks[last], torch.cat([prefix, patch_tokens], dim=1))
    return torch.cat([token, *(outputs[block][1][:, 0] for block in others)], dim=1)


def outputs_of(encoder: VisionTransformer, images: Tensor, blocks: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """{block: (patch tokens [B, L, C], prefix tokens [B, P, C])} of each of `blocks`; what comes after the last of them
    is not computed."""
    wanted = sorted(set(blocks))
    found: Any = encoder.forward_intermediates(
        images,
        indices=wanted,
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return dict(zip(wanted, found, strict=True))


def first_token_of(block: Any, tokens: Tensor) -> Tensor:
    """The first of the tokens that `block` makes of tokens [B, N, C], [B, C]: its query against all keys.

    Makes no other token where the block's form is known, and then leaves stochastic depth out. Keys and values are not
    made either: of one query q_h = W_q x_1 a head, q_h (W_k x_j + b_k) is (W_k' q_h) x_j and the same for all j, which
    the softmax does not see, and the sum of a_j (W_v x_j + b_v) is W_v (sum of a_j x_j) + b_v.
    """
    attn = block.attn if isinstance(block, TrainingBlock) else None
    if type(attn) is not Attention or not isinstance(attn.k_norm, nn.Identity):
        made: Tensor = block(tokens)
        return made[:, 0]
    normal = block.norm1(tokens)
    width = attn.num_heads * attn.head_dim
    weights = attn.qkv.weight.split(width)
    biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.split(width)
    query = attn.q_norm(F.linear(normal[:, 0], weights[0], biases[0]).unflatten(-1, (attn.num_heads, -1)))
    asked = torch.einsum("bhd,hdc->bhc", query, weights[1].unflatten(0, (attn.num_heads, -1)))
    seen = F.scaled_dot_product_attention(asked, normal, normal, scale=attn.scale)
    seen = torch.einsum("bhc,hdc->bhd", seen, weights[2].unflatten(0, (attn.num_heads, -1))).flatten(1)
    seen = attn.norm(seen if biases[2] is None else seen + biases[2]).unsqueeze(1)
    if attn.gate is not None:
        seen = seen * attn.gate(normal[:, :1]).sigmoid()
    token = tokens[:, :1] + block.ls1(attn.proj(seen))
    return (token + block.ls2(block.mlp(block.norm2(token))))[:, 0]
