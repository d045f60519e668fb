"""Pairs of pictures judged: how likely each is a copy, and where.

every picture once: descriptor, patch tokens, and what the matcher encodes (in the same pass, where the matcher has
the descriptor's blocks)
every pair: cosine, normalised against the background, matcher's logit, copied region -> `Signals` -> probability
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from copynce.copies.calibration import Signals
from copynce.copies.pair import CopyPair
from copynce.copies.regions import CopiedRegion, copied_region
from copynce.errors import DataError
from copynce.model import Model
from copynce.retrieval.normalization import BIASES
from copynce.retrieval.search import search
from dali_pipelines import LoaderOptions, PictureLoader
from dali_pipelines.sources import AnyPath, BrokenPicture, read_picture

_PICTURES = 512  # whose tokens are held at a time, 200 KB each at 8 x 8 patches and 384 channels
_BATCH = 32
_FUSED = 64  # pairs that the matcher sees at a time

OnBroken = Callable[[AnyPath, str], None]


@dataclass(frozen=True)
class SeenPair:
    """What a pair shows, and where the copy lies if it is one. sizes: (width, height) of query and reference."""

    signals: Signals
    region: CopiedRegion
    query_size: tuple[int, int]
    reference_size: tuple[int, int]


def judge(
    model: Model,
    queries: Sequence[AnyPath],
    references: Sequence[AnyPath],
    pairs: NDArray[np.int64],
    *,
    on_broken: OnBroken,
    progress: Callable[[int], None] | None = None,
    threads: int = 2,
) -> list[CopyPair | None]:
    """Each of the pairs int64 [P, 2], (place in `queries`, place in `references`), as people get it; None where a
    picture is broken, which is told to `on_broken(path, reason)` once.

    progress: called with the number of pairs done. Raises DataError if the model has no calibration.
    """
    calibration = model.calibrated()
    found: list[CopyPair | None] = [None] * len(pairs)
    seen = look(model, queries, references, pairs, on_broken=on_broken, progress=progress, threads=threads)
    for at, pair in seen:
        query, reference = (
            os.fspath(side[place]) for side, place in zip((queries, references), pairs[at], strict=True)
        )
        probability = float(calibration([pair.signals])[0])
        found[at] = CopyPair(
            query, reference, probability, pair.signals.cosine, pair.region, pair.query_size, pair.reference_size
        )
    return found


def look(
    model: Model,
    queries: Sequence[AnyPath],
    references: Sequence[AnyPath],
    pairs: NDArray[np.int64],
    *,
    on_broken: OnBroken,
    progress: Callable[[int], None] | None = None,
    threads: int = 2,
) -> Iterator[tuple[int, SeenPair]]:
    """(row of `pairs`, what it shows) of every pair whose pictures can be used, query by query; see `judge`."""
    broken: dict[str, str] = {}

    def tell(path: AnyPath, reason: str) -> None:
        name = os.fspath(path)
        if name not in broken:
            broken[name] = reason
            on_broken(path, reason)

    done = 0
    for rows in _blocks(pairs):
        sides = []
        for side, paths in enumerate((queries, references)):
            places = np.unique(pairs[rows, side])
            good = [place for place in places.tolist() if os.fspath(paths[place]) not in broken]
            sides.append((paths, dict(_encodings(model, [(place, paths[place]) for place in good], tell, threads))))
        (_, query_side), (_, reference_side) = sides
        whole = [row for row in rows.tolist() if pairs[row, 0] in query_side and pairs[row, 1] in reference_side]
        for start in range(0, len(whole), _FUSED):
            part = whole[start : start + _FUSED]
            both = [(query_side[int(pairs[row, 0])], reference_side[int(pairs[row, 1])]) for row in part]
            for row, (query, reference), logit in zip(part, both, _logits(model, both), strict=True):
                yield row, _seen(query, reference, logit)
            if progress is not None:
                progress(done + start + len(part))
        done += len(rows)
        if progress is not None:
            progress(done)


@dataclass(frozen=True)
class _Encoded:
    """Of one picture: descriptor [D], its bias (what score normalisation subtracts), patch tokens [L, C], what the
    matcher encodes [P + L, C], and (width, height) of the file."""

    descriptor: NDArray[np.float32]
    bias: float
    tokens: NDArray[np.float32]
    encoding: Tensor | None
    size: tuple[int, int]


def _blocks(pairs: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows of `pairs`, a query's together, in blocks that ask for `_PICTURES` pictures or hardly more."""
    order = np.argsort(pairs[:, 0], kind="stable")
    held: set[tuple[int, int]] = set()
    block: list[int] = []
    for row in order.tolist():
        held |= {(0, int(pairs[row, 0])), (1, int(pairs[row, 1]))}
        if len(held) > _PICTURES and block:
            yield np.array(block)
            block, held = [], {(0, int(pairs[row, 0])), (1, int(pairs[row, 1]))}
        block.append(row)
    if block:
        yield np.array(block)


def _encodings(
    model: Model, places: Sequence[tuple[int, AnyPath]], tell: OnBroken, threads: int
) -> Iterator[tuple[int, _Encoded]]:
    """(place, encoded picture) of those that can be used."""
    if not places:
        return
    module, matcher, device = model.module.to(model.device).eval(), model.matcher, model.device
    options = LoaderOptions(
        size=module.img_size,
        batch_size=min(_BATCH, len(places)),
        device="gpu" if device.type == "cuda" else "cpu",
        device_id=device.index,
        threads=threads,
    )
    paths = [path for _, path in places]
    for at, images in PictureLoader(paths, options, on_broken=tell):
        images = images.to(device, non_blocking=True)
        encoded: Tensor | None = None
        with torch.inference_mode():
            if matcher is None:
                descriptors, tokens = module(images)
            elif model.one_pass:
                descriptors, tokens, encoded = module.with_encodings(images, matcher.config.encoder_blocks)
            else:
                descriptors, tokens = module(images)
                encoded = matcher.to(device).eval().encode(images)
        rows, patches = descriptors.float().cpu().numpy(), tokens.float().cpu().numpy()
        biases = _biases(model, rows)
        for i, place in enumerate(at.tolist()):
            try:
                height, width = read_picture(paths[place]).shape
            except BrokenPicture as error:  # since it was read
                tell(paths[place], error.reason)
                continue
            own = None if encoded is None else encoded[i]
            yield places[place][0], _Encoded(rows[i], float(biases[i]), patches[i], own, (width, height))


def _biases(model: Model, descriptors: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n], as the paper's score normalisation (PROTOCOLS 3); 0 without a background."""
    if model.background is None:
        return np.zeros(len(descriptors), np.float32)
    bias = BIASES["copynce"]
    return bias.of(search(descriptors, model.background, k=bias.end)[0])


def _logits(model: Model, pairs: Sequence[tuple[_Encoded, _Encoded]]) -> list[float]:
    """The matcher's, of pairs; 0 without one."""
    if model.matcher is None:
        return [0.0] * len(pairs)
    sides = []
    for side in (0, 1):
        tokens = [pair[side].encoding for pair in pairs]
        sides.append(torch.stack([one for one in tokens if one is not None]))
    with torch.inference_mode():
        logits: list[float] = model.matcher.fuse(*sides).float().cpu().tolist()
    return logits


def _seen(query: _Encoded, reference: _Encoded, logit: float) -> SeenPair:
    cosine = float(query.descriptor @ reference.descriptor)
    if not np.isfinite([cosine, logit]).all():
        raise DataError("the score of a pair is not finite; the model's weights are damaged")
    region = copied_region(query.tokens, reference.tokens, query.size, reference.size)
    signals = Signals(cosine, cosine - query.bias, logit, region.evidence, region.agreement, region.found)
    return SeenPair(signals, region, query.size, reference.size)
