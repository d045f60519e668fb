"""The training loop: steps, saves, resumes and reports. What is optimised is an :class:`Objective`'s affair."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from copynce.data import Quarantine
from copynce.data.pairs import PairSampler
from copynce.errors import DataError, RunError, Stopped, TrainingError
from copynce.models import param_groups, weights_file
from copynce.models.memory import keep_heap
from copynce.models.precision import bf16_in_hardware
from copynce.provenance import running_commit
from copynce.training.activations import checkpoint_activations
from copynce.training.average import WeightMean
from copynce.training.boards import Board, TensorBoard, WeightsAndBiases, import_wandb
from copynce.training.checkpoints import MODEL, STATE, checkpoints, damage, find_model, read_state, write_checkpoint
from copynce.training.compiling import compile_blocks
from copynce.training.config import TrainConfig
from copynce.training.distributed import World, world
from copynce.training.evaluations import LOGGED, Evaluations
from copynce.training.failed_step import FailedStep, told, write_failed_step
from copynce.training.gpus import peak_flops
from copynce.training.gradients import distributed, make_gradients, step_seed
from copynce.training.loading import loader_options
from copynce.training.log import RunLog, read_events
from copynce.training.meters import Outcome, Pace, means_over_ranks, peak_memory
from copynce.training.mined import MinedNeighbours, open_pairs
from copynce.training.objectives import make_objective
from copynce.training.run import Event, RunFolder, Start
from copynce.training.schedule import run_schedule
from copynce.training.signals import StopRequest, tell
from copynce.training.step_cost import step_cost
from dali_pipelines import BrokenPicture, LoaderOptions, PairBatch, PairLoader
from dali_pipelines.workers import require_guard


def train(config: TrainConfig, *, on_step: Callable[[int], None] | None = None) -> Path:
    """Run or continue a training; returns the newest checkpoint's folder.

    ``on_step`` is called with the number of finished steps after each. Raises DataError, ConfigError or RunError for a
    wrong input, before anything is written; TrainingError if the loss is no number; Stopped after Ctrl-C, SIGTERM,
    SIGHUP or SIGUSR1, when the step is finished and saved.
    """
    with world(config.device) as here, StopRequest() as stop:
        try:
            return Trainer(config, here, stop).run(on_step)
        except BrokenPicture as error:  # one is replaced; this is one too many
            raise DataError(str(error)) from error


class Trainer:
    """One process' part of a training: everything is opened and checked when it is made, nothing is written yet."""

    def __init__(self, config: TrainConfig, here: World, stop: StopRequest) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if here.device.type == "cpu":
            keep_heap()
        self._config, self._here, self._stop = config, here, stop
        self._run = Path(config.out)
        with here.together():
            if config.wandb is not None and here.is_main:
                import_wandb()  # before anything is made
            self._source = open_pairs(config)
            self._sampler = PairSampler(
                self._source,
                config.data.batch_size,
                config.seed,
                rank=here.rank,
                world_size=here.size,
                parts=config.optim.accumulate,
            )
            self._items = config.data.batch_size * config.optim.accumulate * here.size
            schedule = run_schedule(config.optim, self._items, self._sampler.steps_per_epoch)
            self._total, self._rate = schedule.total, schedule.rate
            self._mined = MinedNeighbours(config, self._source, self._sampler.steps_per_epoch, here)
            self._evaluations = Evaluations(config, self._sampler.steps_per_epoch, self._total, here)
            torch.manual_seed(config.seed)  # the same initial weights on every rank
            self._objective = make_objective(config)
        self._precision = config.precision
        if self._precision == "auto":
            self._precision = "bf16" if bf16_in_hardware(here.device) else "fp32"
        # Without fp16 it scales by nothing and leaves out no step.
        self._scaler = torch.amp.GradScaler(here.device.type, enabled=self._precision == "fp16")
        self._skipped = 0
        #: Pictures/s at which the GPUs would do nothing but multiply; None where their peak is not known.
        self._full_speed: float | None = None
        peak = peak_flops(here.device, self._precision)
        if peak is not None and here.is_main:
            cost = step_cost(self._objective.model, 4, half=True)  # before it is on the GPU
            self._full_speed = here.size * peak * cost.pictures / cost.flop
        #: What makes the batches beyond the settings: a run continues only as it began.
        self._batches: dict[str, int | str] = {
            "items": self._items,
            "seed": config.seed,
            "pairs": f"{config.data.pairs}, {len(self._source)} items of {self._source.pairs_per_item}",
            "pictures": self._source.fingerprint,
        }
        #: Machine and code, which may change.
        self._place = {
            "device type": here.device.type,
            "encoder": self._precision,
            "processes": str(here.size),
            "commit": running_commit(),
        }

    def run(self, on_step: Callable[[int], None] | None = None) -> Path:
        """Train to the end; see :func:`train`."""
        config, here, run = self._config, self._here, self._run
        with RunFolder(run, here) as folder, ExitStack() as opened:
            start = folder.examine(config, self._batches, self._place)
            if start.step > self._total:
                raise RunError(
                    f"{run} has {start.step} steps already, more than the {self._total} that are to be made in all"
                )
            self._start = start
            with here.together():
                events = self._begin(start)
                self._quarantine = Quarantine(
                    run / ("broken.jsonl" if here.is_main else f"broken-rank{here.rank}.jsonl")
                )
                if here.is_main:
                    for manifest in self._source.manifests:
                        manifest.report(_print, self._quarantine.add)
                self._options = self._loader_options()
            finished = start.step == self._total and not self._evaluations.due(start.step)
            if start.checkpoint is not None and finished and not start.damaged:
                return start.checkpoint
            events += folder.begin(config, start, self._place["commit"])
            self._log = opened.enter_context(
                RunLog(
                    run,
                    first_step=start.step,
                    total_steps=self._total,
                    boards=self._boards,
                    enabled=here.is_main,
                )
            )
            for event in events:
                self._log.event(start.step, event.kind, event.text, **event.values)
            if start.checkpoint is None:
                self._save(0)
            self._stop.defer()
            self._between(start.step)
            if start.step < self._total:
                with closing(self._stream(start.step)) as batches:
                    self._steps(batches, start.step, on_step)
            return checkpoints(run)[-1]

    def _boards(self) -> list[Board]:
        boards: list[Board] = [TensorBoard(self._run, self._start.step)] if self._config.tensorboard else []
        if self._config.wandb is not None:
            boards.append(WeightsAndBiases(self._run, self._config.wandb, dataclasses.asdict(self._config)))
        return boards

    def _begin(self, start: Start) -> list[Event]:
        """Bring objective and optimiser to where the run starts; returns what is to be told."""
        config, objective, events = self._config, self._objective, list[Event]()
        state = None if start.checkpoint is None else read_state(start.checkpoint)
        self._mined.expect(None if state is None else state.get("mined"), start.step)
        if start.checkpoint is not None and state is not None:
            objective.restore(start.checkpoint / MODEL)
            objective.load_state(state["objective"])
        elif config.weights is not None:
            path = find_model(weights_file(config.weights, config.model.backbone))
            said = objective.begin_with(path)
            # Beside a checkpoint of ours lies what the losses have learnt.
            if path.name == MODEL and (path.parent / STATE).is_file() and damage(path.parent, [STATE]) is None:
                objective.load_state(read_state(path.parent)["objective"])
                said += [f"{name} is taken: {value:.4g}" for name, value in objective.facts().items()]
            events.append(Event("weights", "; ".join(said)))
        objective.to(self._here.device)
        self._mean = None if config.ema is None else WeightMean(objective.model, config.ema)
        if self._mean is not None and state is not None:
            self._mean.load_state(state["ema"])
        self._optimizer = torch.optim.AdamW(
            param_groups(objective, config.optim.weight_decay), lr=self._rate(0), betas=config.optim.betas, fused=True
        )
        #: 1 from the first step on whose gradient is no number: nobody waits for it, and no weight moves any more.
        self._spoiled = torch.zeros((), device=self._here.device)
        if state is not None:
            for group in state["optimizer"]["param_groups"]:
                group["fused"] = True  # older checkpoints say otherwise
            self._optimizer.load_state_dict(state["optimizer"])
            if self._scaler.is_enabled() and "scaler" in state:  # else the run had another precision
                self._scaler.load_state_dict(state["scaler"])
                self._skipped = state["skipped"]
        return events

    def _loader_options(self) -> LoaderOptions:
        config = self._config
        if config.data.processes:
            require_guard()
        pairs = config.data.batch_size * self._source.pairs_per_item
        return loader_options(config, pairs, self._here.device, self._precision)

    def _stream(self, first_step: int) -> Generator[PairBatch, None, None]:
        """The batches of all steps from ``first_step`` on; a loader for each table of neighbours."""
        for steps in self._mined.spans(first_step, self._total):
            source = self._sampler.source  # with the neighbours of these steps, which _between has prepared
            loader = PairLoader(
                self._sampler.batches(steps.start, steps.stop),
                source.pictures.paths,
                self._options,
                substitute=source.substitute,
                on_broken=self._quarantine.add,
                processes=self._config.data.processes,
            )
            with loader:
                yield from loader

    def _between(self, done: int) -> None:
        """What is due once ``done`` steps are saved: their checkpoint is evaluated, and new neighbours are mined. If a
        signal ends it, the same command takes it up."""
        checkpoint = checkpoints(self._run)[-1]

        def go_on() -> None:
            if self._stop.name is not None:
                raise Stopped(
                    f"stopped by {self._stop.name} between the steps, after step {done} of {self._total}, saved as "
                    f"{checkpoint}; the same command continues the run"
                )

        try:
            if self._evaluations.due(done):
                event = self._evaluations.evaluate(checkpoint, progress=go_on, say=tell)
                if event is not None:
                    self._log_evaluation(done, event)
            if done < self._total:
                event = self._mined.prepare(done, checkpoint, progress=go_on, say=tell)
                self._sampler = dataclasses.replace(self._sampler, source=self._mined.source)
                if event is not None:
                    self._log.event(done, event.kind, event.text, **event.values)
        except Stopped as stopped:
            self._log.event(done, "stopped", str(stopped))
            raise

    def _log_evaluation(self, done: int, event: Event) -> None:
        """Once, though a kill may have come between the evaluation and its line."""
        same = {"step": done, "event": event.kind, "model_sha256": event.values["model_sha256"]}
        if not any(same.items() <= line.items() for line in read_events(self._run / "log.jsonl")):
            self._log.event(done, event.kind, event.text, **event.values)
            self._log.draw(done, {f"evaluation/{name}": event.values[name] for name in LOGGED})

    def _steps(self, batches: Iterator[PairBatch], first_step: int, on_step: Callable[[int], None] | None) -> None:
        """All steps of this run; raises Stopped after the one at which the processes agree to stop."""
        config, here, stop = self._config, self._here, self._stop
        wrapped = distributed(self._objective, here)
        self._objective.train()
        if config.compile_blocks:
            compile_blocks(self._objective.model, here.device)
        if config.checkpoint_activations:
            checkpoint_activations(self._objective.model)
        pace = Pace(2 * self._items * self._source.pairs_per_item)
        outcome: Outcome | None = None
        for step in range(first_step, self._total):
            done = step + 1
            logs = done % config.log_every == 0 or done == self._total
            previous, outcome = outcome, self._step(step, batches, wrapped, pace, watch=logs)
            # Read a step late, so that the device has work while the next step is launched; nothing is saved before.
            if previous is not None:
                self._check(previous)
            pace.step_done()
            self._log.step(done, pace.pictures_per_second)
            pauses = self._evaluations.due(done) or self._mined.due(done)
            saves = done % config.checkpoint_every == 0 or done == self._total or pauses
            if logs or saves:
                self._check(outcome)
            if logs:
                self._write_log(done, outcome, pace)
                pace.reset()
            if saves:
                self._save(done)
                pace.skip()
            if on_step is not None:
                on_step(done)
            # Several processes must end after the same step: the one at which all have read the same wish.
            stopping = stop.name is not None if here.size == 1 else previous is not None and previous.read()["stop"] > 0
            if stopping and done < self._total:
                self._check(outcome)
                saved = checkpoints(self._run)[-1] if saves else self._save(done)
                what = f"stopped by {stop.name or 'a signal to another process'} after step {done} of {self._total}"
                self._log.event(done, "stopped", what)
                raise Stopped(f"{what}, saved as {saved}; the same command continues the run")
            if pauses:
                self._between(done)
                pace.skip()

    def _step(self, step: int, batches: Iterator[PairBatch], wrapped: nn.Module, pace: Pace, *, watch: bool) -> Outcome:
        """One optimiser step, on the next of the batches, or the next few of them."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(step)
        self._optimizer.zero_grad(set_to_none=True)
        shown: list[list[str]] = []
        means = make_gradients(
            wrapped,
            self._parts(batches, pace, shown),
            self._config.optim.accumulate,
            seed=step_seed(self._config.seed, step, self._here.rank),
            device=self._here.device,
            precision=self._precision,
            scale=self._scaler.scale,
            watch=watch,
        )
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._objective.parameters(), self._config.optim.clip_norm)
        others = {"norm": norm, "stop": self._here.any(self._stop.name is not None)}
        if self._scaler.is_enabled():
            scale = self._scaler.get_scale()
            others["loss_scale"] = torch.full_like(norm, scale)
            others["mean_loss"] = self._here.mean(means["loss"])
        outcome = Outcome(step, means, others, shown)
        if self._scaler.is_enabled():
            self._check(outcome)  # its scale has made the device wait anyway
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._skipped += self._scaler.get_scale() < scale
        else:
            torch.maximum(self._spoiled, (~norm.isfinite()).float(), out=self._spoiled)
            self._optimizer.found_inf = self._spoiled  # type: ignore[attr-defined] # which the fused kernels know
            self._optimizer.step()
        if self._mean is not None:
            self._mean.update()
        return outcome

    def _parts(self, batches: Iterator[PairBatch], pace: Pace, shown: list[list[str]]) -> Iterator[PairBatch]:
        """The batches of a step, the waiting for them measured, the uuids of their pairs noted."""
        for _ in range(self._config.optim.accumulate):
            batch = next(batches)
            pace.data_ready()
            shown.append(batch.uuids)
            yield batch
            pace.work_done()

    def _check(self, outcome: Outcome) -> None:
        """Raise TrainingError if a step's loss or gradients are no numbers, by the gradient's norm: it covers those of
        every rank, DDP having averaged them. In fp16, a gradient that only its scale has made infinite is none."""
        numbers = outcome.read()
        if numbers.get("loss_scale", 0) > 1 and math.isfinite(numbers["mean_loss"]):
            return  # the step was left out, and the next scale is smaller
        if not math.isfinite(numbers["norm"]):
            self._fail(outcome, numbers)

    def _fail(self, outcome: Outcome, numbers: dict[str, float]) -> None:
        """Keep the step so that it can be repeated, and raise TrainingError; on all processes together."""
        step = outcome.step
        del numbers["stop"]
        batches = list(self._sampler.batches(step, step + 1))
        processes = self._here.gather_objects(told(numbers, batches, outcome.uuids))
        with self._here.together():
            if self._here.is_main:
                failed = FailedStep(
                    step=step,
                    precision=self._precision,
                    loss_scale=numbers.get("loss_scale", 1.0),
                    learning_rate=self._rate(step),
                    commit=str(self._place["commit"]),
                    pictures=str(self._batches["pictures"]),
                    processes=processes,
                )
                try:
                    path = write_failed_step(self._run, failed, self._config, self._objective)
                    kept = f"copynce train --replay {path} repeats the step and tells where that begins"
                    self._log.event(step, "not finite", f"step {step} is kept in {path.parent}")
                except OSError as error:
                    kept = f"the step could not be kept ({error})"
                listed = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
                last = checkpoints(self._run)[-1]
                raise TrainingError(
                    f"step {step}: the gradient is not finite ({listed}), and no weight has moved. {kept}; the last "
                    f"checkpoint is {last}. A lower optim.lr or optim.clip_norm may help, in a new run (another out, "
                    f"weights={last})"
                )

    def _write_log(self, done: int, outcome: Outcome, pace: Pace) -> None:
        memory = self._here.largest(peak_memory(self._here.device)).item()
        numbers = {
            **means_over_ranks(outcome.measures, self._here),
            "lr": self._rate(outcome.step),
            "gradient_norm": outcome.read()["norm"],
            **self._objective.facts(),
        }
        if self._scaler.is_enabled():
            numbers |= {"loss_scale": self._scaler.get_scale(), "skipped_steps": self._skipped}
        numbers |= {
            "epoch": done / self._sampler.steps_per_epoch,
            "pictures_per_second": pace.pictures_per_second,
            "data_wait_share": pace.wait_share,
        }
        if self._full_speed is not None:
            numbers["mfu"] = pace.pictures_per_second / self._full_speed
        numbers |= {
            "peak_memory_gib": memory / 2**30,
            "eta_seconds": pace.seconds_per_step * (self._total - done),
            "broken_pictures": len(self._quarantine),
        }
        self._log.write(done, numbers)

    def _save(self, step: int) -> Path:
        with self._here.together():
            if self._here.is_main:
                state: dict[str, Any] = {
                    "step": step,
                    "optimizer": self._optimizer.state_dict(),
                    "objective": self._objective.state(),
                    "start": self._start.card,
                    "mined": self._mined.state(),
                    "place": self._place,
                    **self._batches,
                }
                if self._mean is not None:
                    state["ema"] = self._mean.state()
                if self._scaler.is_enabled():
                    state |= {"scaler": self._scaler.state_dict(), "skipped": self._skipped}
                self._log.sync()
                card = {
                    "step": step,
                    "commit": self._place["commit"],
                    "trained_on": self._config.data.trained_on,
                    "start": self._start.card,
                }
                mean = None
                if self._mean is not None:
                    mean, card["ema"] = self._mean.model, self._config.ema
                write_checkpoint(
                    self._run,
                    step,
                    lambda path: self._objective.save_model(path, card, mean),
                    state,
                    keep=self._config.keep_checkpoints,
                )
        return checkpoints(self._run)[-1]


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
