"""What a training tells its loader."""

from __future__ import annotations

from typing import Literal

import torch

from copynce.training.config import TrainConfig
from dali_pipelines import LoaderOptions

#: What autocast would make of the views at the model's first product, by precision.
DTYPES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


def loader_options(config: TrainConfig, pairs: int, device: torch.device, precision: str) -> LoaderOptions:
    """The options of a loader of batches of at most ``pairs`` pairs, for an encoder of ``precision`` on ``device``."""
    return LoaderOptions(
        size=config.model.img_size,
        batch_size=pairs,
        device="gpu" if device.type == "cuda" else "cpu",
        threads=config.data.threads,
        max_pixels=int(config.data.max_megapixels * 1e6),
        dtype=DTYPES[precision],
    )
