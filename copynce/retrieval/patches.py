"""Patch tokens of whole pictures, beside the descriptor or the score: what `copynce.copies.regions` asks.

Shapes: D numbers of a descriptor, L patches of C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from copynce.errors import DataError
from copynce.models import Descriptor, Matcher
from copynce.retrieval.crops import one_of_one
from dali_pipelines import CropLoader, LoaderOptions, PictureLoader
from dali_pipelines.sources import AnyPath


@dataclass(frozen=True)
class PatchedPictures:
    """places: int64 [b], which of the pictures these are. descriptors: float32 [b, D], unit rows. tokens: float32
    [b, L, C], the residual stream itself."""

    places: NDArray[np.int64]
    descriptors: NDArray[np.float32]
    tokens: NDArray[np.float32]


@dataclass(frozen=True)
class PatchedPair:
    """score: the cosine of two descriptors, or the sigmoid of a matcher's logit. query, reference: tokens [L, C]."""

    score: float
    query: NDArray[np.float32]
    reference: NDArray[np.float32]


def with_patches(
    model: Descriptor,
    paths: Sequence[AnyPath],
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    threads: int = 2,
    on_broken: Callable[[AnyPath, str], None],
) -> Iterator[PatchedPictures]:
    """Descriptors and patch tokens of pictures, prepared as for `extract`, in float32, a batch at a time.

    on_broken: told (path, reason) of each picture that cannot be used, which is left out.
    """
    device = torch.device(device)
    model.to(device).eval()
    options = LoaderOptions(
        size=model.img_size,
        batch_size=max(1, min(batch_size, len(paths))),
        device="gpu" if device.type == "cuda" else "cpu",
        device_id=device.index,
        threads=threads,
    )
    for places, images in PictureLoader(paths, options, on_broken=on_broken):
        with torch.inference_mode():
            descriptors, tokens = model(images.to(device, non_blocking=True))
        assert tokens is not None, "asked for"
        yield PatchedPictures(
            np.asarray(places, np.int64), descriptors.float().cpu().numpy(), tokens.float().cpu().numpy()
        )


def patched_pair(
    model: Descriptor | Matcher,
    query: AnyPath,
    reference: AnyPath,
    *,
    device: torch.device | str = "cpu",
) -> PatchedPair:
    """The score of a pair of pictures and the patch tokens of both: a descriptor's, or as a matcher fuses them.

    Raises DataError for a picture that cannot be used, or where the score is no finite number.
    """
    device = torch.device(device)
    model.to(device).eval()

    def broken(path: AnyPath, reason: str) -> None:
        raise DataError(f"{path} cannot be used: {reason}")

    paths = [query, reference]
    # The same pixels as PictureLoader's from a small graph, which begins at once.
    loader = CropLoader(
        paths, one_of_one, LoaderOptions(size=model.img_size, batch_size=2, threads=1), on_broken=broken
    )
    images = torch.cat([views[:, 0] for _, views in loader]).to(device)
    with torch.inference_mode():
        if isinstance(model, Matcher):
            logits, *tokens = model.with_tokens(images[:1], images[1:])
            score = float(logits[0].sigmoid())
            pair = tokens[0][0], tokens[1][0]
        else:
            descriptors, both = model(images)
            assert both is not None, "asked for"
            score = float(descriptors[0].float() @ descriptors[1].float())
            pair = both[0], both[1]
    if not np.isfinite(score):
        raise DataError(f"the score of {query} and {reference} is not finite; the model's weights are damaged")
    return PatchedPair(score, *(side.float().cpu().numpy() for side in pair))
