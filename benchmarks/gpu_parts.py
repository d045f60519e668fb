"""What ``python -m benchmarks.gpu`` measures, a part in a process.

Each part writes a line of JSON to ``OUT/PART.jsonl`` as soon as a number is there, and prints it, for it may be killed.
On a GPU: the descriptor's released training, ViT-S/16 at 224 px with 96 pairs a step in 16 bits; on a processor 16
pairs.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from copynce.config import save_config
from copynce.data import Quarantine
from copynce.data.pairs import PairSampler
from copynce.data.sources import open_source
from copynce.data.synthetic import make_pictures
from copynce.errors import ConfigError
from copynce.models import param_groups
from copynce.models.precision import bf16_in_hardware
from copynce.training import TrainConfig, checkpoints, load_config, read_log, train
from copynce.training.compiling import compile_blocks
from copynce.training.distributed import choose_device
from copynce.training.gpus import find_gpus
from copynce.training.loader_rate import measure_loader
from copynce.training.loading import DTYPES
from copynce.training.objectives import make_objective
from copynce.training.step_cost import step_cost
from dali_pipelines import LoaderOptions, PairBatch

Emit = Callable[[Mapping[str, Any]], None]

WORKERS = (0, 8, 4, 2)  # the most telling first
PICTURES, SIDES = 768, (320, 560)


def settings(out: Path, name: str, device: str, *overrides: str) -> TrainConfig:
    """A training on the pictures of ``out``, without end."""
    chosen = [
        f"out={out / 'runs' / name}",
        f"data.train={out / 'pictures'}",
        f"data.batch_size={96 if device == 'gpu' else 16}",
        "data.threads=4",
        f"device={device}",
        "optim.steps=1000000",
        "checkpoint_every=1000000",
        "log_every=10",
        "tensorboard=false",
        *overrides,
    ]
    return load_config(TrainConfig, None, chosen)


def pictures(out: Path, count: int = PICTURES, side_px: tuple[int, int] = SIDES) -> None:
    """The pictures that trainings and loaders read; and two batches of them, for which Numba's code is compiled."""
    # Renamed when all are there: a part that finds none makes them itself.
    part = out / "pictures.part"
    shutil.rmtree(part, ignore_errors=True)
    make_pictures(part, count, side_px=side_px, processes=min(8, os.cpu_count() or 1))
    part.rename(out / "pictures")
    config = settings(out, "pictures", "cpu", "data.threads=1", "data.batch_size=8")
    _loader_rate(config, 0, 0.1)


class Step:
    """A training step on one batch, as the trainer makes it: losses, backward, clipping, AdamW. Gives the loss."""

    def __init__(self, config: TrainConfig, batch: PairBatch, *, compiled: bool = False, graph: bool = False) -> None:
        self._device = batch.query.device
        torch.manual_seed(0)
        self._objective = make_objective(config).to(self._device).train()
        if compiled:
            compile_blocks(self._objective.model, self._device)
        groups = param_groups(self._objective, config.optim.weight_decay)
        # Within a graph the optimiser counts its steps on the device.
        self._optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=config.optim.betas, fused=True, capturable=graph)
        self._batch, self._clip, self._dtype = batch, config.optim.clip_norm, batch.query.dtype

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        half = self._dtype != torch.float32
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=half):
            loss, _ = self._objective(self._batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self._objective.parameters(), self._clip)
        self._optimizer.step()
        return loss.detach()


def fixed_batch(config: TrainConfig) -> PairBatch:
    """A batch of noise with tables as of crops, in the precision that a training would take."""
    from benchmarks.bench_copynce_loss import make_batch

    device, pairs, side = choose_device(config.device), config.data.batch_size, config.model.img_size
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if bf16_in_hardware(device) else "fp32"
    _, _, forward, backward = make_batch(pairs, side, side, 1)
    query, reference = torch.randn(2, pairs, 3, side, side).to(getattr(torch, DTYPES[precision]))
    every = torch.ones(pairs, dtype=torch.bool)
    uuids = [str(i) for i in range(pairs)]
    return PairBatch(query, reference, forward, backward, every, every, uuids).to(device)


def measure_steps(config: TrainConfig, seconds: float, emit: Emit) -> None:
    """Pictures/s of a step whose batch is there already, the bar of the loader: eager, compiled, each as a graph."""
    batch = fixed_batch(config)
    on_gpu = batch.query.is_cuda
    flop = _flop_of_a_picture(config, batch)
    ways = {
        "eager": (False, False),
        "CUDA graph": (False, True),
        "compiled blocks": (True, False),
        "compiled blocks, CUDA graph": (True, True),
    }
    for name, (compiled, graph) in ways.items():
        if graph and not on_gpu:
            continue
        about = {"step": name, "dtype": str(batch.query.dtype).removeprefix("torch.")}
        measure = partial(_measure_step, config, batch, seconds / len(ways), flop, compiled=compiled, graph=graph)
        _attempt(emit, about, measure)


def _attempt(emit: Emit, about: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Emit what is measured, or the error in its place: the next may go well."""
    try:
        row = measure()
    except Exception as error:  # a capture that waits for the device, a compiler that is not there
        row = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    emit({**about, **row})
    return row


def _measure_step(
    config: TrainConfig, batch: PairBatch, seconds: float, flop: float, *, compiled: bool, graph: bool
) -> dict[str, Any]:
    begin = time.perf_counter()
    step: Callable[[], Any] = Step(config, batch, compiled=compiled, graph=graph)
    if batch.query.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    first = float(step())
    _wait()
    syncs = None if graph else _synchronisations(step)
    if graph:
        from benchmarks.kernels import graphed

        step = graphed(step)
    ready = time.perf_counter() - begin
    step()
    _wait()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.3 * seconds or count < 2:  # compiling and capturing take the rest
        step()
        count += 1
        if count % 4 == 0:
            _wait()  # a queue without end would outlive the box
    _wait()
    each = (time.perf_counter() - start) / count
    views = 2 * len(batch.uuids)
    return {
        "ms": 1e3 * each,
        "pictures/s": views / each,
        "MFU": _utilisation(flop * views / each, batch),
        "first loss": first,
        "ready after s": ready,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if batch.query.is_cuda else None,
        "synchronisations": syncs,
    }


def _flop_of_a_picture(config: TrainConfig, batch: PairBatch) -> float:
    views = 2 * min(len(batch.uuids), 8)
    half = batch.query.dtype != torch.float32
    return step_cost(make_objective(config).model, views, half=half).flop / views


def _utilisation(rate: float, batch: PairBatch) -> float | None:
    """Of FLOP/s the share of what the GPU multiplies at most; None where that is not known."""
    if not batch.query.is_cuda:
        return None
    try:
        peaks = find_gpus(torch.cuda.get_device_name().replace(":", " ")).peaks
    except ConfigError:
        return None
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return rate / peaks[names[batch.query.dtype]]


def _synchronisations(step: Callable[[], Any]) -> str | None:
    """How often a step waits for the device, and where first."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in told if "synchroniz" in str(warning.message)]
    where = f", first {Path(found[0].filename).name}:{found[0].lineno}" if found else ""
    return f"{len(found)}{where}"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


#: What operators and kernels are, by words in their names.
KINDS = {
    "attention": "flash|fmha|attention|sdpa",
    "matrix products": "gemm|cutlass|cublas|nvjet|xmma|mkldnn|addmm|aten::mm|bmm|linear|matmul|convolution",
    "CopyNCE": "copynce|patch_overlap",
    "optimiser": "adam|multi_tensor|foreach",
    "memory": "memcpy|memset|copy_|fill|zero_",
    "normalisation": "norm",
}


def measure_profile(config: TrainConfig, emit: Emit, *, steps: int = 3, rows: int = 25) -> None:
    """Where the time of an eager step goes: kinds, then what takes longest. On a GPU its kernels, else operators."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    batch = fixed_batch(config)
    on_gpu = batch.query.is_cuda
    step = Step(config, batch)
    for _ in range(2 if on_gpu else 1):
        step()
    _wait()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _wait()
        wall = 1e3 * (time.perf_counter() - start) / steps
    spent: list[tuple[float, int, str]] = []
    for event in found.key_averages():
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent.append((taken / 1e3 / steps, event.count // steps, event.key))
    total = sum(taken for taken, _, _ in spent)
    if not total:
        raise SystemExit("the profiler tells of no kernel: CUPTI is not there, or another profiler holds it")
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for taken, _, name in spent:
        kinds[kind_of(name)] += taken
    where = "device" if on_gpu else "processor"
    emit({"kind": "all", f"ms of the {where} a step": total, "share": 1.0, "ms of the clock": wall})
    for kind, taken in sorted(kinds.items(), key=lambda pair: -pair[1]):
        emit({"kind": kind, f"ms of the {where} a step": taken, "share": taken / total})
    for taken, calls, name in sorted(spent, reverse=True)[:rows]:
        emit({"name": name[:90], "kind": kind_of(name), "calls": calls, "ms": taken, "share": taken / total})


def kind_of(name: str) -> str:
    """Of an operator or kernel, one of ``KINDS``, or "other"."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name.lower())), "other")


class _Enough(Exception):
    pass


def measure_training(config: TrainConfig, seconds: float) -> dict[str, Any]:
    """Pictures/s of a training as it is, over ``seconds`` after its first steps."""
    marks: list[tuple[int, float]] = []
    begin = time.perf_counter()

    def on_step(step: int) -> None:
        now = time.perf_counter()
        if not marks and (step >= 10 or now - begin > seconds):
            _wait()
            marks.append((step, time.perf_counter()))
        elif marks and now - marks[0][1] > seconds:
            _wait()
            marks.append((step, time.perf_counter()))
            raise _Enough

    shutil.rmtree(config.out, ignore_errors=True)
    with contextlib.suppress(_Enough):
        train(config, on_step=on_step)
    (first, start), (last, end) = marks
    log = read_log(Path(config.out) / "log.jsonl")
    shutil.rmtree(config.out)
    pairs = config.data.batch_size * config.optim.accumulate
    return {
        "steps": last - first,
        "ms a step": 1e3 * (end - start) / (last - first),
        "pictures/s": 2 * pairs * (last - first) / (end - start),
        "waited for data": log[-1]["data_wait_share"] if log else None,
        "first steps after s": start - begin,
    }


def measure_trainings(out: Path, device: str, seconds: float, emit: Emit) -> None:
    """With each number of workers; at last, with that which was fastest, compiled."""
    rates: dict[int, float] = {}
    each = 0.35 * seconds / (len(WORKERS) + 1)  # building pipelines and compiling blocks take the rest

    def with_workers(workers: int, compiled: bool) -> float:
        config = settings(
            out, "training", device, f"data.processes={workers}", f"compile_blocks={str(compiled).lower()}"
        )
        about = {"data.processes": workers, "compile_blocks": compiled}
        return _attempt(emit, about, partial(measure_training, config, each)).get("pictures/s", 0.0)

    for workers in WORKERS:
        rates[workers] = with_workers(workers, False)
    with_workers(max(rates, key=lambda workers: rates[workers]), True)


def measure_loaders(out: Path, device: str, seconds: float, emit: Emit) -> None:
    """The loader with nothing else to do."""
    for workers in WORKERS:
        config = settings(out, "loader", device)
        measure = partial(_loader_rate, config, workers, 0.5 * seconds / len(WORKERS))
        _attempt(emit, {"data.processes": workers}, measure)


def _loader_rate(config: TrainConfig, workers: int, seconds: float) -> dict[str, Any]:
    source = open_source(config.data, config.seed)
    half = bf16_in_hardware(choose_device(config.device))
    options = LoaderOptions(
        size=config.model.img_size,
        batch_size=config.data.batch_size,
        device="gpu" if config.device == "gpu" else "cpu",
        threads=config.data.threads,
        dtype="bfloat16" if half else "float32",
    )
    sampler = PairSampler(source, config.data.batch_size, config.seed)
    rate = measure_loader(sampler, options, processes=workers, seconds=seconds, on_broken=Quarantine().add)
    return {
        "pictures/s": rate.rate,
        "ms of a core a picture": 1e3 * rate.core_seconds,
        "ms a worker": 1e3 * rate.worker_seconds,
    }


def measure_kernels(out: Path, emit: Emit) -> None:
    """Times of the kernels beside their bounds, and whether they repeat: one size after the other, our own first."""
    from benchmarks.kernels import GPU_SHAPES, compile_step, on_gpu

    # A size compiles for a quarter of a minute, on one core: all at once, into Triton's cache.
    with ProcessPoolExecutor(len(GPU_SHAPES), multiprocessing.get_context("spawn")) as pool:
        for compiled in [pool.submit(compile_step, name) for name in GPU_SHAPES]:
            compiled.exception()  # which is raised again where it is measured
    first = next(iter(GPU_SHAPES))
    turns = [(["triton"], [name]) for name in GPU_SHAPES] + [(["eager", "compiled"], [first])]
    failed = 0
    for providers, shapes in turns:
        path = out / f"kernel-times-{shapes[0]}-{providers[0]}.json"
        failed += on_gpu(path, False, providers, shapes)
        for row in json.loads(path.read_text())["benchmarks"]:
            told, median = row["extra_info"], row["stats"]["median"]
            emit(
                {
                    "what": row["name"],
                    "ms": 1e3 * median,
                    "bound ms": told["bound_ms"],
                    "times the bound": 1e3 * median / told["bound_ms"],
                    "peak MiB": told["peak_mib"],
                    "repeatable": told.get("bitwise_repeatable", "-"),
                }
            )
    if failed:
        raise SystemExit(f"{failed} checks failed")


def measure_two_processes(out: Path, device: str, emit: Emit, *overrides: str, steps: int = 30) -> None:
    """Two processes (NCCL, or gloo on a processor) against one with the whole batch: losses in float32, and rates."""
    logs = {}
    for processes in (1, 2):
        items = (32 if device == "gpu" else 8) // processes
        chosen = (f"data.batch_size={items}", f"optim.steps={steps}", "precision=fp32", "log_every=1", *overrides)
        config = settings(out, f"processes-{processes}", device, *chosen)
        shutil.rmtree(config.out, ignore_errors=True)
        file = Path(f"{config.out}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, file)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = []
        for rank in range(processes):
            names = {"WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            told = {name: str(value) for name, value in names.items()} if processes > 1 else {}
            command = [sys.executable, "-m", "copynce.cli", "train", str(file)]
            started.append(subprocess.Popen(command, env={**os.environ, **told, "MASTER_PORT": port}))
        statuses = [process.wait() for process in started]
        if any(statuses):
            raise SystemExit(f"{processes} processes ended with {statuses}")
        logs[processes] = read_log(Path(config.out) / "log.jsonl")
        later = logs[processes][len(logs[processes]) // 2 :]
        rate = sum(line["pictures_per_second"] for line in later) / len(later)
        emit({"processes": processes, "pictures/s": rate, "last loss": logs[processes][-1]["loss"]})
        assert checkpoints(Path(config.out)), "it has ended well"
    apart = [abs(b["loss"] / a["loss"] - 1) for a, b in zip(logs[1], logs[2], strict=True)]
    emit({"largest relative difference of a loss": max(apart), "of the first": apart[0]})


def main(name: str, folder: str, device: str, box: str) -> None:
    """Measure one part for ``box`` seconds on ``device``, "gpu" or "cpu"; its rows go into ``folder``."""
    out, seconds = Path(folder), float(box)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name.replace(' ', '-')}.jsonl"
    errors = 0

    def emit(row: Mapping[str, Any]) -> None:
        nonlocal errors
        errors += "error" in row
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    if name in ("training", "loader", "two processes") and not (out / "pictures").exists():
        pictures(out)
    begin = settings(out, "step", device, f"data.train={out}")  # no picture of it is read
    parts: dict[str, Callable[[], None]] = {
        "pictures": lambda: pictures(out),
        "kernel times": lambda: measure_kernels(out, emit),
        "step": lambda: measure_steps(begin, seconds, emit),
        "profile": lambda: measure_profile(begin, emit),
        "training": lambda: measure_trainings(out, device, seconds, emit),
        "loader": lambda: measure_loaders(out, device, seconds, emit),
        "two processes": lambda: measure_two_processes(out, device, emit),
    }
    parts[name]()
    if errors:
        raise SystemExit(f"{errors} of the measurements failed")
