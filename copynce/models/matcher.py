"""The matcher: one score for a pair of pictures, from the patch tokens of both.

    image [B, 3, S, S] -> patch embedding -> encoder blocks, no norm = tokens [B, P + L, C]     once a picture
    fusion token, query tokens, reference tokens -> fusion blocks -> norm                       once a pair
        -> cls_head: norm -> fusion token -> linear = logit [B]
        -> fusion_head: norm = fused patch tokens of both sides [B, L, C], which CopyNCE draws together in training

`P` prefix tokens (the class token, and registers where the backbone has them), `L` patches in row-major order, `C`
channels. Nothing tells a side from the other, so that a pair's score is the same either way round (PROTOCOLS 4.1). The
names in the state dict are those of the method's released checkpoints (PROTOCOLS 9.4).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from copynce.models.backbone import RELEASED_NORM_EPS, build_transformer, first_token_of
from copynce.models.pretrained import Pretrained
from copynce.models.settings import MatcherConfig


class Matcher(Pretrained, nn.Module):
    """Whether one picture is a copy of the other; see the module's text. Built by `build_matcher`.

    Attributes: `config`, `img_size` (pixels), `patch_size` (pixels), `grid` (patches a side), `channels` (of tokens),
    `prefix_tokens` (before the patches).
    """

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        blocks = config.encoder_blocks + config.fusion_blocks
        # All blocks are made as those of one backbone, and then divided.
        self.encoder = build_transformer(config, norm_eps=RELEASED_NORM_EPS, final_norm=True, depth=blocks)
        made = list(self.encoder.blocks)
        self.encoder.blocks = nn.Sequential(*made[: config.encoder_blocks])
        self.fusion = _Fusion(nn.Sequential(*made[config.encoder_blocks :]), self.encoder.norm, self.encoder.embed_dim)
        self.encoder.norm = nn.Identity()
        if config.freeze_encoder:
            self.encoder.requires_grad_(False)
        self.patch_size = int(self.encoder.patch_embed.patch_size[0])
        self.img_size = config.img_size
        self.grid = config.img_size // self.patch_size
        self.channels = int(self.encoder.embed_dim)
        self.prefix_tokens = int(self.encoder.num_prefix_tokens)
        eps: Any = self.fusion.norm.eps
        self.heads = nn.ModuleDict(
            {"cls_head": _ClassHead(self.channels, eps), "fusion_head": _FusionHead(self.channels, eps)}
        )

    def forward(self, query: Tensor, reference: Tensor) -> Tensor:
        """Logits [B] of pairs of pictures, float [B, 3, S, S] each, normalised, S = `img_size`.

        The sigmoid of a logit is the released score. Raises ValueError on another shape.
        """
        return self.fuse(*self._encoded(query, reference))

    def with_tokens(self, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, and the fused patch tokens [B, L, C] of query and reference, for CopyNCE."""
        return self.fuse_with_tokens(*self._encoded(query, reference))

    def encode(self, images: Tensor) -> Tensor:
        """Tokens [N, P + L, C] of pictures, float [N, 3, S, S], for any number of pairs that they take part in."""
        expected = (3, self.img_size, self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [N, 3, {self.img_size}, {self.img_size}] for this model, got {list(images.shape)}"
            )
        tokens: Tensor = self.encoder.forward_features(images)
        return tokens

    def fuse(self, query_tokens: Tensor, reference_tokens: Tensor) -> Tensor:
        """Logits [B], float32, of pairs of encodings [B, P + L, C].

        The last block makes the fusion token alone, but where stochastic depth trains it. Raises ValueError on another
        shape.
        """
        tokens, last = self._fused(query_tokens, reference_tokens), self.fusion.blocks[-1]
        dropped = self.training and self.config.drop_path > 0
        first = last(tokens)[:, 0] if dropped else first_token_of(last, tokens)
        return self._logits(self.fusion.norm(first))

    def fuse_with_tokens(self, query_tokens: Tensor, reference_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `fuse`, and the fused patch tokens [B, L, C] of query and reference."""
        last = self.fusion.blocks[-1]
        tokens = self.fusion.norm(last(self._fused(query_tokens, reference_tokens)))
        query, reference = tokens[:, 1:].chunk(2, dim=1)
        head = self.heads["fusion_head"]
        return (
            self._logits(tokens[:, 0]),
            head(query[:, self.prefix_tokens :]),
            head(reference[:, self.prefix_tokens :]),
        )

    def _encoded(self, query: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
        if query.shape != reference.shape:
            raise ValueError(
                f"query and reference must have one shape, got {list(query.shape)} and {list(reference.shape)}"
            )
        return self.encode(torch.cat([query, reference])).chunk(2)

    def _fused(self, query_tokens: Tensor, reference_tokens: Tensor) -> Tensor:
        """The tokens [B, 1 + 2 (P + L), C] that go into the last fusion block."""
        expected = (self.prefix_tokens + self.grid**2, self.channels)
        for name, tokens in (("query_tokens", query_tokens), ("reference_tokens", reference_tokens)):
            if tokens.ndim != 3 or tuple(tokens.shape[1:]) != expected or tokens.shape[0] != query_tokens.shape[0]:
                raise ValueError(
                    f"{name} must be encodings [B, {expected[0]}, {expected[1]}] of this model, as many as of "
                    f"the other side, got {list(tokens.shape)}"
                )
        first = self.fusion.cls_token.expand(query_tokens.shape[0], -1, -1).to(query_tokens.dtype)
        tokens = torch.cat([first, query_tokens, reference_tokens], dim=1)
        for block in self.fusion.blocks[:-1]:
            tokens = block(tokens)
        return tokens

    def _logits(self, first: Tensor) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            logits: Tensor = self.heads["cls_head"](first.float())
        return logits


class _Fusion(nn.Module):
    """The blocks that see both pictures, and their own class token."""

    def __init__(self, blocks: nn.Sequential, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, channels), std=0.02))
        self.blocks = blocks
        self.norm = norm


class _ClassHead(nn.Module):
    """Fused token [B, C] -> norm -> logit [B]."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)
        self.classifier = nn.Linear(channels, 1)
        trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, token: Tensor) -> Tensor:
        logit: Tensor = self.classifier(self.norm(token))
        return logit.squeeze(-1)


class _FusionHead(nn.Module):
    """Fused patch tokens -> norm: what CopyNCE compares."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, tokens: Tensor) -> Tensor:
        normal: Tensor = self.norm(tokens)
        return normal
