"""Descriptors of many pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from copynce.data import DataError, Manifest, Quarantine
from copynce.evaluation.search import normalised
from dali_pipelines import PictureLoader


@dataclass(frozen=True)
class Features:
    """Descriptors with the pictures they belong to, in manifest order; broken pictures are left out.

    uuids: N names. values: float32 [N, D], rows of length 1.
    """

    uuids: list[str]
    values: NDArray[np.float32]


def extract(
    model: nn.Module,
    manifest: Manifest,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    quarantine: Quarantine | None = None,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """The descriptors that `model` gives the pictures of `manifest`, by the protocol of CopyNCE.

    Each picture is resized to the model's square input whatever its aspect ratio (bicubic, antialiased, no EXIF
    rotation) and normalised; the descriptor is L2-normalised once more after the forward pass.

    model: maps float32 [B, 3, S, S] to (descriptor [B, D], patch tokens); S is its attribute `img_size`. It runs in
        evaluation mode on `device` and is given back in the mode it came in.
    batch_size: pictures per forward pass. device: "cpu" or a CUDA device; pictures are decoded on the same one.
    quarantine: receives the broken pictures. threads: CPU threads that read and decode.
    progress: called after each batch, and at the end, with the number of pictures done so far, broken ones included.
    Raises TypeError if the model has no `img_size`, DataError if no picture can be decoded, ValueError if the model
    gives a descriptor that is zero or not finite.
    """
    size = getattr(model, "img_size", None)
    if not isinstance(size, int):
        raise TypeError(f"model must have an integer attribute img_size, its input's side in pixels, got {size!r}")
    device = torch.device(device)
    broken = Quarantine() if quarantine is None else quarantine
    loader = PictureLoader(
        manifest.paths,
        size=size,
        batch_size=batch_size,
        device="gpu" if device.type == "cuda" else "cpu",
        device_id=device.index,
        threads=threads,
        on_broken=broken.add,
    )
    kept: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float32]] = []
    was_training = model.training
    model.to(device).eval()
    try:
        with torch.inference_mode():
            for indices, images in loader:
                descriptor, _ = model(images.to(device, non_blocking=True))
                kept.append(np.asarray(indices, dtype=np.int64))
                values.append(descriptor.float().cpu().numpy())
                if progress is not None:
                    progress(int(indices[-1]) + 1)
    finally:
        model.train(was_training)
    if progress is not None:
        progress(len(manifest))  # the last ones may be broken
    if not kept:
        raise DataError(f"{manifest.root}: none of the {len(manifest)} pictures could be decoded; {broken.summary()}")
    order = np.argsort(np.concatenate(kept))
    rows = np.concatenate(kept)[order]
    return Features(
        [manifest.uuids[row] for row in rows], normalised(np.concatenate(values)[order], "descriptors of the model")
    )
