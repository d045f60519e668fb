"""Exact resume under kills: short trainings, killed at random moments, are compared bit for bit with one that was not.

    python -m benchmarks.kills --count 50 [--processes 1] [--objective descriptor] [--steps 8] [--seed 0] \
        [--json kills.json] [key=value ...]

A training of a tiny model on the CPU, with two batches a step, a running mean of the weights and a checkpoint after
every step, so that many kills fall into saving; ``key=value`` changes its settings. Its processes are forks of this
one, which has imported everything, so that a start takes a second. SIGKILL hits their group or, of several, now and
then one alone: the others must end by themselves. Then the same command continues, until the run has ended; then the
next run. Each run's last checkpoint (weights, their mean, the optimiser's state) and log must equal those of an
undisturbed run. Printed are the kills, where they fell, and the values that differ; the exit status is 1 if there is
one, or a start failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import copynce.training.trainer  # noqa: F401 - before the forks
from copynce.cli import main as command_line
from copynce.config import save_config
from copynce.data.pairs import PairSampler
from copynce.data.sources import open_source
from copynce.data.synthetic import make_pictures
from copynce.training import TrainConfig, checkpoints, load_config, read_log
from copynce.training.checkpoints import read_state
from copynce.training.objectives import make_objective
from dali_pipelines import LoaderOptions
from dali_pipelines.graph import build_pipeline
from dali_pipelines.preparation import PairPreparation

#: Seconds after which processes whose partner was killed are killed too: those that wait for it to come wait longer.
PATIENCE = 30.0

_SHAPE = "patch_size: 8, embed_dim: 24, num_heads: 2"
_MODELS = {
    "descriptor": ("model.dim=16", f"model.backbone_options={{{_SHAPE}, depth: 2}}"),
    "matcher": (
        "data.pairs=matcher",
        "data.policy=descriptor",
        f"model.backbone_options={{{_SHAPE}}}",
        "model.encoder_blocks=1",
        "model.fusion_blocks=1",
    ),
}


def settings(objective: str, pictures: Path, steps: int, processes: int, overrides: Sequence[str]) -> list[str]:
    """The settings of a training as key=value, but for its folder."""
    return [
        f"objective={objective}",
        f"data.train={pictures}",
        f"data.batch_size={4 // processes}",
        "data.threads=1",
        "model.img_size=32",
        *_MODELS[objective],
        "model.drop_path=0.2",
        f"optim.steps={steps}",
        "optim.accumulate=2",
        "ema=0.9",
        "checkpoint_every=1",
        "log_every=1",
        "threads=1",
        "device=cpu",
        "precision=fp32",
        "tensorboard=false",
        *overrides,
    ]


def warm_up(config: TrainConfig) -> None:
    """Load here, for all forks, what a training begins with: compiled code, the graph of DALI. No thread stays."""
    source = open_source(config.data, config.seed)
    sampler = PairSampler(source, config.data.batch_size, config.seed)
    options = LoaderOptions(size=config.model.img_size, batch_size=config.data.batch_size, threads=1)
    preparation = PairPreparation(sampler.batches(0, 2), source.pictures.paths, options, source.substitute)
    preparation.start(lambda path, reason: None)
    preparation.batch(0, np.empty)
    preparation.reader.close()
    # Defined and not built: a fork would have none of its threads.
    build_pipeline(lambda: [], views=2, size=32, batch_size=8, threads=1, device="cpu")
    make_objective(config)
    while threading.active_count() > 1:
        time.sleep(0.01)


class Processes:
    """A training's processes, just started: forks of this one that call ``copynce train FILE``, one group."""

    def __init__(self, file: Path, count: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.running: list[int] = []
        self.statuses: list[int] = []
        for rank in range(count):
            process = os.fork()
            if process == 0:
                _child(file, rank, count, port, self.running[0] if self.running else 0)
            self.running.append(process)
            # As the child does: the first of the two may come late, and a kill of the group early.
            with contextlib.suppress(OSError):
                os.setpgid(process, self.running[0])
        self._group = self.running[0]

    def wait(self, seconds: float) -> bool:
        """Whether all have ended by themselves within so many seconds."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            for process in self.running:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.running.remove(process)
                    self.statuses.append(os.waitstatus_to_exitcode(status))
                    break
            else:
                time.sleep(0.005)
        return not self.running

    def kill(self, only: int | None = None) -> None:
        """SIGKILL to the group, or to one of those that run."""
        if only is None:
            os.killpg(self._group, signal.SIGKILL)
        else:
            os.kill(self.running[only], signal.SIGKILL)


def _child(file: Path, rank: int, size: int, port: int, group: int) -> None:
    """What a fork does; never returns."""
    status = 1
    try:
        os.setpgid(0, group)
        tempfile.tempdir = str(file.parent)  # what libraries leave there when they are killed goes with it
        told = os.open(file.with_suffix(f".rank{rank}.txt"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(told, 1)
        os.dup2(told, 2)
        if size > 1:
            os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        status = command_line(["train", str(file)])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def values(checkpoint: Path) -> dict[str, Any]:
    """Every tensor and number of a checkpoint, and the losses of the log before it, by name."""
    found: dict[str, Any] = {
        f"model.{name}": value for name, value in load_file(checkpoint / "model.safetensors").items()
    }
    state = read_state(checkpoint)
    del state["place"]  # the commit may be another by now
    found |= dict(_flat("state", state))
    for line in read_log(checkpoint.parents[1] / "log.jsonl"):
        found[f"loss of step {line['step']}"] = line["loss"]
    return found


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _flat(f"{name}.{index}", inner)
    else:
        yield name, value


def differing(one: Path, other: Path) -> list[str]:
    """The names of what is not the same, to the bit, in two runs' last checkpoints."""
    first, second = values(one), values(other)
    return sorted(name for name in first | second if not _same(first.get(name), second.get(name)))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def moment(run: Path, before: int) -> str:
    """Where a kill fell, by what it left; ``before``: checkpoints that were there when the processes started."""
    if list((run / "checkpoints").glob(".step-*.part")):
        return "while a checkpoint was written or removed"
    if list((run / "mined").glob("epoch-*/features")):
        return "while neighbours were mined"
    if not checkpoints(run):
        return "before the first checkpoint"
    return "after another step was saved" if _newest(run) > before else "before another step was saved"


def _newest(run: Path) -> int:
    found = checkpoints(run)
    return int(found[-1].name.removeprefix("step-")) if found else -1


def measure(folder: Path, *, count: int, processes: int, objective: str, steps: int, seed: int, overrides: Sequence[str]
            ) -> dict[str, Any]:  # fmt: skip
    """Kill ``count`` times in all; what happened, with the names of the values that ``differ``."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    make_pictures(folder / "pictures", 24, seed=5, side_px=(64, 96))
    given = settings(objective, folder / "pictures", steps, processes, overrides)

    def prepared(name: str) -> tuple[Path, Path]:
        save_config(load_config(TrainConfig, None, [f"out={folder / name}", *given]), folder / f"{name}.yaml")
        return folder / f"{name}.yaml", folder / name

    file, whole = prepared("whole")
    warm_up(load_config(TrainConfig, file, []))
    started = time.monotonic()
    undisturbed = Processes(file, processes)
    if not undisturbed.wait(3600) or any(undisturbed.statuses):
        raise SystemExit(f"the undisturbed run ended with {undisturbed.statuses}; {folder}/whole.rank0.txt tells more")
    duration = time.monotonic() - started
    expected = checkpoints(whole)[-1]
    report: dict[str, Any] = {"kills": 0, "runs": 0, "alone": 0, "left_waiting": 0, "failed": [], "differ": []}
    moments: Counter[str] = Counter()
    while report["kills"] < count:
        file, run = prepared(f"run-{report['runs']}")
        while True:
            before, last = _newest(run), report["kills"] >= count
            training = Processes(file, processes)
            if training.wait(3600 if last else draw.uniform(0, 0.8 * duration)):
                break
            alone = processes > 1 and draw.random() < 0.3
            training.kill(draw.randrange(len(training.running)) if alone else None)
            report["kills"] += 1
            report["alone"] += alone
            if not training.wait(PATIENCE):
                report["left_waiting"] += 1
                training.kill()
                training.wait(PATIENCE)
            moments[moment(run, before)] += 1
        report["runs"] += 1
        ends = [f"{run.name} ended with {status}" for status in training.statuses if status != 0]
        differ = [] if ends else differing(expected, checkpoints(run)[-1])
        report["failed"] += ends
        report["differ"] += [f"{run.name}: {name}" for name in differ]
        if not ends and not differ:
            shutil.rmtree(run)
        elif ends:
            break
    return {**report, "moments": dict(moments), "seconds_undisturbed": duration}


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, compare, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills in all (default: %(default)s)")
    parser.add_argument("--processes", type=int, choices=(1, 2, 4), default=1, help="of a training, on gloo")
    parser.add_argument("--objective", choices=tuple(_MODELS), default="descriptor")
    parser.add_argument("--steps", type=int, default=8, help="of a training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the training")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.steps < 1:
        parser.error("--count and --steps must be at least 1")
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    result = measure(
        folder,
        count=options.count,
        processes=options.processes,
        objective=options.objective,
        steps=options.steps,
        seed=options.seed,
        overrides=options.overrides,
    )
    where = ", ".join(f"{number} {name}" for name, number in sorted(result["moments"].items()))
    print(
        f"{options.objective}, {options.processes} processes: {result['kills']} kills over {result['runs']} runs "
        f"({where}; {result['alone']} of one process alone, of which the others were left waiting "
        f"{result['left_waiting']} times); {len(result['differ'])} values differ, {len(result['failed'])} starts failed"
    )
    for line in [*result["failed"], *result["differ"][:20]]:
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    bad = bool(result["differ"] or result["failed"])
    if bad:
        print(f"what was left lies in {folder}")
    else:
        shutil.rmtree(folder)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
