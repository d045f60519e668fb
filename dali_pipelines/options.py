"""What all loaders can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dali_pipelines.sources import MAX_PIXELS

Device = Literal["cpu", "gpu"]
Dtype = Literal["float32", "float16", "bfloat16"]

#: ImageNet statistics of R, G, B on the [0, 1] scale (PROTOCOLS 2), by which all views are normalised.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Plain values, the same in the loader's process and in its workers; ValueError for one that cannot be.

    size: side of the views in pixels. batch_size: most pairs or pictures of a batch. device: where pictures are decoded
    and edited and where batches lie; ``device_id``: which GPU, None for torch's current one. threads: that read, decode
    and edit on the CPU; batches do not depend on it. max_pixels: a picture of more is broken. dtype: of the views.
    """

    size: int
    batch_size: int
    device: Device = "cpu"
    device_id: int | None = None
    threads: int = 2
    max_pixels: int = MAX_PIXELS
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        for name, kind in (("device", Device), ("dtype", Dtype)):
            if getattr(self, name) not in get_args(kind):
                *most, last = map(repr, get_args(kind))
                raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {getattr(self, name)!r}")
        for name in ("size", "batch_size", "threads", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
