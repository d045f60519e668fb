"""Pairs of pictures judged: how likely each is a copy, and where.

every picture, or view of a query, once: descriptor, patch tokens, and what the matcher encodes (in the same pass,
where the matcher has the descriptor's blocks); and its grey as a square
every pair: cosine, normalised against the background, matcher's logit, copied region, and whether the pixels agree
there -> `Signals` -> probability
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from copynce.copies.calibration import Signals
from copynce.copies.pair import CopyPair
from copynce.copies.pixels import SIDE, agreeing
from copynce.copies.regions import CopiedRegion, copied_region
from copynce.errors import DataError
from copynce.model import Model
from copynce.models.precision import bf16_in_hardware
from copynce.retrieval.features import Computed
from copynce.retrieval.normalization import BIASES
from copynce.retrieval.query_views import query_views
from copynce.retrieval.search import search
from dali_pipelines import CropLoader, Cut, LoaderOptions, PictureLoader
from dali_pipelines.options import MEAN, STD
from dali_pipelines.sources import AnyPath, BrokenPicture, read_picture

_PICTURES = 512  # that a block of pairs asks for, 250 KB each at 8 x 8 patches and 384 channels
_HELD = 400 << 20  # bytes of references that are kept for the next blocks
_BATCH = 32
_SQUARES = 8  # pictures at a time whose squares of `SIDE` px are made: of a query there are 23, 600 KB each
_FUSED = 64  # pairs that the matcher sees at a time

OnBroken = Callable[[AnyPath, str], None]


_TURNED = 3

_LUMA = 0.299, 0.587, 0.114


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
    views: NDArray[np.int64] | None = None,
    on_broken: OnBroken,
    progress: Callable[[int], None] | None = None,
    threads: int = 2,
) -> list[CopyPair | None]:
    """Each of the pairs int64 [P, 2], (place in `queries`, place in `references`), as people get it; None where a
    picture is broken, which is told to `on_broken(path, reason)` once.

    views: int64 [P], the view of the query that is compared, of `query_views`; none: the whole picture. progress:
    called with the number of pairs done. Raises DataError if the model has no calibration.
    """
    calibration = model.calibrated()
    found: list[CopyPair | None] = [None] * len(pairs)
    seen = look(model, queries, references, pairs, views=views, on_broken=on_broken, progress=progress, threads=threads)
    for at, pair in seen:
        names = os.fspath(queries[pairs[at, 0]]), os.fspath(references[pairs[at, 1]])
        probability = float(calibration([pair.signals])[0])
        found[at] = CopyPair(
            *names, probability, pair.signals.cosine, pair.region, pair.query_size, pair.reference_size
        )
    return found


def look(
    model: Model,
    queries: Sequence[AnyPath],
    references: Sequence[AnyPath],
    pairs: NDArray[np.int64],
    *,
    views: NDArray[np.int64] | None = None,
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

    seen_as = np.zeros(len(pairs), np.int64) if views is None else views
    held = _Held(lambda wanted: _encodings(model, references, wanted, tell, threads))
    done = 0
    for rows in _blocks(pairs, seen_as):
        asked = zip(pairs[rows, 0].tolist(), seen_as[rows].tolist(), strict=True)
        query_side = dict(_encodings(model, queries, asked, tell, threads))
        reference_side = held.of((place, 0) for place in pairs[rows, 1].tolist())
        both = [
            (row, query_side[view], reference_side[whole])
            for row in rows.tolist()
            if (view := (int(pairs[row, 0]), int(seen_as[row]))) in query_side
            and (whole := (int(pairs[row, 1]), 0)) in reference_side
        ]
        for start in range(0, len(both), _FUSED):
            part = both[start : start + _FUSED]
            logits = _logits(model, [(query, reference) for _, query, reference in part])
            for (row, query, reference), logit in zip(part, logits, strict=True):
                yield row, _seen(query, reference, logit, int(seen_as[row]))
            if progress is not None:
                progress(done + start + len(part))
        done += len(rows)
        if progress is not None:
            progress(done)


@dataclass(frozen=True)
class _Encoded:
    """Of one picture or view: descriptor [D], its bias (what score normalisation subtracts), patch tokens [L, C], what
    the matcher encodes [P + L, C], grey as a square [`SIDE`, `SIDE`], (width, height) of the file, and the view of it.
    """

    descriptor: NDArray[np.float32]
    bias: float
    tokens: NDArray[np.float32]
    encoding: Tensor | None
    square: NDArray[np.uint8]
    size: tuple[int, int]
    cut: Cut

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.square.nbytes + (0 if self.encoding is None else self.encoding.nbytes)


_Key = tuple[int, int]  # place of a picture, and the view of it


class _Held:
    """What was encoded, the last asked for, up to `_HELD` bytes and what one asks for at a time: the same references
    are near to many queries. encode: as `_encodings` of what is asked for."""

    def __init__(self, encode: Callable[[list[_Key]], Iterable[tuple[_Key, _Encoded]]]) -> None:
        self._encode = encode
        self._held: OrderedDict[_Key, _Encoded] = OrderedDict()
        self._bytes = 0

    def of(self, wanted: Iterable[_Key]) -> dict[_Key, _Encoded]:
        """Of all that can be used."""
        keys = sorted(set(wanted))
        for key, encoded in self._encode([key for key in keys if key not in self._held]):
            self._held[key] = encoded
            self._bytes += encoded.nbytes
        found = {key: self._held[key] for key in keys if key in self._held}
        for key in found:
            self._held.move_to_end(key)
        while self._bytes > _HELD and len(self._held) > len(found):
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return found


def _blocks(pairs: NDArray[np.int64], views: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows of `pairs`, a query's together, in blocks that ask for `_PICTURES` pictures or hardly more."""
    held: set[tuple[int, ...]] = set()
    block: list[int] = []
    for row in np.argsort(pairs[:, 0], kind="stable").tolist():
        needed = {(0, int(pairs[row, 0]), int(views[row])), (1, int(pairs[row, 1]))}
        held |= needed
        if len(held) > _PICTURES and block:
            yield np.array(block)
            block, held = [], needed
        block.append(row)
    if block:
        yield np.array(block)


def _encodings(
    model: Model, pictures: Sequence[AnyPath], wanted: Iterable[_Key], tell: OnBroken, threads: int
) -> Iterator[tuple[_Key, _Encoded]]:
    """((place, view), encoded) of those that can be used; wanted: which views of which pictures."""
    squares = dict(_squares(model, pictures, wanted, tell, threads))
    module, device = model.module.to(model.device).eval(), model.device
    matcher = None if model.matcher is None else model.matcher.to(device).eval()
    sizes: dict[int, tuple[int, int]] = {}  # (height, width) of each file
    for keys, images in _images(pictures, squares, module.img_size, _BATCH, device, tell, threads):
        encoded: Tensor | None = None
        with torch.inference_mode(), _computing(device):
            if matcher is None:
                descriptors, tokens = module(images)
            elif model.one_pass:
                descriptors, tokens, encoded = module.with_encodings(images, matcher.config.encoder_blocks)
            else:
                descriptors, tokens = module(images)
                encoded = matcher.encode(images)
        rows, patches = descriptors.float().cpu().numpy(), tokens.float().cpu().numpy()
        biases = biases_of(model, rows)
        for i, (place, view) in enumerate(keys):
            try:
                if place not in sizes:
                    sizes[place] = read_picture(pictures[place]).shape
            except BrokenPicture as error:  # since it was read
                tell(pictures[place], error.reason)
                continue
            height, width = sizes[place]
            own = None if encoded is None else encoded[i]
            cut, square = query_views(width, height)[view], squares[place, view]
            yield (place, view), _Encoded(rows[i], float(biases[i]), patches[i], own, square, (width, height), cut)


def _squares(
    model: Model, pictures: Sequence[AnyPath], wanted: Iterable[_Key], tell: OnBroken, threads: int
) -> Iterator[tuple[_Key, NDArray[np.uint8]]]:
    """((place, view), grey [`SIDE`, `SIDE`]) of those that can be used, for `agreeing`."""
    weights = torch.tensor(_LUMA, device=model.device)
    scale, offset = weights * torch.tensor(STD, device=model.device), (weights.cpu() * torch.tensor(MEAN)).sum().item()
    for keys, images in _images(pictures, wanted, SIDE, _SQUARES, model.device, tell, threads):
        grey = (torch.einsum("bchw,c->bhw", images.float(), scale) + offset) * 255
        yield from zip(keys, grey.round().clamp(0, 255).to(torch.uint8).cpu().numpy(), strict=True)


def _images(
    pictures: Sequence[AnyPath],
    wanted: Iterable[_Key],
    size: int,
    batch_size: int,
    device: torch.device,
    tell: OnBroken,
    threads: int,
) -> Iterator[tuple[list[_Key], Tensor]]:
    """([(place, view), ...] of b views, their pixels [b, 3, S, S], normalised, on the device). wanted: the (place,
    view) of each."""
    views: dict[int, list[int]] = {}
    for place, view in sorted({(int(place), int(view)) for place, view in wanted}):
        views.setdefault(place, []).append(view)
    places = list(views)
    paths = [pictures[place] for place in places]
    if not paths:
        return
    whole = all(list(wanted) == [0] for wanted in views.values())
    options = LoaderOptions(
        size=size,
        batch_size=min(batch_size, len(paths)),
        device="gpu" if device.type == "cuda" and whole else "cpu",
        device_id=device.index,
        threads=threads,
    )
    if whole:
        for at, images in PictureLoader(paths, options, on_broken=tell):
            yield [(places[i], 0) for i in at.tolist()], images.to(device, non_blocking=True)
        return
    for at, every in CropLoader(paths, query_views, options, on_broken=tell):
        chosen = [(row, places[i], view) for row, i in enumerate(at.tolist()) for view in views[places[i]]]
        images = every[[row for row, _, _ in chosen], [view for _, _, view in chosen]]
        yield [(place, view) for _, place, view in chosen], images.to(device, non_blocking=True)


def biases_of(model: Model, descriptors: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the paper's score normalisation subtracts (PROTOCOLS 3) of the scores of descriptors [n, D], [n]; 0 without
    a background."""
    if model.background is None:
        return np.zeros(len(descriptors), np.float32)
    bias = BIASES["copynce"]
    return bias.of(search(descriptors, model.background, k=bias.end)[0])


def quickest(device: torch.device) -> Computed:
    """What copies are looked for in: bfloat16 wherever the hardware multiplies it. It moves a cosine by a thousandth,
    which is nothing to a probability."""
    return "bf16" if bf16_in_hardware(device) else "fp32"


def _computing(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=quickest(device) == "bf16")


def _logits(model: Model, pairs: Sequence[tuple[_Encoded, _Encoded]]) -> list[float]:
    """The matcher's, of pairs; 0 without one."""
    if model.matcher is None:
        return [0.0] * len(pairs)
    sides = []
    for side in (0, 1):
        tokens = [pair[side].encoding for pair in pairs]
        sides.append(torch.stack([one for one in tokens if one is not None]))
    with torch.inference_mode(), _computing(model.device):
        logits: list[float] = model.matcher.fuse(*sides).float().cpu().tolist()
    return logits


def _seen(query: _Encoded, reference: _Encoded, logit: float, view: int) -> SeenPair:
    cosine = float(query.descriptor @ reference.descriptor)
    if not np.isfinite([cosine, logit]).all():
        raise DataError("the score of a pair is not finite; the model's weights are damaged")
    size, to_picture = query.cut.geometry(query.size[1], query.size[0])
    region = copied_region(query.tokens, reference.tokens, size, reference.size)
    pixels, region = agreeing(query.square, reference.square, region, size, reference.size)
    signals = Signals(
        cosine,
        cosine - query.bias,
        logit,
        region.evidence,
        region.agreement,
        region.found,
        cropped=view > _TURNED,
        coarse=pixels.coarse,
        fine=pixels.fine,
        blocks=pixels.blocks,
    )
    if view:
        region = region.through(to_picture, size, query.size)
    return SeenPair(signals, region, query.size, reference.size)
