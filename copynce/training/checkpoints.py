"""Checkpoints of a run: one folder per step, whole or absent.

``RUN/checkpoints/step-00000500/`` holds ``model.safetensors`` (the descriptor, ready for evaluation) and ``state.pt``
(optimiser, the loss's own parameters, counters). It is written under a temporary name and renamed, so a killed run
leaves either the old newest one or the new one.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from copynce.errors import RunError
from copynce.models import Descriptor, save_checkpoint

_NAME = re.compile(r"step-(\d{8,})$")


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    folders = [folder for folder in (run / "checkpoints").glob("step-*") if _NAME.search(folder.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps behind a checkpoint folder."""
    match = _NAME.search(checkpoint.name)
    if match is None:
        raise RunError(f"{checkpoint}: expected a checkpoint folder named step-NUMBER")
    return int(match.group(1))


def find_model(path: str | Path) -> Path:
    """The weights file that ``path`` means: a file itself, a checkpoint folder, or a run (its newest checkpoint)."""
    path = Path(path)
    if path.is_file():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    found = checkpoints(path)
    if not found:
        raise RunError(f"{path}: expected a run folder, a checkpoint folder or a weights file; no checkpoint is there")
    return found[-1] / "model.safetensors"


def write_checkpoint(run: Path, step: int, model: Descriptor, state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of ``step`` and remove all but the ``keep`` newest; step 0 stays, it is the "before"."""
    final = run / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_checkpoint(temporary / "model.safetensors", model, {"step": step})
    torch.save(state, temporary / "state.pt")
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    for old in [folder for folder in checkpoints(run) if step_of(folder) > 0][:-keep]:
        shutil.rmtree(old)
    return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The training state beside a checkpoint's weights; tensors and plain values only, nothing is unpickled."""
    path = checkpoint / "state.pt"
    if not path.is_file():
        raise RunError(f"{checkpoint}: no state.pt, so training cannot continue from it")
    return torch.load(path, map_location="cpu", weights_only=True)
