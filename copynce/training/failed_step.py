"""A step whose loss or gradient is no number, kept so that it can be repeated.

``RUN/failed-step-00000012/``, 12 being the number of steps before it, holds ``config.yaml``, ``weights.safetensors``
(those that the step began with, of the objective) and ``step.json``: the step, its precision, and of every process the
numbers that it had and the pairs of its batches, with labels, files and edit programs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from copynce.config import save_config
from copynce.errors import RunError
from copynce.files import atomic_text, whole_path
from copynce.pixtrace import EditProgram
from copynce.training.config import TrainConfig
from copynce.training.objectives.base import Objective
from dali_pipelines import Pair
from dali_pipelines.sources import AnyPath

STEP, SETTINGS, WEIGHTS = "step.json", "config.yaml", "weights.safetensors"
_EXPECTED = f"RUN/failed-step-NUMBER/{STEP}"


@dataclass(frozen=True)
class FailedStep:
    """``step``: the number of steps before it. ``precision``: of the encoder, resolved; ``loss_scale``: 1 but in fp16.
    ``pictures``: the fingerprint of the source of pairs. ``processes``: what each tells, see :func:`told`."""

    step: int
    precision: str
    loss_scale: float
    learning_rate: float
    commit: str
    pictures: str
    processes: Sequence[Mapping[str, Any]]


def told(
    numbers: Mapping[str, float], batches: Sequence[Sequence[Pair]], shown: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """What one process tells of the step: ``numbers`` by name, and its ``batches``; a pair also has under ``shown`` the
    uuid of the one in its place, where a picture was broken."""
    return {
        # JSON has no NaN.
        "numbers": {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()},
        "batches": [
            [_written(pair, uuid) for pair, uuid in zip(pairs, uuids, strict=True)]
            for pairs, uuids in zip(batches, shown, strict=True)
        ],
    }


def write_failed_step(run: Path, failed: FailedStep, config: TrainConfig, objective: Objective) -> Path:
    """Write the step into the run's folder, in the place of an earlier try; returns the path of its ``step.json``.

    Raises WriteError where it cannot be written.
    """
    folder = run / f"failed-step-{failed.step:08d}"
    folder.mkdir(exist_ok=True)
    save_config(config, folder / SETTINGS)
    weights = {name: value.detach().cpu().contiguous() for name, value in objective.state_dict().items()}
    with whole_path(folder / WEIGHTS) as part:
        save_file(weights, part)
    with atomic_text(folder / STEP) as file:
        json.dump(asdict(failed), file, indent=1)
    return folder / STEP


def read_failed_step(path: str | os.PathLike[str]) -> tuple[FailedStep, dict[str, Tensor]]:
    """The step that ``path``, a ``step.json``, tells of, and the weights beside it. Raises RunError if it is none."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        return FailedStep(**found), load_file(path.parent / WEIGHTS)
    except OSError as error:
        name = error.filename or path
        raise RunError(f"{name} cannot be read ({error.strerror or error}); expected {_EXPECTED}") from error
    except Exception as error:  # whatever JSON and safetensors find
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{path} tells of no failed step ({reason}); expected {_EXPECTED}") from error


def pairs_of(process: Mapping[str, Any], places: Mapping[str, AnyPath]) -> list[list[Pair]]:
    """The batches that a process told of; ``places``: what a path means that is no file's."""
    return [[_read(pair, places) for pair in batch] for batch in process["batches"]]


def _written(pair: Pair, shown: str) -> dict[str, Any]:
    text: dict[str, Any] = {
        "uuid": pair.uuid,
        **({} if shown == pair.uuid else {"shown": shown}),
        "positive": pair.positive,
        "traced": pair.traced,
    }
    for side in ("query", "reference"):
        text[side] = os.fspath(getattr(pair, f"{side}_path"))
        text[f"{side}_program"] = getattr(pair, f"{side}_program").to_json()
    return text


def _read(text: Mapping[str, Any], places: Mapping[str, AnyPath]) -> Pair:
    sides: dict[str, Any] = {}
    for side in ("query", "reference"):
        sides[f"{side}_path"] = places.get(text[side], text[side])
        sides[f"{side}_program"] = EditProgram.from_json(text[f"{side}_program"])
    return Pair(**sides, positive=text["positive"], traced=text["traced"], uuid=text["uuid"])
