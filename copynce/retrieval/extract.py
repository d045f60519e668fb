"""Descriptors of many pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import dali_pipelines
from copynce.data import Manifest, Quarantine
from copynce.errors import DataError
from copynce.models import Descriptor
from copynce.models.memory import keep_heap
from copynce.models.precision import bf16_in_hardware
from copynce.retrieval.features import Computed, FeatureFile, Features, read_features, write_features
from copynce.retrieval.search import normalised
from dali_pipelines import LoaderOptions, PictureLoader
from dali_pipelines.sources import AnyPath, ShardMember

Precision = Literal["auto", "fp32", "bf16"]

#: The lowest cosine between a picture's descriptors in bfloat16 and in float32 for which bfloat16 is taken.
BF16_AGREES = 0.9999

_PART = 16_384  # pictures whose features are one file: what a killed extraction loses at most


@dataclass(frozen=True)
class FeatureStore:
    """Where features are kept as they are made, and found again: ``FOLDER/NAME-0000.safetensors``, -0001, ...

    A file serves again while model, code, kind of device and pictures (names, sizes, times of change) are the same.
    folder, name: of the files. model: the hash of the model's weights file.
    """

    folder: Path
    name: str
    model: str

    def path(self, part: int) -> Path:
        """The file of the `part`-th pictures."""
        return self.folder / f"{self.name}-{part:04d}.safetensors"

    def find(self, part: int, made_from: dict[str, Any]) -> FeatureFile | None:
        """The `part`-th file if it is there, whole, and made from the same."""
        try:
            found = read_features(self.path(part))
        except (FileNotFoundError, DataError):
            return None
        return found if found.made_from == made_from else None


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
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Features:
    """The descriptors that `model` gives the pictures of `manifest`, by the protocol of CopyNCE.

    Each picture is resized to the model's square input whatever its aspect ratio (bicubic, antialiased, no EXIF
    rotation) and normalised; the descriptor is L2-normalised once more after the forward pass.

    model: a `Descriptor`, or a module that maps float32 [B, 3, S, S] to (descriptor [B, D], patch tokens); S is its
        attribute `img_size`. It runs in evaluation mode on `device` and is given back in the mode it came in.
    batch_size: pictures per forward pass. device: "cpu" or a CUDA device; pictures are decoded on the same one.
    precision: of the forward pass. "auto": bf16 where the hardware multiplies it and where the first batch's
        descriptors agree with those in float32 to a cosine of `BF16_AGREES`, else fp32; the result says which.
    quarantine: receives the broken pictures. threads: CPU threads that read and decode.
    keep: where finished features are written, and taken from if they are there already.
    progress: called after each batch, and at the end, with the number of pictures done so far, broken ones included.
    say: receives a sentence if "auto" decides against bf16.
    Raises TypeError if the model has no `img_size`, DataError if no picture can be decoded or if the model gives a
    descriptor that is zero or not finite.
    """
    size = getattr(model, "img_size", None)
    if not isinstance(size, int):
        raise TypeError(f"model must have an integer attribute img_size, its input's side in pixels, got {size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    device = torch.device(device)
    if device.type == "cpu":
        keep_heap()
    broken = Quarantine() if quarantine is None else quarantine
    made_from: dict[str, Any] = {"size": size, "device": device.type}
    if keep is not None:
        made_from |= {"model": keep.model, "code": _running_code()}

    was_training = model.training
    model.to(device).eval()
    uuids: list[str] = []
    values: list[NDArray[np.float32]] = []
    try:
        for part, start in enumerate(range(0, len(manifest), _PART)):
            pictures = manifest.select(range(start, min(start + _PART, len(manifest))))
            found: FeatureFile | None = None
            if keep is not None:
                made_from["pictures"] = _pictures_hash(pictures)
                found = keep.find(part, made_from)
            if found is None or not _serves(found.features, precision, device):
                found = _extract_part(
                    model,
                    pictures,
                    size=size,
                    batch_size=min(batch_size, len(pictures)),
                    device=device,
                    precision=precision,
                    threads=threads,
                    progress=None if progress is None else lambda done, start=start: progress(start + done),  # type: ignore[misc]
                    say=say,
                )
                if keep is not None:
                    write_features(keep.path(part), found.features, made_from, found.broken)
            path_of = dict(zip(pictures.uuids, pictures.paths, strict=True))
            for uuid, reason in found.broken:
                broken.add(path_of[uuid], reason)
            if found.features.uuids:
                precision = found.features.precision  # one for all
                uuids += found.features.uuids
                values.append(found.features.values)
            if progress is not None:
                progress(start + len(pictures))  # the last ones may be broken
    finally:
        model.train(was_training)
    if not values:
        raise DataError(f"{manifest.root}: none of the {len(manifest)} pictures could be decoded; {broken.summary()}")
    assert precision != "auto", "a picture was described"
    return Features(uuids, values[0] if len(values) == 1 else np.concatenate(values), precision)


def _extract_part(
    model: nn.Module,
    pictures: Manifest,
    *,
    size: int,
    batch_size: int,
    device: torch.device,
    precision: str,
    threads: int,
    progress: Callable[[int], None] | None,
    say: Callable[[str], None] | None,
) -> FeatureFile:
    """The features of `pictures`, none if all are broken."""
    unchecked = precision == "auto" and bf16_in_hardware(device)
    bf16 = precision == "bf16" or unchecked
    broken: list[tuple[AnyPath, str]] = []
    options = LoaderOptions(
        size=size,
        batch_size=batch_size,
        device="gpu" if device.type == "cuda" else "cpu",
        device_id=device.index,
        threads=threads,
    )
    loader = PictureLoader(pictures.paths, options, on_broken=lambda path, reason: broken.append((path, reason)))
    rows: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float32]] = []
    for indices, images in loader:
        images = images.to(device, non_blocking=True)
        descriptors = _descriptors(model, images, bf16)
        if unchecked:
            unchecked = False
            exact = _descriptors(model, images, bf16=False)
            worst = float((descriptors * exact).sum(axis=1).min())
            if worst < BF16_AGREES:
                bf16, descriptors = False, exact
                if say is not None:
                    say(
                        f"bf16 changes descriptors of this model to a cosine of {worst:.5f}, below {BF16_AGREES}: "
                        "extraction goes on in fp32"
                    )
        rows.append(np.asarray(indices, dtype=np.int64))
        values.append(descriptors)
        if progress is not None:
            progress(int(indices[-1]) + 1)
    used: Computed = "bf16" if bf16 else "fp32"
    uuid_of = {os.fspath(path): uuid for path, uuid in zip(pictures.paths, pictures.uuids, strict=True)}
    reasons = [(uuid_of[os.fspath(path)], reason) for path, reason in broken]
    if not rows:
        return FeatureFile(Features([], np.empty((0, 0), np.float32), used), reasons, {})
    order = np.argsort(np.concatenate(rows))
    uuids = [pictures.uuids[row] for row in np.concatenate(rows)[order]]
    return FeatureFile(Features(uuids, np.concatenate(values)[order], used), reasons, {})


def _descriptors(model: nn.Module, images: Tensor, bf16: bool) -> NDArray[np.float32]:
    """Unit descriptors [B, D] of `images`."""
    with torch.inference_mode(), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        found, _ = model(images, tokens=False) if isinstance(model, Descriptor) else model(images)
    try:
        return normalised(found.float().cpu().numpy(), "descriptors of the model")
    except ValueError as error:
        raise DataError(f"{error}; its weights are damaged, or its training diverged") from error


def _serves(features: Features, precision: str, device: torch.device) -> bool:
    """Whether features that were kept are what `precision` asks for now."""
    if not features.uuids or features.precision == precision:
        return True
    return precision == "auto" and (features.precision == "fp32" or bf16_in_hardware(device))


def _pictures_hash(pictures: Manifest) -> str:
    """A hash of the pictures' names, places, sizes and times of change."""
    digest = hashlib.sha256()
    for uuid, path in zip(pictures.uuids, pictures.paths, strict=True):
        file, inside = (path.shard, f"{path.offset} {path.size}") if isinstance(path, ShardMember) else (path, "")
        try:
            status = os.stat(file)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # a broken picture, as long as it stays so
            state = "absent"
        digest.update("\0".join([uuid, os.fspath(path), inside, state, ""]).encode(errors="surrogateescape"))
    return digest.hexdigest()


def _running_code() -> str:
    """A hash of the code that makes pictures and descriptors: what was made by other code is not the same."""
    copynce = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in (copynce, Path(dali_pipelines.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder.parent).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
