"""The descriptor: a vision transformer, its class token made into one unit vector per picture.

    image [B, 3, S, S] -> patch embedding -> N pre-norm blocks -> class token -> linear (no bias)
                       -> BatchNorm -> L2 normalisation = descriptor [B, dim]
                                    -> raw output of one block, class token removed = patch tokens [B, L, C]

`B` pictures, `S` side in pixels, `L = (S / patch_size) ** 2` patches in row-major order, `C` channels of the
encoder. The names in the state dict are those of the method's released checkpoints: `encoder.*` as in timm's
`VisionTransformer` but without a final norm, `heads.linear_head.fc1.weight`, `heads.linear_head.bn.*`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import timm
import torch
import torch.distributed
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from copynce.models.precision import choose_attention
from copynce.models.settings import DescriptorConfig

RELEASED_NORM_EPS = 1e-4
"""LayerNorm epsilon that the released models were trained and evaluated with (DINO itself: 1e-6)."""

_OWN_OPTIONS = ("img_size", "in_chans", "num_classes", "global_pool", "class_token", "final_norm", "norm_layer",
                "drop_path_rate", "fc_norm", "device", "dtype")  # fmt: skip


class _AllReduceSum(torch.autograd.Function):
    """Sum over the ranks whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


class BatchNorm(nn.BatchNorm1d):
    """`BatchNorm1d` whose batch is that of all ranks: PyTorch's `SyncBatchNorm` refuses CPU tensors.

    x [B, dim] float32 -> [B, dim]. One process: exactly `BatchNorm1d`. Several: mean and variance over the rows of
    all ranks, which may hold different numbers of rows; gradients flow through them to every rank. Evaluation uses
    the running statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed and torch.distributed.get_world_size() > 1):
            if self.training and x.shape[0] < 2:
                raise ValueError(f"training needs at least 2 pictures a side for its BatchNorm, got {x.shape[0]}")
            return super().forward(x)
        # Two sums, not one of squares: E[x^2] - E[x]^2 loses digits where the mean is large.
        totals = _AllReduceSum.apply(torch.cat([x.sum(0), x.new_full((1,), float(x.shape[0]))]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        var = _AllReduceSum.apply((x - mean).square().sum(0)) / count
        with torch.no_grad():
            assert self.running_mean is not None, "made with running statistics"
            assert self.running_var is not None, "made with running statistics"
            assert self.num_batches_tracked is not None, "made with running statistics"
            assert self.momentum is not None, "made with a fixed momentum"
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class LinearHead(nn.Module):
    """Class token [B, C] -> linear without bias -> BatchNorm -> unit vector [B, dim], in float32."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, dim, bias=False)
        self.bn = BatchNorm(dim)
        nn.init.xavier_normal_(self.fc1.weight)

    def forward(self, cls_token: Tensor) -> Tensor:
        with torch.autocast(cls_token.device.type, enabled=False):
            return F.normalize(self.bn(self.fc1(cls_token.float())), dim=-1)


class Descriptor(nn.Module):
    """A picture's descriptor and patch tokens; see the module's text. Built by `build_descriptor`.

    Attributes: `config`, `img_size` (pixels), `patch_size` (pixels), `grid` (patches a side), `dim` (length of the
    descriptor), `channels` (of the patch tokens), `tokens_block` (from 0).
    """

    def __init__(self, config: DescriptorConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _build_encoder(config)
        depth = len(self.encoder.blocks)
        if not -depth <= config.tokens_block < depth:
            raise ValueError(
                f"tokens_block must lie in [{-depth}, {depth - 1}] for the {depth} blocks of {config.backbone!r}, "
                f"got {config.tokens_block}"
            )
        self.tokens_block = config.tokens_block % depth
        self.img_size = config.img_size
        self.patch_size = int(self.encoder.patch_embed.patch_size[0])
        self.grid = config.img_size // self.patch_size
        self.channels = int(self.encoder.embed_dim)
        self.heads = nn.ModuleDict()
        if config.head == "linear_bn":
            self.heads["linear_head"] = LinearHead(self.channels, config.dim)
            self.dim = config.dim
        else:
            self.dim = self.channels
        if config.freeze_patch_embed:
            self.encoder.patch_embed.requires_grad_(False)

    def forward(self, images: Tensor, sides: int = 1, *, tokens: bool = True) -> tuple[Tensor, Tensor | None]:
        """Descriptors [B, dim], float32 of length 1, and patch tokens [B, L, C] of block `tokens_block`.

        images: float [B, 3, S, S], normalised, S = `img_size`. sides: number of equal parts of the batch that pass
        the head one after the other, so that its BatchNorm takes the statistics of each by itself; a training step on
        pairs runs the encoder once, `model(torch.cat([query, reference]), sides=2)`, and splits both results with
        `.chunk(2)`. Without effect in evaluation. Patch tokens are the residual stream itself, no norm, prefix
        tokens removed, in the encoder's dtype. tokens: False where only descriptors are wanted; then None stands for
        the patch tokens and, in evaluation, the last block does not make them. Raises ValueError on another shape or a
        batch not divisible by sides.
        """
        expected = (3, self.img_size, self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [B, 3, {self.img_size}, {self.img_size}] for this model, got {list(images.shape)}"
            )
        if sides < 1 or images.shape[0] % sides:
            raise ValueError(f"sides must divide the batch of {images.shape[0]} pictures, got {sides}")
        choose_attention(self.encoder, images.device)
        cls_token, patch_tokens = self._encode(images) if tokens else (self._encode_class_token(images), None)
        if self.config.head == "cls":
            with torch.autocast(images.device.type, enabled=False):
                return F.normalize(self.encoder.norm(cls_token.float()), dim=-1), patch_tokens
        head = self.heads["linear_head"]
        return torch.cat([head(side) for side in cls_token.chunk(sides)]), patch_tokens

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class token [B, C] of the last block and patch tokens [B, L, C] of block `tokens_block`."""
        outputs = self._outputs(images, [self.tokens_block, len(self.encoder.blocks) - 1])
        return outputs[-1][1][:, 0], outputs[0][0]

    def _encode_class_token(self, images: Tensor) -> Tensor:
        """Class token [B, C] of the last block, which makes no other token where its form is known."""
        last = len(self.encoder.blocks) - 1
        block = self.encoder.blocks[last]
        if last == 0 or self.training or type(block) is not Block or type(block.attn) is not Attention:
            return self._outputs(images, [last])[0][1][:, 0]
        patch_tokens, prefix = self._outputs(images, [last - 1])[0]
        return _class_token(block, torch.cat([prefix, patch_tokens], dim=1))

    def _outputs(self, images: Tensor, blocks: list[int]) -> Any:
        """(patch tokens, prefix tokens) of each of `blocks`; what comes after the last of them is not computed."""
        return self.encoder.forward_intermediates(
            images,
            indices=blocks,
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )


def _class_token(block: Any, tokens: Tensor) -> Tensor:
    """The first of the tokens [B, N, C] that `block` makes in evaluation, [B, C]: its query against all keys."""
    attn = block.attn
    normal = block.norm1(tokens)
    width = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    query = F.linear(normal[:, :1], weight[:width], None if bias is None else bias[:width])
    key, value = F.linear(normal, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
    query, key, value = (x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    seen = F.scaled_dot_product_attention(attn.q_norm(query), attn.k_norm(key), value)
    seen = attn.norm(seen.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        seen = seen * attn.gate(normal[:, :1]).sigmoid()
    token = tokens[:, :1] + block.ls1(attn.proj(seen))
    return (token + block.ls2(block.mlp(block.norm2(token))))[:, 0]


def _build_encoder(config: DescriptorConfig) -> VisionTransformer:
    """The timm transformer of a config, without classifier; ValueError where name or options do not fit."""
    names = timm.list_models(module="vision_transformer")
    if config.backbone not in names:
        near = difflib.get_close_matches(config.backbone, names, n=4)
        hint = f"; near names: {', '.join(near)}" if near else ", for example vit_small_patch16_224"
        raise ValueError(f"backbone must name a plain vision transformer of timm, got {config.backbone!r}{hint}")
    known = [name for name in inspect.signature(VisionTransformer.__init__).parameters if name != "self"]
    for name in config.backbone_options:
        if name in _OWN_OPTIONS:
            raise ValueError(f"backbone_options may not set {name!r}: the descriptor sets it itself")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or ["embed_dim", "depth", "num_heads", "patch_size"]
            raise ValueError(f"backbone_options has no {name!r}; near names: {', '.join(near)}")
    options: dict[str, Any] = dict(config.backbone_options)
    width, heads = options.get("embed_dim"), options.get("num_heads")
    if width is not None and heads is not None and width % heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads, got {width} and {heads}")
    eps = config.norm_eps
    if eps is None and config.head == "linear_bn":
        eps = RELEASED_NORM_EPS
    if eps is not None:
        options["norm_layer"] = partial(nn.LayerNorm, eps=eps)
    encoder = timm.create_model(
        config.backbone,
        pretrained=False,
        img_size=config.img_size,
        num_classes=0,
        drop_path_rate=config.drop_path,
        final_norm=config.head == "cls",
        **options,
    )
    if not isinstance(encoder, VisionTransformer) or not encoder.has_class_token:
        raise ValueError(f"backbone must have a class token, {config.backbone!r} has none")
    patch = encoder.patch_embed.patch_size
    if patch[0] != patch[1] or config.img_size < patch[0] or config.img_size % patch[0]:
        raise ValueError(
            f"img_size must be a multiple of the patch size {patch[0]} of {config.backbone!r}, got {config.img_size}"
        )
    return encoder


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as two optimiser groups: those that decay, and those that must not.

    No weight decay for scalars and 1-D parameters (biases, norms, LayerScale, a learned temperature), position
    embeddings and class or register tokens. Frozen parameters are left out. Works on any module that contains a
    descriptor.
    """
    exempt = ("pos_embed", "cls_token", "reg_token")
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in _trainable(model.named_parameters()):
        plain = parameter.ndim <= 1 or name.rpartition(".")[2] in exempt
        (undecayed if plain else decayed).append(parameter)
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _trainable(named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]
