"""The descriptor: a vision transformer, its class token made into one unit vector per picture.

    image [B, 3, S, S] -> patch embedding -> N pre-norm blocks -> class token (*) -> linear (no bias)
                       -> BatchNorm -> L2 normalisation = descriptor [B, dim]
                                    -> raw output of one block, class token removed = patch tokens [B, L, C]

`B` pictures, `S` side in pixels, `L = (S / patch_size) ** 2` patches in row-major order, `C` channels of the encoder.
(*) With `second_class_block` that of an earlier block beside it, [B, 2 C]. On a ResNet the average of the last map
stands for the class token, and the maps of stem and stages for the blocks (PROTOCOLS 9.6). The names in the state dict
are those of the method's released checkpoints: `encoder.*` as in timm's `VisionTransformer` but without a final norm,
`heads.linear_head.fc1.weight`, `heads.linear_head.bn.*`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from copynce.models.backbone import (
    RELEASED_NORM_EPS,
    build_encoder,
    class_blocks,
    class_token_of,
    freeze_first,
    levels_of,
    normal,
    outputs_of,
    tokens_of,
)
from copynce.models.layers import LinearHead
from copynce.models.pretrained import Pretrained
from copynce.models.settings import DescriptorConfig


class Descriptor(Pretrained, nn.Module):
    """A picture's descriptor and patch tokens; see the module's text. Built by `build_descriptor`.

    Attributes: `config`, `img_size` (pixels), `patch_size` (pixels), `grid` (patches a side), `dim` (length of the
    descriptor), `channels` (of the patch tokens), `tokens_block` and `second_class_block` (from 0). Of a ResNet,
    patches are the cells of the map that `tokens_block` names: the stem's, then the four stages', the last of 32 px.
    """

    def __init__(self, config: DescriptorConfig) -> None:
        super().__init__()
        self.config = config
        released = config.head == "linear_bn"
        self.encoder: Any = build_encoder(
            config, norm_eps=RELEASED_NORM_EPS if released else None, final_norm=not released
        )
        levels = levels_of(self.encoder)
        self.tokens_block = self._block("tokens_block", config.tokens_block, len(levels), 0)
        self.second_class_block: int | None = None
        if config.second_class_block is not None:
            self._no_resnet("second_class_block", "none")
            self.second_class_block = self._block("second_class_block", config.second_class_block, len(levels), 1)
        if config.freeze_blocks:
            self._no_resnet("freeze_blocks", "0")
            freeze_first(self.encoder, config.freeze_blocks)
        self.img_size = config.img_size
        self.patch_size, self.channels = levels[self.tokens_block]
        self.grid = config.img_size // self.patch_size
        self.heads = nn.ModuleDict()
        self.dim = levels[-1][1]
        if config.head == "linear_bn":
            read = self.dim if self.second_class_block is None else 2 * self.dim
            self.heads["linear_head"] = LinearHead(read, config.dim)
            self.dim = config.dim

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
        self._check(images)
        if sides < 1 or images.shape[0] % sides:
            raise ValueError(f"sides must divide the batch of {images.shape[0]} pictures, got {sides}")
        patch_tokens: Tensor | None = None
        if tokens:
            cls_token, patch_tokens = tokens_of(self.encoder, images, self.tokens_block, self.second_class_block)
        else:
            cls_token = self.class_token(images)
        return self._described(cls_token, sides), patch_tokens

    def class_token(self, images: Tensor) -> Tensor:
        """What the head reads, [B, C], or [B, 2 C] with `second_class_block`; of pictures as `forward` takes them."""
        self._check(images)
        return class_token_of(self.encoder, images, self.second_class_block)

    def with_encodings(self, images: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, and the tokens [B, P + L, C] after the first `blocks` blocks: what a matcher with those blocks
        encodes, in the same pass. Not for a ResNet."""
        self._check(images)
        wanted = class_blocks(self.encoder, self.second_class_block)
        outputs = outputs_of(self.encoder, images, [self.tokens_block, blocks - 1, *wanted])
        patches, prefix = outputs[blocks - 1]
        cls_token = torch.cat([outputs[block][1][:, 0] for block in wanted], dim=1)
        return self._described(cls_token, 1), outputs[self.tokens_block][0], torch.cat([prefix, patches], dim=1)

    def _block(self, name: str, block: int, depth: int, last: int) -> int:
        """A setting's block from 0, of all but the `last` ones."""
        if not -depth <= block < depth or block % depth >= depth - last:
            but = f" but the last {last}" if last else ""
            raise ValueError(
                f"{name} must lie in [{-depth}, {depth - 1 - last}] for the {depth} blocks{but} of "
                f"{self.config.backbone!r}, got {block}"
            )
        return block % depth

    def _no_resnet(self, name: str, instead: str) -> None:
        if isinstance(self.encoder, ResNet):
            raise ValueError(f"{name} must be {instead} for a ResNet, {self.config.backbone!r}")

    def _check(self, images: Tensor) -> None:
        expected = (3, self.img_size, self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [B, 3, {self.img_size}, {self.img_size}] for this model, got {list(images.shape)}"
            )

    def _described(self, cls_token: Tensor, sides: int) -> Tensor:
        """Descriptors [B, dim] of what `class_token` gives."""
        if self.config.head == "cls":
            with torch.autocast(cls_token.device.type, enabled=False):
                return F.normalize(normal(self.encoder, cls_token.float()), dim=-1)
        head = self.heads["linear_head"]
        if sides == 1:
            return head(cls_token)
        return torch.cat([head(side) for side in cls_token.chunk(sides)])
