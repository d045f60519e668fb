"""Checkpoints of a run: one folder per step, whole or absent.

``RUN/checkpoints/step-00000500/`` holds ``model.safetensors`` (the model, ready for evaluation; with ``ema`` that of
the mean weights), ``state.pt`` (optimiser, the loss's own parameters, counters; with ``ema`` the trained weights) and
``checksums.json``, the size and SHA-256 of both. It is written under a temporary name, flushed to the disk and renamed,
so a killed run or a power cut leaves either the old newest one or the new one. What a disk spoils later is found by the
checksums, and the one before is taken. ``RUN/checkpoints/best`` is a JSON file that names the
one with the best evaluation, which stays, and tells its figures; wherever a checkpoint can be given it stands for that
one. (Runs of before have a link of that name.)
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from copynce.errors import RunError, WriteError
from copynce.files import atomic_text, file_sha256, sync_folder, whole_file
from copynce.models import load_checkpoint
from copynce.models.box import DESCRIPTOR, in_box
from copynce.models.weight_files import BEST, best_named
from copynce.training.signals import tell

MODEL, STATE, CHECKSUMS = "model.safetensors", "state.pt", "checksums.json"

_NAME = re.compile(r"step-(\d{8,})$")


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    folders = [folder for folder in (run / "checkpoints").glob("step-*") if _NAME.match(folder.name)]
    return sorted(folders, key=step_of)


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint folder that ``RUN/checkpoints/best`` names; None if there is none."""
    mark = run / "checkpoints" / BEST
    folder = mark.with_name(os.readlink(mark)) if mark.is_symlink() else best_named(mark)
    return folder if folder is not None and folder.is_dir() else None


def mark_best(checkpoint: Path, figures: Mapping[str, Any]) -> None:
    """Make ``best`` name ``checkpoint``, which stays until another one is it, and tell its ``figures``, anything that
    JSON holds. Raises WriteError if it cannot."""
    mark = checkpoint.with_name(BEST)
    if mark.is_dir() and not mark.is_symlink():  # the run was copied, and with it what a link of before named
        _remove(mark)
    with atomic_text(mark) as file:  # in the place of a link of before, too
        json.dump({"checkpoint": checkpoint.name, **figures}, file, indent=1)


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps behind a checkpoint folder."""
    match = _NAME.match(checkpoint.name)
    if match is None:
        raise RunError(f"{checkpoint}: expected a checkpoint folder named step-NUMBER")
    return int(match.group(1))


def damage(checkpoint: Path, names: Sequence[str] = (MODEL, STATE)) -> str | None:
    """What is wrong with the files ``names`` of a checkpoint, as a phrase; None if they are as they were written.

    A checkpoint of before there were checksums is judged by whether it can be read.
    """
    if not checkpoint.is_dir():
        return "it is no folder"
    try:
        for name in names:
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
        if not (checkpoint / CHECKSUMS).exists():
            return _unreadable(checkpoint, names)
        try:
            sums = json.loads((checkpoint / CHECKSUMS).read_bytes())
            expected = {name: (sums[name]["bytes"], sums[name]["sha256"]) for name in names}
        except (ValueError, KeyError, TypeError):
            return f"{CHECKSUMS} cannot be read"
        for name, (size, digest) in expected.items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if file_sha256(checkpoint / name) != digest:
                return f"{name} is not what was written: its checksum differs"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None


def newest_whole(run: Path, names: Sequence[str] = (MODEL, STATE)) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose files ``names`` are whole (None: there is none), and the damaged newer ones, each
    with what is wrong."""
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(run)):
        reason = damage(folder, names)
        if reason is None:
            return folder, damaged
        damaged.append((folder, reason))
    return None, damaged


def find_model(path: str | Path, *, boxed: str = DESCRIPTOR, say: Callable[[str], None] = tell) -> Path:
    """The weights file that ``path`` means: a file itself, a checkpoint folder, a run (its newest checkpoint), its
    ``checkpoints/best``, or of a box (`default`: the package's) the file ``boxed``.

    A damaged newest checkpoint of a run is told to ``say``, and the one before is taken. Raises RunError if a
    checkpoint that was named is damaged, or if there is none.
    """
    path = in_box(path, boxed)
    path = best_named(path) or path
    if path.is_file():
        if path.name == MODEL and (path.parent / CHECKSUMS).exists():
            _require_whole(path.parent)
        return path
    if _NAME.match(path.name) or (path / MODEL).is_file():
        _require_whole(path)
        return path / MODEL
    found, damaged = newest_whole(path, [MODEL])
    if found is None and damaged:
        raise RunError(f"{path}: none of its checkpoints is whole; {_listed(damaged)}")
    if found is None:
        raise RunError(f"{path}: expected a run folder, a checkpoint folder or a weights file; no checkpoint is there")
    if damaged:
        say(f"{_listed(damaged)}; {found.name} is taken instead")
    return found / MODEL


def write_checkpoint(
    run: Path, step: int, save_model: Callable[[Path], None], state: dict[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of ``step`` and remove all but the ``keep`` newest; the best one stays, and step 0, which is
    the "before".

    ``save_model`` writes the model's file. When this returns the checkpoint is on the disk.
    Raises WriteError if it cannot be written; those that are there stay as they are.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_model(temporary / MODEL)
        # Made in memory first: torch's own error for a full disk tells neither the file nor the reason.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with whole_file(temporary / STATE) as file:
            file.write(buffer.getbuffer())
        sums = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": file_sha256(temporary / name)}
            for name in (MODEL, STATE)
        }
        with whole_file(temporary / CHECKSUMS) as file:
            file.write(json.dumps(sums, indent=1).encode())
        if final.exists():
            _remove(final)
        temporary.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        found = checkpoints(run)
        stands = f"the last checkpoint is {found[-1].name}, as it was" if found else "there is no other checkpoint"
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise WriteError(
            f"{final} cannot be written ({cause.strerror or cause}); {stands}. Make room; the same command continues"
        ) from error
    prune(run, keep)
    return final


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints but the ``keep`` newest, the best and that of step 0."""
    best = best_checkpoint(run)
    for old in [folder for folder in checkpoints(run) if step_of(folder) > 0][:-keep]:
        if old != best:
            _remove(old)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The training state beside a checkpoint's weights; tensors and plain values only, nothing is unpickled."""
    path = checkpoint / STATE
    if not path.is_file():
        raise RunError(f"{checkpoint}: no {STATE}, so training cannot continue from it")
    return torch.load(path, map_location="cpu", weights_only=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it counts as none; returns its new place."""
    place = checkpoint.with_name(f"damaged-{checkpoint.name}")
    number = 2
    while place.exists():
        place = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
        number += 1
    checkpoint.rename(place)
    return place


def remove_parts(run: Path) -> None:
    """Remove what a kill left half written."""
    for part in (run / "checkpoints").glob(".step-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _require_whole(checkpoint: Path) -> None:
    reason = damage(checkpoint, [MODEL])
    if reason is not None:
        raise RunError(f"{checkpoint} is damaged: {reason}; take another checkpoint of the run")


def _listed(damaged: Sequence[tuple[Path, str]]) -> str:
    return "; ".join(f"{folder} is damaged: {reason}" for folder, reason in damaged)


def _unreadable(checkpoint: Path, names: Sequence[str]) -> str | None:
    readers: dict[str, Callable[[], object]] = {
        MODEL: lambda: load_checkpoint(checkpoint / MODEL),
        STATE: lambda: read_state(checkpoint),
    }
    for name in names:
        try:
            readers[name]()
        except Exception as error:  # torch raises whatever the damage leads to
            return f"{name} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint under a name that counts as none, lest a kill leave half of it."""
    part = checkpoint.with_name(f".{checkpoint.name}.removed.part")
    shutil.rmtree(part, ignore_errors=True)
    checkpoint.rename(part)
    shutil.rmtree(part, ignore_errors=True)
