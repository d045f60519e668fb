"""Descriptors of many pictures, or of views of them: in one process or several, kept as they are made."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from copynce.data import Manifest, Quarantine
from copynce.errors import DataError
from copynce.models import Descriptor
from copynce.models.memory import keep_heap
from copynce.models.precision import bf16_in_hardware
from copynce.retrieval.features import Computed, FeatureFile, Features, write_features
from copynce.retrieval.features import FeatureStore as FeatureStore
from copynce.retrieval.rows import joined
from copynce.retrieval.search import normalised
from dali_pipelines import CropLoader, LoaderOptions, PictureLoader
from dali_pipelines.cuts import Cuts
from dali_pipelines.sources import AnyPath, ShardMember

Precision = Literal["auto", "fp32", "bf16"]

#: How features are made, as a number: preparation of pictures, forward pass, normalisation. Whoever changes descriptors
#: adds one, and kept features of other numbers are made anew; a test holds descriptors that belong to this number.
WAY = 1

#: The lowest cosine between a picture's descriptors in bfloat16 and in float32 for which bfloat16 is taken.
BF16_AGREES = 0.9999

_LOOK = 2.0  # seconds between looks at the files of other processes
_PART = 1_024  # rows of features that are one file: what a killed extraction loses at most


class Processes(Protocol):
    """This process among those that work together, such as `copynce.training.distributed.World`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def broadcast_object(self, value: object) -> object:
        """The value of rank 0, on every process."""

    def together(self) -> AbstractContextManager[None]:
        """A block that ends when all have ended it, and fails on all if it fails on one."""


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def broadcast_object(self, value: object) -> object:
        return value

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Views:
    """The views of each picture that are described instead of the whole picture.

    name: by which kept features know them. cuts: as many for every picture, see :mod:`copynce.retrieval.crops`.
    """

    name: str
    cuts: Cuts

    @property
    def count(self) -> int:
        """Views of a picture."""
        return len(self.cuts(100, 100))


@dataclass(frozen=True)
class _Making:
    """How descriptors are made, for all pictures alike."""

    model: nn.Module
    size: int
    batch_size: int
    device: torch.device
    threads: int
    views: Views | None

    @property
    def rows(self) -> int:
        """Of each picture."""
        return 1 if self.views is None else self.views.count

    def loader(self, paths: Sequence[AnyPath], on_broken: Callable[[AnyPath, str], None]) -> PictureLoader | CropLoader:
        options = LoaderOptions(
            size=self.size,
            batch_size=max(1, min(self.batch_size // self.rows, len(paths))),
            device="gpu" if self.device.type == "cuda" and self.views is None else "cpu",
            device_id=self.device.index,
            threads=self.threads,
        )
        if self.views is None:
            return PictureLoader(paths, options, on_broken=on_broken)
        return CropLoader(paths, self.views.cuts, options, on_broken=on_broken)

    def describe(
        self, images: Tensor, precision: Precision, say: Callable[[str], None] | None
    ) -> tuple[NDArray[np.float32], Computed]:
        """Unit descriptors [b, rows, D] of pictures [b, 3, S, S] or of their views [b, V, 3, S, S], and what "auto"
        means, by these."""
        images = images.to(self.device, non_blocking=True)
        flat = images if self.views is None else images.flatten(0, 1)
        used: Computed = "bf16" if precision == "auto" and bf16_in_hardware(self.device) else "fp32"
        if precision != "auto":
            used = precision
        descriptors = _descriptors(self.model, flat, used == "bf16")
        if precision == "auto" and used == "bf16":
            exact = _descriptors(self.model, flat, bf16=False)
            worst = float((descriptors * exact).sum(axis=1).min())
            if worst < BF16_AGREES:
                used, descriptors = "fp32", exact
                if say is not None:
                    say(
                        f"bf16 changes descriptors of this model to a cosine of {worst:.5f}, below {BF16_AGREES}: "
                        "extraction goes on in fp32"
                    )
        return descriptors.reshape(len(images), self.rows, -1), used


def extract(
    model: nn.Module,
    manifest: Manifest,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    quarantine: Quarantine | None = None,
    threads: int = 2,
    keep: FeatureStore | None = None,
    views: Views | None = None,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Features:
    """The descriptors that `model` gives the pictures of `manifest`, by the protocol of CopyNCE (PROTOCOLS 2).

    Each picture is resized to the model's square input whatever its aspect ratio (bicubic, antialiased, no EXIF
    rotation) and normalised; the descriptor is L2-normalised once more after the forward pass.

    model: a `Descriptor`, or a module that maps float32 [B, 3, S, S] to (descriptor [B, D], patch tokens); S is its
        attribute `img_size`. It runs in evaluation mode on `device` and is given back in the mode it came in.
    batch_size: pictures, or views, per forward pass. device: "cpu" or a CUDA device; pictures are decoded on the same
        one, their views on the CPU.
    precision: of the forward pass. "auto": bf16 where the hardware multiplies it and where the first batch's
        descriptors agree with those in float32 to a cosine of `BF16_AGREES`, else fp32; the result says which.
    quarantine: receives the broken pictures. threads: CPU threads that read and decode.
    keep: where finished features are written, and taken from if they are there already; the result's rows are then
        mapped from there, and no more than one part of them is in memory.
    views: describe these views of each picture, one row for each, in their order.
    processes: those that share the work, part by part, through the files of `keep`; all of them get the whole result,
        that of one process.
    progress: called after each batch, and at the end, with the number of pictures done so far, broken ones included,
        by all processes together as far as their files tell.
    say: receives a sentence if "auto" decides against bf16.
    Raises TypeError if the model has no `img_size`, DataError if no picture can be decoded or if the model gives a
    descriptor that is zero or not finite.
    """
    size = _side_of(model)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    group = Alone() if processes is None else processes
    if group.size > 1 and keep is None:
        raise ValueError("keep must say where several processes leave their features")
    device = torch.device(device)
    if device.type == "cpu":
        keep_heap()
    broken = Quarantine() if quarantine is None else quarantine
    work = _Work(_Making(model, size, batch_size, device, threads, views), manifest, keep)

    was_training = model.training
    model.to(device).eval()
    try:
        mine = range(group.rank, len(work.parts), group.size)
        if group.size > 1:
            with group.together():
                if group.rank == 0:
                    precision = work.decided(precision, say)
            precision = group.broadcast_object(precision)  # type: ignore[assignment]
        with group.together():
            done = work.run(mine, precision, progress, say if group.rank == 0 else None)
        if group.size > 1:
            done = work.collected()
    finally:
        model.train(was_training)
    reasons = {uuid: reason for part in done for uuid, reason in part.broken}
    for place, uuid in enumerate(manifest.uuids if reasons else ()):
        if uuid in reasons:
            broken.add(manifest.paths[place], reasons[uuid])
    full = [part.features for part in done if part.features.uuids]
    if not full:
        raise DataError(f"{manifest.root}: none of the {len(manifest)} pictures could be decoded; {broken.summary()}")
    values = joined([features.values for features in full])
    if keep is None:
        values = np.asarray(values)
    elif group.rank == 0:
        keep.remove_after(len(work.parts))
    uuids = [uuid for features in full for uuid in features.uuids]
    return Features(uuids, values, full[0].precision, full[0].views)


def stream_descriptors(
    model: nn.Module,
    pictures: Sequence[AnyPath],
    on_broken: Callable[[AnyPath, str], None],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    threads: int = 2,
    views: Views | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], Precision]]:
    """Yield (places in `pictures` int64 [b], unit descriptors float32 [b, D], fp32 or bf16) of each batch, in order;
    of `views` [b, V, D].

    As `extract`, for whoever keeps descriptors in another way. Broken pictures are told to `on_broken(path, reason)`
    by the time that the batch behind them comes. Between batches the model is as it is while it works: in evaluation
    mode on `device`.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_heap()
    making = _Making(model, _side_of(model), batch_size, device, threads, views)
    was_training = model.training
    model.to(device).eval()
    try:
        # Closed with this generator: the loader's threads must not outlive it.
        with closing(iter(making.loader(pictures, on_broken))) as batches:  # type: ignore[type-var]
            for indices, images in batches:
                descriptors, precision = making.describe(images, precision, say)
                yield (
                    np.asarray(indices, dtype=np.int64),
                    descriptors[:, 0] if views is None else descriptors,
                    precision,
                )
    finally:
        model.train(was_training)


def _side_of(model: nn.Module) -> int:
    """The side of a model's input in pixels."""
    size = getattr(model, "img_size", None)
    if not isinstance(size, int):
        raise TypeError(f"model must have an integer attribute img_size, its input's side in pixels, got {size!r}")
    return size


class _Work:
    """The pictures of an extraction in parts, each of which becomes one file."""

    def __init__(self, making: _Making, manifest: Manifest, keep: FeatureStore | None) -> None:
        self._making, self._manifest, self._keep = making, manifest, keep
        step = max(1, _PART // making.rows)
        self.parts = [range(start, min(start + step, len(manifest))) for start in range(0, len(manifest), step)]
        self._hashes: dict[int, str] = {}
        self._ready: set[int] = set()  # parts that were there at the begin, as far as they were looked at

    def decided(self, precision: Precision, say: Callable[[str], None] | None) -> Precision:
        """What "auto" means for all pictures: what is there already, or else what the first batch says."""
        _, precision = self._found(range(len(self.parts)), precision)
        if precision == "auto":
            paths = self._manifest.paths[self.parts[0].start : self.parts[0].stop]
            with closing(iter(self._making.loader(paths, lambda path, reason: None))) as batches:  # type: ignore[type-var]
                for _, images in batches:
                    return self._making.describe(images, precision, say)[1]
            return "fp32"  # every picture is broken
        return precision

    def run(
        self,
        mine: Sequence[int],
        precision: Precision,
        progress: Callable[[int], None] | None,
        say: Callable[[str], None] | None,
    ) -> list[FeatureFile]:
        """The features of these parts; those that are not there yet are made."""
        done, precision = self._found(mine, precision)
        elsewhere = _Elsewhere(
            self._keep, {part: self.parts[part] for part in range(len(self.parts))}, mine, self._ready
        )
        count = 0

        def report(more: int) -> None:
            if progress is not None:
                progress(count + more + elsewhere.pictures())

        for part in done:
            count += len(self.parts[part])
            report(0)
        todo = [part for part in mine if part not in done]
        for part, made in self._made(todo, precision, report, say):
            done[part] = made if self._keep is None else self._kept(part, made)
            count += len(self.parts[part])
            report(0)
        return [done[part] for part in mine]

    def collected(self) -> list[FeatureFile]:
        """All parts, once all processes have left theirs."""
        found = [self._find(part) for part in range(len(self.parts))]
        if None in found:
            assert self._keep is not None, "checked before"
            raise DataError(
                f"{self._keep.path(found.index(None))}: written by another process, but not to be seen by this one; "
                "all processes need the same folder"
            )
        return [part for part in found if part is not None]

    def _found(self, parts: Sequence[int], precision: Precision) -> tuple[dict[int, FeatureFile], Precision]:
        """The parts that are there and serve, and the precision of all as far as they decide it."""
        there = {part: found for part in parts if (found := self._find(part)) is not None}
        for found in there.values():
            usable = found.features.precision == "fp32" or bf16_in_hardware(self._making.device)
            if precision == "auto" and found.features.uuids and usable:
                precision = found.features.precision
        serving = {
            part: found
            for part, found in there.items()
            if not found.features.uuids or found.features.precision == precision
        }
        self._ready |= serving.keys()
        return serving, precision

    def _find(self, part: int) -> FeatureFile | None:
        if self._keep is None:
            return None
        return self._keep.find(part, self._made_from(part), last=part == len(self.parts) - 1)

    def _made_from(self, part: int) -> dict[str, Any]:
        assert self._keep is not None, "asked where features are kept"
        if part not in self._hashes:
            self._hashes[part] = _pictures_hash(self._manifest, self.parts[part])
        facts = {"model": self._keep.model, "way": WAY, "size": self._making.size, "device": self._making.device.type}
        if self._making.views is not None:
            facts["views"] = self._making.views.name
        return facts | {"pictures": self._hashes[part]}

    def _kept(self, part: int, made: FeatureFile) -> FeatureFile:
        """The part as it was written, its rows mapped."""
        assert self._keep is not None, "asked where features are kept"
        last = part == len(self.parts) - 1
        write_features(
            self._keep.path(part),
            made.features,
            self._made_from(part),
            made.broken,
            positions=made.positions,
            pictures=made.pictures,
            last=last,
        )
        return self._keep.find(part, self._made_from(part), last) or made

    def _made(
        self,
        parts: Sequence[int],
        precision: Precision,
        report: Callable[[int], None],
        say: Callable[[str], None] | None,
    ) -> Iterator[tuple[int, FeatureFile]]:
        """(part, its features) of each part; one loader reads the pictures of all of them."""
        if not parts:
            return
        pictures = self._manifest.select([place for part in parts for place in self.parts[part]])
        ends = np.cumsum([len(self.parts[part]) for part in parts]).tolist()
        reasons: dict[str, str] = {}
        rows: list[NDArray[np.int64]] = []
        values: list[NDArray[np.float32]] = []
        number = 0  # of the part that is being made

        def finished() -> tuple[int, FeatureFile]:
            begin, end = ends[number] - len(self.parts[parts[number]]), ends[number]
            at = np.concatenate(rows) if rows else np.empty(0, np.int64)
            described = np.concatenate(values) if values else np.empty((0, self._making.rows, 0), np.float32)
            here = at < end
            rows[:], values[:] = [at[~here]], [described[~here]]
            good = at[here].tolist()
            names = [pictures.uuids[row] for row in good]
            missing = sorted(set(range(begin, end)).difference(good))
            broken = [(pictures.uuids[row], reasons[os.fspath(pictures.paths[row])]) for row in missing]
            used: Computed = "bf16" if precision == "bf16" else "fp32"
            matrix = (
                described[here].reshape(len(good) * self._making.rows, -1) if good else np.empty((0, 0), np.float32)
            )
            features = Features(names, matrix, used, self._making.rows)
            return parts[number], FeatureFile(features, broken, {}, at[here] - begin, end - begin)

        def on_broken(path: AnyPath, reason: str) -> None:
            reasons[os.fspath(path)] = reason

        for indices, images in self._making.loader(pictures.paths, on_broken):
            descriptors, precision = self._making.describe(images, precision, say)
            rows.append(np.asarray(indices, dtype=np.int64))
            values.append(descriptors)
            reached = int(indices[-1]) + 1
            report(reached - (ends[number - 1] if number else 0))
            while number < len(parts) and reached >= ends[number]:
                yield finished()
                number += 1
        while number < len(parts):  # the last pictures are broken
            yield finished()
            number += 1


class _Elsewhere:
    """The pictures that other processes have done, as their files tell; looked at now and then."""

    def __init__(
        self, keep: FeatureStore | None, parts: dict[int, range], mine: Sequence[int], ready: set[int]
    ) -> None:
        self._done = sum(len(parts[part]) for part in ready.difference(mine))
        self._waiting: dict[Path, tuple[int, int]] = {}
        if keep is not None:
            others = set(parts).difference(mine, ready)
            self._waiting = {keep.path(part): (_changed(keep.path(part)), len(parts[part])) for part in others}
        self._looked = time.monotonic()

    def pictures(self) -> int:
        if self._waiting and time.monotonic() - self._looked > _LOOK:
            for path, (before, count) in list(self._waiting.items()):
                if _changed(path) != before:
                    self._done += count
                    del self._waiting[path]
            self._looked = time.monotonic()
        return self._done


def _changed(path: Path) -> int:
    """When a file was written, 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _descriptors(model: nn.Module, images: Tensor, bf16: bool) -> NDArray[np.float32]:
    """Unit descriptors [B, D] of `images`."""
    with torch.inference_mode(), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        found, _ = model(images, tokens=False) if isinstance(model, Descriptor) else model(images)
    try:
        return normalised(found.float().cpu().numpy(), "descriptors of the model")
    except ValueError as error:
        raise DataError(f"{error}; its weights are damaged, or its training diverged") from error


def _pictures_hash(manifest: Manifest, places: range) -> str:
    """A hash of the pictures' states."""
    digest = hashlib.sha256()
    names, paths = manifest.uuids[places.start : places.stop], manifest.paths[places.start : places.stop]
    for uuid, path in zip(names, paths, strict=True):
        digest.update(picture_state(uuid, path).encode(errors="surrogateescape"))
    return digest.hexdigest()


def picture_state(uuid: str, path: AnyPath) -> str:
    """A picture's name, file, size and time of change: what is kept of it serves while this is the same."""
    file, inside = (path.shard, f"{path.offset} {path.size}") if isinstance(path, ShardMember) else (path, "")
    try:
        status = os.stat(file)
        state = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:  # a broken picture, as long as it stays so
        state = "absent"
    return "\0".join([uuid, os.fspath(path), inside, state, ""])
