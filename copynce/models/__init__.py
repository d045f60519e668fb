"""Vision transformers that turn pictures into descriptors and patch tokens, and their files."""

from __future__ import annotations

from copynce.models.build import build_descriptor
from copynce.models.checkpoints import (
    load_backbone,
    load_checkpoint,
    load_start,
    read_checkpoint_metadata,
    save_checkpoint,
    start_card,
)
from copynce.models.descriptor import Descriptor, DescriptorConfig, param_groups

__all__ = [
    "Descriptor",
    "DescriptorConfig",
    "build_descriptor",
    "load_backbone",
    "load_checkpoint",
    "load_start",
    "param_groups",
    "read_checkpoint_metadata",
    "save_checkpoint",
    "start_card",
]
