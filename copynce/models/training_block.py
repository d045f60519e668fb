"""A transformer block whose training step on a processor is one operation, with a backward pass of its own.

timm's block is some forty operations forward and twice as many back. The products are the same here; what goes are the
passes over memory between them: LayerScale is a factor of the weights (a row of a product, times a number, is the
product with that row times the number), the scale of attention one of its product, nothing is cast twice, and
gradients are added where they lie.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_aten: Any = torch.ops.aten
_jit: Any = torch.jit


class TrainingBlock(Block):
    """timm's block with pre-normalization, under the same names.

    Where gradients are asked for on a processor, its forward is one operation, if it `is_plain`; else it is timm's.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, N, C] of tokens [B, N, C]."""
        fused = attn_mask is None and not is_causal and self._trains_on_processor(x) and self.is_plain()
        if not fused:
            other: Tensor = super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
            return other
        modules: list[Any] = [self.attn, self.norm1, self.norm2]
        attn, norm1, norm2 = modules
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        form = _Form(dtype, attn.num_heads, attn.scale, norm1.eps, norm2.eps)
        made: Tensor = _OneBlock.apply(form, x, *self._weights())
        return made

    def is_plain(self) -> bool:
        """Whether it is norm, attention, norm, GELU between linear layers, and draws nothing at random."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        dropout = attn.attn_drop.p + attn.proj_drop.p + mlp.drop1.p + mlp.drop2.p
        drawing = self.training and (dropout > 0 or not isinstance(self.drop_path1, nn.Identity))
        return (
            type(attn) is Attention
            and type(mlp) is Mlp
            and not drawing
            and all(isinstance(norm, nn.LayerNorm) for norm in (self.norm1, self.norm2))
            and all(isinstance(layer, nn.Identity) for layer in (attn.q_norm, attn.k_norm, attn.norm, mlp.norm))
            and all(isinstance(layer, nn.Identity | LayerScale) for layer in (self.ls1, self.ls2))
            and attn.gate is None
            and isinstance(mlp.act, nn.GELU)
            and mlp.act.approximate == "none"
        )

    def _trains_on_processor(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling() or _jit.is_tracing():  # a program holds torch's own operators
            return False
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16:
            return False
        return x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def _weights(self) -> list[Tensor | None]:
        attn: Any = self.attn
        mlp: Any = self.mlp
        ls1, ls2 = (None if isinstance(layer, nn.Identity) else layer.gamma for layer in (self.ls1, self.ls2))
        first: list[Any] = [self.norm1, attn.qkv, attn.proj]
        second: list[Any] = [self.norm2, mlp.fc1, mlp.fc2]
        first, second = ([w for layer in layers for w in (layer.weight, layer.bias)] for layers in (first, second))
        return [*first, ls1, *second, ls2]


class _Form(NamedTuple):
    """What a block computes in, its attention heads, their factor, and the epsilons of its norms."""

    dtype: torch.dtype
    heads: int
    scale: float
    first_eps: float
    second_eps: float


class _OneBlock(torch.autograd.Function):
    """`TrainingBlock._weights` in, and for each a gradient out. Rows: the B N tokens, [B N, channels]."""

    @staticmethod
    def forward(ctx: Any, form: _Form, x: Tensor, *weights: Tensor | None) -> Tensor:
        norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias, ls1 = weights[:7]
        norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias, ls2 = weights[7:]
        batch, count, width = x.shape
        with torch.autocast("cpu", enabled=False):
            factors = [
                _scaled(weight, scale, form.dtype)
                for weight, scale in ((qkv, None), (proj, ls1), (fc1, None), (fc2, ls2))
            ]
            normal, mean1, rstd1 = torch.native_layer_norm(x, [width], norm1, norm1_bias, form.first_eps)
            rows1 = normal.view(-1, width).to(form.dtype)
            heads = _linear(rows1, factors[0], qkv_bias, None).view(batch, count, 3, form.heads, -1)
            query, key, value = heads.permute(2, 0, 3, 1, 4).reshape(3, batch * form.heads, count, -1).unbind(0)
            scores = torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=form.scale)
            shares = torch.softmax(scores, -1)
            seen = torch.bmm(shares, value).view(batch, form.heads, count, -1).transpose(1, 2).reshape(len(rows1), -1)
            between = _linear(seen, factors[1], proj_bias, ls1).view_as(x) + x
            normal, mean2, rstd2 = torch.native_layer_norm(between, [width], norm2, norm2_bias, form.second_eps)
            rows2 = normal.view(-1, width).to(form.dtype)
            hidden = _linear(rows2, factors[2], fc1_bias, None)
            active = torch.nn.functional.gelu(hidden)
            made = _linear(active, factors[3], fc2_bias, ls2).view_as(x) + between
        ctx.form = form
        first = (x, mean1, rstd1, rows1, query, key, value, shares, seen)
        second = (between, mean2, rstd2, rows2, hidden, active)
        ctx.save_for_backward(*first, *second, *factors, *weights)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        form: _Form = ctx.form
        saved = ctx.saved_tensors  # read once: they may be computed again for it
        x, mean1, rstd1, rows1, query, key, value, shares, seen = saved[:9]
        between, mean2, rstd2, rows2, hidden, active = saved[9:15]
        of_qkv, of_proj, of_fc1, of_fc2 = saved[15:19]
        norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias, ls1 = saved[19:26]
        norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias, ls2 = saved[26:]
        batch, count, width = x.shape
        needed = ctx.needs_input_grad[1:]
        with torch.autocast("cpu", enabled=False):
            rows = grad.reshape(-1, width).to(form.dtype)
            fc2_gradients = _weight_gradients(rows, active, fc2, fc2_bias, ls2, needed[12:15])
            rows = _aten.gelu_backward(rows @ of_fc2, hidden)
            fc1_gradients = _weight_gradients(rows, rows2, fc1, fc1_bias, None, needed[10:12])
            rows = (rows @ of_fc1).view_as(x).to(x.dtype)
            middle, *norm2_gradients = _aten.native_layer_norm_backward(
                rows, between, [width], mean2, rstd2, norm2, norm2_bias, [True, *needed[8:10]]
            )
            middle += grad
            rows = middle.view(-1, width).to(form.dtype)
            proj_gradients = _weight_gradients(rows, seen, proj, proj_bias, ls1, needed[5:8])
            rows = (rows @ of_proj).view(batch, count, form.heads, -1).transpose(1, 2).reshape(value.shape)
            heads = value.new_empty(3, *value.shape)
            torch.bmm(shares.mT, rows, out=heads[2])
            scores = _aten._softmax_backward_data(torch.bmm(rows, value.mT), shares, -1, shares.dtype)
            torch.baddbmm(heads[0], scores, key, beta=0, alpha=form.scale, out=heads[0])
            torch.baddbmm(heads[1], scores.mT, query, beta=0, alpha=form.scale, out=heads[1])
            rows = heads.view(3, batch, form.heads, count, -1).permute(1, 3, 0, 2, 4).reshape(len(rows1), -1)
            qkv_gradients = _weight_gradients(rows, rows1, qkv, qkv_bias, None, needed[3:5])
            rows = (rows @ of_qkv).view_as(x).to(x.dtype)
            given, *norm1_gradients = _aten.native_layer_norm_backward(
                rows, x, [width], mean1, rstd1, norm1, norm1_bias, needed[:3]
            )
            if given is not None:
                given += middle
        first = (*norm1_gradients, *qkv_gradients[:2], *proj_gradients)
        return None, given, *first, *norm2_gradients, *fc1_gradients[:2], *fc2_gradients


def _scaled(weight: Any, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] or bias [out] of a layer whose output is then multiplied by `scale` [out]."""
    if scale is not None:
        weight = weight * (scale[:, None] if weight.ndim == 2 else scale)
    scaled: Tensor = weight.to(dtype)
    return scaled


def _linear(rows: Tensor, factor: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """Rows [M, out] of a linear layer times `scale`, of which `factor` [out, in] is the scaled weight."""
    return rows @ factor.t() if bias is None else torch.addmm(_scaled(bias, scale, rows.dtype), rows, factor.t())


def _weight_gradients(
    rows: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `_linear`'s weight, bias and scale, of that of its output, [M, out]; None of all if none is
    needed."""
    if not any(needed):
        return None, None, None
    of_weight = (rows.t() @ inputs).to(weight.dtype)
    of_bias = None if bias is None else rows.sum(0).to(bias.dtype)
    if scale is None:
        return of_weight, of_bias, None
    of_scale = (of_weight * weight).sum(1)
    if bias is not None and of_bias is not None:
        of_scale += of_bias * bias
        of_bias *= scale
    return of_weight.mul_(scale[:, None]), of_bias, of_scale
