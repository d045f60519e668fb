"""A step that failed, once more: ``copynce train --replay RUN/failed-step-NUMBER/step.json``.

The same weights, pairs, edits and random numbers, forward and backward; nothing is written and no weight moves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from copynce.config import load_config
from copynce.errors import ConfigError, DataError, RunError
from copynce.training.activations import checkpoint_activations
from copynce.training.config import TrainConfig
from copynce.training.distributed import World, world
from copynce.training.failed_step import SETTINGS, FailedStep, pairs_of, read_failed_step
from copynce.training.first_fault import FirstFault, faulty, listed
from copynce.training.gradients import distributed, make_gradients, step_seed
from copynce.training.loading import loader_options
from copynce.training.mined import open_pairs
from copynce.training.objectives import make_objective
from copynce.training.objectives.base import Objective
from copynce.training.run import FREE, compare
from dali_pipelines import BrokenPicture, PairLoader
from dali_pipelines.sources import AnyPath

_FIRST = "the first that holds what is no number is"


@dataclass(frozen=True)
class Replay:
    """What was found. ``lines``: it as text. ``repeats``: whether a loss or gradient is no number this time too."""

    lines: tuple[str, ...]
    repeats: bool


def replay(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Replay:
    """Repeat the step of ``path`` and look where the first value appears that is no number.

    overrides: settings (key=value) that say how and not what, such as device, precision or threads. Several processes
    repeat what as many have done. The same result on every process. Raises RunError, ConfigError or DataError where the
    step cannot be repeated.
    """
    path = Path(path)
    failed, weights = read_failed_step(path)
    before = load_config(TrainConfig, path.parent / SETTINGS, [])
    config = load_config(TrainConfig, path.parent / SETTINGS, overrides)
    refused = [name for name in compare(before, config) if name not in FREE]
    if refused:
        raise ConfigError(f"--replay repeats a step as it was, got {', '.join(refused)}; leave that out")
    with world(config.device) as here:
        if here.size != len(failed.processes):
            count = len(failed.processes)
            raise RunError(
                f"{path}: {count} processes made this step, here {'is 1' if here.size == 1 else f'are {here.size}'}; "
                f"start as many (torchrun --nproc-per-node={count} -m copynce.cli train --replay ..., device=cpu will "
                "do)"
            )
        # What "auto" was on that machine, unless another is asked for.
        precision = failed.precision if config.precision in (before.precision, "auto") else config.precision
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with here.together():
            torch.manual_seed(config.seed)
            objective = make_objective(config)
            objective.load_state_dict(weights)
        try:
            mine = _repeat(failed, config, here, objective, precision)
        except BrokenPicture as error:
            raise DataError(str(error)) from error
        found = here.gather_objects(mine)
    lines = [f"step {failed.step} of {path.parent.parent}, {precision}, made by {failed.commit}"]
    repeats = False
    for rank, one in enumerate(found):
        lines += [f"process {rank}"] if here.size > 1 else []
        lines += one.lines
        repeats |= one.repeats
    if not repeats:
        lines.append(
            "all are numbers this time: it does not repeat (another device or code, pictures that have changed, or a "
            "fault of the machine)"
        )
    return Replay(tuple(lines), repeats)


def _repeat(failed: FailedStep, config: TrainConfig, here: World, objective: Objective, precision: str) -> Replay:
    told, broken = failed.processes[here.rank], list[str]()
    with here.together():
        source = open_pairs(config)
        places: dict[str, AnyPath] = {
            os.fspath(place): place for manifest in source.manifests for place in manifest.paths
        }
        batches = pairs_of(told, places)
    objective.to(here.device)
    objective.train()
    if config.checkpoint_activations:
        checkpoint_activations(objective.model)
    poisoned = faulty(objective.named_parameters())
    pairs, scale = max(map(len, batches)), failed.loss_scale if precision == "fp16" else 1.0
    with (
        PairLoader(
            batches,
            source.pictures.paths,
            loader_options(config, pairs, here.device, precision),
            substitute=source.substitute,
            on_broken=lambda place, reason: broken.append(f"{os.fspath(place)}: {reason}"),
        ) as loader,
        FirstFault(objective.model) as search,
    ):
        means = make_gradients(
            distributed(objective, here),
            search.watched(loader),
            len(batches),
            seed=step_seed(config.seed, failed.step, here.rank),
            device=here.device,
            precision=precision,
            scale=lambda loss: loss * scale,
        )
    norm = nn.utils.clip_grad_norm_(objective.parameters(), math.inf) / scale
    now = {"norm": float(norm), **{name: float(value) for name, value in means.items() if value.ndim == 0}}
    spoiled = faulty((name, one.grad) for name, one in objective.named_parameters())
    losses = [name for name, value in now.items() if name not in ("norm", "loss") and not math.isfinite(value)]
    sums = "all are numbers" + ("" if math.isfinite(now["loss"]) else ", their weighted sum is none")
    trained = sum(one.grad is not None for one in objective.parameters())
    if not math.isfinite(now["loss"]):
        backward = "none is a number, as the loss is none"
    elif search.gradient is not None:
        backward = f"{_FIRST} {search.gradient}"
    else:
        backward = "all hold numbers" + (", so it begins between the modules" if spoiled else "")
    facts = {
        "then": _numbers(told["numbers"]),
        "now": _numbers(now),
        "weights": listed(poisoned) or "all are numbers",
        "pictures": listed(search.pictures) or "all hold numbers",
        "outputs": "all hold numbers" if search.output is None else f"{_FIRST} {search.output}",
        "losses": f"no number: {', '.join(losses)}" if losses else sums,
        "outputs' gradients": backward,
        "weights' gradients": f"{len(spoiled)} of {trained}: {listed(spoiled)}" if spoiled else "all hold numbers",
        **({"broken pictures": listed(broken)} if broken else {}),
    }
    if failed.pictures != source.fingerprint:
        facts["list of pictures"] = "another than it was: layers may show other pictures"
    lines = tuple(f"  {name:20}{text}" for name, text in facts.items())
    return Replay(lines, not (math.isfinite(now["norm"]) and math.isfinite(now["loss"])))


def _numbers(numbers: Mapping[str, float | str]) -> str:
    return ", ".join(f"{name} {float(value):g}" for name, value in numbers.items())
