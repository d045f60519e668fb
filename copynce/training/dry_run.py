"""What a training would be, before it is one: ``copynce train NAME ... --dry-run``.

Everything is opened as a training opens it, some batches are read, and nothing is written. The question behind it: will
the GPUs be fed? They want pictures as fast as their arithmetic allows, FLOP of a step against their peak; the loader
gives what is measured here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from copynce.data import Quarantine
from copynce.data.mixtures import MixedPairs
from copynce.data.neighbours import Neighbours
from copynce.data.pairs import DescriptorPairs, MatcherPairs, PairSampler, PairSource
from copynce.errors import ConfigError, DataError
from copynce.models import weights_file
from copynce.models.precision import bf16_in_hardware
from copynce.training.checkpoints import checkpoints, find_model, step_of
from copynce.training.config import TrainConfig
from copynce.training.distributed import World, choose_device, launch
from copynce.training.evaluations import Evaluations
from copynce.training.gpus import UTILISATION, Gpus, find_gpus
from copynce.training.loader_rate import LoaderRate, measure_loader
from copynce.training.loading import loader_options
from copynce.training.mined import MinedNeighbours, open_pairs
from copynce.training.objectives import make_objective
from copynce.training.objectives.base import Objective
from copynce.training.schedule import run_schedule
from copynce.training.step_cost import StepCost, step_cost
from dali_pipelines import BrokenPicture

#: The GPUs that are asked about where none is named and none is here: those of the released trainings.
DEFAULT_GPUS = "A100:8"
_ASKED = 4096  # pictures whose neighbours are looked at


@dataclass(frozen=True)
class DryRun:
    """What was found. ``lines``: it as text. ``wanted``: pictures/s of all GPUs; ``cores``: that feed them, of this
    machine's kind; ``fed``: whether what its loader gives is enough."""

    lines: tuple[str, ...]
    cost: StepCost
    rate: LoaderRate
    wanted: float
    cores: int
    fed: bool


def dry_run(
    config: TrainConfig, *, gpus: str | None = None, seconds: float = 10.0, say: Callable[[str], None] | None = None
) -> DryRun:
    """Try a training out on this process; see the module's text.

    gpus: NAME:COUNT, those that the training is meant for, a process on each; None: those that are here, or
    ``DEFAULT_GPUS``. seconds: of the loader's measurement. say: is told what takes time. Raises what opening the
    training would raise.
    """
    say = say or (lambda line: None)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, here = choose_device(config.device), launch().size
    target, why = _target(gpus, device, here)
    source = open_pairs(config)
    parts = config.optim.accumulate
    sampler = PairSampler(source, config.data.batch_size, config.seed, rank=0, world_size=here, parts=parts)
    alone = World(0, 1, device)
    MinedNeighbours(config, source, sampler.steps_per_epoch, alone)
    Evaluations(config, sampler.steps_per_epoch, 0, alone)
    torch.manual_seed(config.seed)
    objective = make_objective(config)
    start = _start(config, objective)
    precision = config.precision
    there = precision if precision != "auto" else "bf16" if "bf16" in target.peaks else "fp32"
    if there not in target.peaks:
        raise ConfigError(f"precision={there}: {target.name} does not multiply it; use precision=fp16 or fp32")
    on_device = precision if precision != "auto" else "bf16" if bf16_in_hardware(device) else "fp32"
    say("the model's step, on tensors without numbers ...")
    pairs = config.data.batch_size * source.pairs_per_item
    again = config.checkpoint_activations
    cost = step_cost(objective.model, 2 * pairs, half=there != "fp32", checkpointed=again)

    quarantine = Quarantine()
    for manifest in source.manifests:
        manifest.report(lambda line: None, quarantine.add)
    no_files = len(quarantine)
    options = loader_options(config, pairs, device, on_device)
    say(f"the loader, for about {seconds:g} s after its first batches ...")
    try:
        rate = measure_loader(
            sampler, options, processes=config.data.processes, seconds=seconds, on_broken=quarantine.add
        )
    except BrokenPicture as error:
        raise DataError(str(error)) from error

    peak = target.peaks[there]
    each = UTILISATION * peak * cost.pictures / cost.flop  # pictures/s
    wanted = each * target.count
    cores = math.ceil(wanted * rate.core_seconds)
    in_precision = f"{peak / 1e12:.4g} TFLOP/s in {there}"
    lines = [
        "run",
        *_told(_model_facts(config, objective, start)),
        "data",
        *_told(_data_facts(config, source, quarantine, no_files, rate)),
        *_columns(config, source, {f"here: {here}": here, str(target): target.count}),
        f"batch of one GPU ({cost.pictures:,} pictures{f', {parts} of them a step' if parts > 1 else ''})",
        *_told(_cost_facts(cost, rate)),
        f"memory of one GPU ({there})",
        *_told(_memory_facts(config, objective, cost, rate, there, on_device, target)),
        f"will {target} be fed?",
        *_told(
            {
                "they want": f"{_count(wanted)} pictures/s, {_count(each)} each: {in_precision} at "
                f"{UTILISATION:.0%}{why}",
                **_feeding(config, target, each, cores, rate, device),
            }
        ),
    ]
    return DryRun(tuple(lines), cost, rate, wanted, cores, _gives(rate, target) >= wanted)


def _target(gpus: str | None, device: torch.device, here: int) -> tuple[Gpus, str]:
    if gpus is not None:
        return find_gpus(gpus), ""
    if device.type != "cuda":
        return find_gpus(DEFAULT_GPUS), " (--gpus NAME:COUNT asks for others)"
    name = torch.cuda.get_device_name(device)
    try:
        return find_gpus(f"{name.replace(':', ' ')}:{here}"), ""
    except ConfigError:
        return find_gpus(DEFAULT_GPUS), f" (the peak of this machine's {name} is not known; --gpus names others)"


def _start(config: TrainConfig, objective: Objective) -> str:
    """What the run starts with; the model takes its weights."""
    found = checkpoints(Path(config.out))
    if found and config.resume == "never":
        return f"refused: {config.out} already holds {found[-1].name}; choose another out, or resume=auto"
    if found:
        return f"{found[-1].name} of {config.out}, which is continued after step {step_of(found[-1])}"
    if config.weights is None:
        return "random weights"
    return "; ".join(objective.begin_with(find_model(weights_file(config.weights, config.model.backbone))))


def _model_facts(config: TrainConfig, objective: Objective, start: str) -> dict[str, str]:
    model = objective.model
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in objective.parameters()]
    return {
        "objective": f"{config.objective}, {config.model.backbone} at {model.img_size} px, "
        f"{model.grid} x {model.grid} patches of {model.patch_size} px",
        "parameters": f"{sum(n for n, _ in numbers):,}, {sum(n for n, trained in numbers if trained):,} are trained",
        "starts with": start,
    }


def _data_facts(
    config: TrainConfig, source: PairSource, quarantine: Quarantine, no_files: int, rate: LoaderRate
) -> dict[str, str]:
    def listed() -> Iterator[str]:
        for manifest in source.manifests:
            left_out = f", {manifest.ignored:,} other files left out" if manifest.ignored else ""
            yield f"{len(manifest):,} in {manifest.root}{left_out}"

    broken = len(quarantine) - no_files
    read = f"{rate.batches} batches, {rate.pictures:,} views: {broken} broken"
    first = next(iter(quarantine.entries()[no_files:]), None)
    return {
        "pictures": "; ".join(listed()) + (f"; {no_files} are no files, and skipped" if no_files else ""),
        "neighbours": "mined before the first step" if config.mining.at_start else _coverage(_neighbours(source)),
        "read": read + (f" (the first: {first[0]}, {first[1]})" if first else ""),
    }


def _neighbours(source: PairSource) -> Neighbours | None:
    if isinstance(source, MixedPairs):
        source = source.generated
    return source.neighbours if isinstance(source, DescriptorPairs | MatcherPairs) else None


def _coverage(neighbours: Neighbours | None) -> str:
    if neighbours is None:
        return "none given (data.neighbours)"
    asked = range(0, len(neighbours), max(1, math.ceil(len(neighbours) / _ASKED)))
    counts = [len(neighbours.of(i)) for i in asked]
    some = sum(count > 0 for count in counts)
    of = f"{len(counts):,} pictures" + ("" if len(counts) == len(neighbours) else " that were looked at")
    return f"{some:,} of {of} have some, these {sum(counts) / max(some, 1):.1f} in the mean"


def _columns(config: TrainConfig, source: PairSource, processes: dict[str, int]) -> list[str]:
    """Steps and learning rates by the number of processes."""
    rows: dict[str, list[str]] = {
        name: [] for name in ("items a step", "pairs, pictures a step", "steps an epoch", "steps, epochs", "warm-up")
    }
    rows |= {name: [] for name in ("learning rate at first", "  at its highest", "  at last")}
    for count in processes.values():
        items = config.data.batch_size * config.optim.accumulate * count
        pairs = items * source.pairs_per_item
        per_epoch = len(source) // items
        facts = [f"{items:,}", f"{pairs:,}, {2 * pairs:,}", f"{per_epoch:,}"]
        if per_epoch:
            schedule = run_schedule(config.optim, items, per_epoch)
            last = max(schedule.total - 1, 0)
            highest = max(schedule.rate(step) for step in (0, min(schedule.warmup, last)))
            facts += [f"{schedule.total:,}, {schedule.total / per_epoch:.3g}", f"{schedule.warmup:,} steps"]
            facts += [f"{rate:.4g}" for rate in (schedule.rate(0), highest, schedule.rate(last))]
        else:
            facts += [f"{len(source):,} items fill no step", *["-"] * 4]
        for row, fact in zip(rows.values(), facts, strict=True):
            row.append(fact)
    width = max(len(text) for row in [*rows.values(), list(processes)] for text in row) + 2
    return [
        f"{'steps':22}" + "".join(f"{name:>{width}}" for name in processes),
        *(f"  {name:20}" + "".join(f"{text:>{width}}" for text in row) for name, row in rows.items()),
    ]


def _cost_facts(cost: StepCost, rate: LoaderRate) -> dict[str, str]:
    a_picture = f"{cost.forward_flop / cost.pictures / 1e9:.3g} GFLOP forward"
    return {
        "FLOP": f"{cost.flop / 1e12:.4g} TFLOP; a picture {a_picture}, {cost.flop / cost.pictures / 1e9:.3g} with "
        "backward (counted operator by operator; losses not, under 1 %)",
        "bytes": f"{_bytes(rate.views + rate.tables)}: views {_bytes(rate.views)}, tables {_bytes(rate.tables)}",
    }


def _memory_facts(
    config: TrainConfig,
    objective: Objective,
    cost: StepCost,
    rate: LoaderRate,
    there: str,
    on_device: str,
    target: Gpus,
) -> dict[str, str]:
    weights = sum(tensor.nbytes for tensor in (*objective.parameters(), *objective.buffers()))
    trained = sum(parameter.nbytes for parameter in objective.parameters() if parameter.requires_grad)
    width = {name: 4 if name == "fp32" else 2 for name in (there, on_device)}
    parts = {
        "weights": weights,
        "gradients": trained,
        "DDP's copy of them": trained if target.count > 1 else 0,
        "AdamW's two means": 2 * trained,
        "the weights' mean": 0 if config.ema is None else weights,
        "activations": cost.saved,
        "two batches": 2 * (rate.views * width[there] // width[on_device] + rate.tables),
    }
    how = "what backward keeps of a batch of this size, added up tensor by tensor without making it; attention fused"
    if config.checkpoint_activations:
        how = "the blocks' inputs, and what one of the blocks keeps: an estimate"
    return {
        "estimate": f"{_bytes(sum(parts.values()))} (the allocator and kernels' workspaces need more, 10 to 20 %)",
        "of it": ", ".join(f"{name} {_bytes(part)}" for name, part in parts.items() if part),
        "activations": f"{_bytes(cost.saved / cost.pictures)} a picture: {how}",
    }


def _gives(rate: LoaderRate, target: Gpus) -> float:
    """Pictures/s that all processes' loaders give on this machine, if it makes them all."""
    return min(target.count * rate.rate, _cores() / rate.core_seconds)


def _feeding(
    config: TrainConfig, target: Gpus, each: float, cores: int, rate: LoaderRate, device: torch.device
) -> dict[str, str]:
    data, here = config.data, _cores()
    where = "decoding and editing on the GPU" if device.type == "cuda" else "on the CPU"
    measured = (
        f"{_count(rate.rate)} pictures/s for one process, {where}, with data.threads={data.threads} and "
        f"data.processes={data.processes}; a picture takes {1e3 * rate.core_seconds:.3g} ms of a core"
    )
    gives, wanted = _gives(rate, target), each * target.count
    workers = math.ceil(each * rate.worker_seconds)
    need = (
        f"{cores:,} cores like these, {math.ceil(cores / target.count)} a GPU; of them data.processes={workers} or "
        f"more: a worker prepares {_count(1 / rate.worker_seconds)} pictures/s"
    )
    if gives >= wanted:
        answer = f"yes: {_count(gives)} pictures/s from this machine's {here} cores"
    else:
        share = f"{100 * gives / wanted:.2g} % of it"
        answer = f"not by this machine: its {here} cores give at most {_count(gives)} pictures/s, {share}"
    return {"a loader gives": measured, "needed": need, "answer": answer}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _told(facts: dict[str, str]) -> Sequence[str]:
    return [f"  {name:20}{text}" for name, text in facts.items()]


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
