"""What models are built from; without torch, so that settings can be read and listed without it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The part that all kinds of models share."""

    backbone: str = "vit_small_patch16_224"
    """timm name of a vision transformer with a class token, or for a descriptor of a ResNet (`resnet50`)."""
    backbone_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of timm's `VisionTransformer` that differ from the named model: `embed_dim`, `depth`, `num_heads`...;
    for a ResNet, of its `ResNet`: `layers`, `channels`..."""
    img_size: int = 224
    """Side of the square input in pixels, a multiple of the patch size, of 32 for a ResNet."""
    norm_eps: float | None = None
    """LayerNorm epsilon; None: 1e-4 for `linear_bn` (released models), the backbone's own for `cls`. Not for a
    ResNet."""
    freeze_patch_embed: bool = True
    """Whether the patch embedding keeps its weights in training (released models: yes). A ResNet has none: all of it is
    trained."""
    drop_path: float = 0.0
    """Largest stochastic-depth rate, of the last block, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")
        if self.norm_eps is not None and not self.norm_eps > 0.0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the class called with them reverses it."""
        return {**dataclasses.asdict(self), "backbone_options": dict(self.backbone_options)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescriptorConfig(BackboneConfig):
    """What a descriptor is built from; stored beside its weights so that a checkpoint rebuilds itself."""

    head: Literal["linear_bn", "cls"] = "linear_bn"
    """`linear_bn`: the released head. `cls`: the class token after the backbone's own final norm, nothing to train
    beyond the backbone; for judging a pretrained backbone as it is."""
    dim: int = 512
    """Length of the descriptor; with `head="cls"` the encoder's width instead, and this is not used."""
    tokens_block: int = -1
    """Block whose raw output gives the patch tokens, counted from 0; negative counts from the end. Of a ResNet: stem
    and four stages."""
    second_class_block: int | None = None
    """A block before the last whose class token the head reads beside the last one's; none: the last one's alone, as
    released. Only with `head="linear_bn"`, and not for a ResNet."""
    freeze_blocks: int = 0
    """How many of the first blocks keep their weights in training, with all that comes before them: for training a
    descriptor on beside a matcher that shares them. Not for a ResNet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in ("linear_bn", "cls"):
            raise ValueError(f"head must be 'linear_bn' or 'cls', got {self.head!r}")
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")
        if self.head == "cls" and self.second_class_block is not None:
            raise ValueError("second_class_block must be none with head 'cls', which has nothing that reads it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatcherConfig(BackboneConfig):
    """What a matcher is built from; its blocks are those of the backbone, however many of them."""

    freeze_patch_embed: bool = False
    """Whether the patch embedding keeps its weights in training (released matchers: no)."""
    encoder_blocks: int = 8
    """Blocks that see one picture; the paper's splits are 8 + 4, 6 + 6 and 10 + 2."""
    fusion_blocks: int = 4
    """Blocks after them that see both pictures."""
    freeze_encoder: bool = False
    """Whether the whole encoder keeps its weights in training: those of the descriptor that it begins with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_blocks", "fusion_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
