"""Training of the descriptor: pairs from DALI and PixTrace, CopyNCE + InfoNCE + KoLeo, AdamW, DDP, resume."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from copynce.data import Quarantine, read_ground_truth, read_manifest, read_neighbours
from copynce.data.pairs import DescriptorPairs, MatcherPairs, PairPlan, PairSampler, SupervisedPairs
from copynce.errors import DataError, RunError, Stopped, TrainingError
from copynce.losses import copynce_loss, info_nce, koleo
from copynce.models import Descriptor, load_checkpoint, load_start, param_groups
from copynce.models.memory import keep_heap
from copynce.models.precision import bf16_in_hardware
from copynce.provenance import running_commit
from copynce.training.checkpoints import MODEL, STATE, checkpoints, damage, find_model, read_state, write_checkpoint
from copynce.training.config import DataConfig, LossConfig, TrainConfig
from copynce.training.distributed import World, world
from copynce.training.log import RunLog
from copynce.training.run import Event, RunFolder
from copynce.training.schedule import cosine_schedule, scaled_lr
from copynce.training.signals import StopRequest
from dali_pipelines import BrokenPicture, PairLoader

#: What a step takes of a batch, in the order of :meth:`DescriptorObjective.forward`.
_INPUTS = ("query", "reference", "query_to_reference", "reference_to_query", "label", "traced")


class DescriptorObjective(nn.Module):
    """A descriptor with its losses: what DDP wraps, so that one forward makes one synchronised backward.

    forward(query, reference [B, 3, S, S], query_to_reference, reference_to_query int32 [B, S, S], label, traced bool
    [B]) returns the weighted sum and the unweighted parts ``{copynce, info_nce, koleo}`` (PROTOCOLS 8). Only pairs with
    ``label`` are matches of InfoNCE and KoLeo. CopyNCE's mean is over the ``traced`` pairs; as released, those of
    another label are among them and give 0. A part of weight 0 is still measured, without gradient, so that runs with
    and without it can be compared.
    """

    def __init__(self, model: Descriptor, config: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.log_scale = nn.Parameter(torch.tensor(config.log_scale))

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        query_to_reference: Tensor,
        reference_to_query: Tensor,
        label: Tensor,
        traced: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        descriptors, tokens = self.model(torch.cat([query, reference]), sides=2)
        query_descriptor, reference_descriptor = descriptors.chunk(2)
        query_tokens, reference_tokens = tokens.chunk(2)
        if config.copynce_weight == 0:
            query_tokens, reference_tokens = query_tokens.detach(), reference_tokens.detach()
        parts = {
            "copynce": copynce_loss(
                query_tokens,
                reference_tokens,
                query_to_reference,
                reference_to_query,
                patch_size=self.model.patch_size,
                temperature=config.temperature,
                gamma=config.gamma,
                prior=config.prior,
                active=traced,
                target=config.target,
                neighbours=config.neighbours,
                form=config.form,
            ),
            "info_nce": info_nce(
                query_descriptor, reference_descriptor, self.log_scale, positive=label, gather=config.gather
            ),
            "koleo": koleo(query_descriptor, reference_descriptor, positive=label, gather=config.gather),
        }
        weights = {
            "copynce": config.copynce_weight,
            "info_nce": config.info_nce_weight,
            "koleo": config.koleo_weight,
        }
        # Parts of weight 0 stay in the sum: DDP wants a gradient, if only of zero, for every parameter.
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}


def train(config: TrainConfig, *, on_step: Callable[[int], None] | None = None) -> Path:
    """Run or continue a training; returns the newest checkpoint's folder.

    ``on_step`` is called with the number of finished steps after each. Raises DataError, ConfigError or RunError for a
    wrong input, before anything is written; TrainingError if the loss is no number; Stopped after Ctrl-C, SIGTERM or
    SIGHUP, when the step is finished and saved.
    """
    with world(config.device) as here, StopRequest() as stop:
        try:
            return _train(config, here, stop, on_step)
        except BrokenPicture as error:  # one is replaced; this is one too many
            raise DataError(str(error)) from error


def _train(config: TrainConfig, here: World, stop: StopRequest, on_step: Callable[[int], None] | None) -> Path:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if here.device.type == "cpu":
        keep_heap()
    run = Path(config.out)
    with here.together():
        plan = _pair_plan(config.data, config.seed)
        sampler = PairSampler(plan, config.data.batch_size, config.seed, rank=here.rank, world_size=here.size)
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        objective = DescriptorObjective(Descriptor(config.model), config.loss)
    model = objective.model
    total = config.optim.steps
    if total is None:
        total = config.optim.epochs * sampler.steps_per_epoch
    items = config.data.batch_size * here.size
    warmup = min(round(config.optim.warmup_epochs * sampler.steps_per_epoch), math.ceil(total / 10))
    rate = cosine_schedule(
        scaled_lr(config.optim.lr, items), total=max(total, 1), warmup=warmup, min_lr=config.optim.min_lr
    )
    precision = config.precision
    bf16 = precision == "bf16" or (precision == "auto" and bf16_in_hardware(here.device))
    batches: dict[str, int | str] = {
        "items": items,
        "seed": config.seed,
        "plan": f"{config.data.plan}, {len(plan)} items of {plan.pairs_per_item}",
        "pictures": _fingerprint(plan),
    }
    place = {
        "device type": here.device.type,
        "encoder": "bf16" if bf16 else "fp32",
        "processes": str(here.size),
        "commit": running_commit(),
    }

    with RunFolder(run, here) as folder, ExitStack() as opened:
        start = folder.examine(config, batches, place)
        if start.step > total:
            raise RunError(f"{run} has {start.step} steps already, more than the {total} that are to be made in all")
        events: list[Event] = []
        with here.together():
            if start.checkpoint is None and config.weights is not None:
                events.append(Event("weights", _begin_with(objective, config.weights)))
            elif start.checkpoint is not None:
                _restore(objective, start.checkpoint)
            objective.to(here.device)
            optimizer = torch.optim.AdamW(
                param_groups(objective, config.optim.weight_decay), lr=rate(0), betas=config.optim.betas
            )
            if start.checkpoint is not None:
                optimizer.load_state_dict(read_state(start.checkpoint)["optimizer"])
            quarantine = Quarantine(run / ("broken.jsonl" if here.is_main else f"broken-rank{here.rank}.jsonl"))
            if here.is_main:
                for manifest in plan.manifests:
                    manifest.report(lambda line: print(line, file=sys.stderr, flush=True), quarantine.add)
            loader = opened.enter_context(
                PairLoader(
                    sampler.batches(start.step, total),
                    plan.pictures.paths,
                    size=config.model.img_size,
                    batch_size=config.data.batch_size * plan.pairs_per_item,
                    device="gpu" if here.device.type == "cuda" else "cpu",
                    threads=config.data.threads,
                    processes=config.data.processes,
                    max_pixels=int(config.data.max_megapixels * 1e6),
                    # What autocast would make of the views at the model's first product.
                    dtype="bfloat16" if bf16 else "float32",
                    substitute=plan.substitute,
                    on_broken=quarantine.add,
                )
            )
        if start.checkpoint is not None and start.step == total and not start.damaged:
            return start.checkpoint
        events += folder.begin(config, start, place["commit"])

        def save(step: int) -> Path:
            with here.together():
                if here.is_main:
                    state = {
                        "step": step,
                        "optimizer": optimizer.state_dict(),
                        "log_scale": objective.log_scale.detach().cpu(),
                        "start": start.card,
                        "place": place,
                        **batches,
                    }
                    log.sync()
                    card = {"commit": place["commit"], "trained_on": config.data.train, "start": start.card}
                    write_checkpoint(run, step, model, state, keep=config.keep_checkpoints, card=card)
            return checkpoints(run)[-1]

        def check(outcome: _Outcome) -> None:
            """Raise TrainingError if a step's loss or gradients are no numbers, by the gradient's norm: it covers those
            of every rank, DDP having averaged them."""
            if not math.isfinite(outcome.read()["norm"]):
                listed = ", ".join(f"{name} {value:g}" for name, value in outcome.read().items() if name != "stop")
                last = checkpoints(run)[-1]
                raise TrainingError(
                    f"step {outcome.step}: the gradient is not finite ({listed}); the last checkpoint is {last}. A "
                    f"lower optim.lr or optim.clip_norm may help, in a new run (another out, weights={last})"
                )

        log = opened.enter_context(
            RunLog(
                run,
                first_step=start.step,
                total_steps=total,
                tensorboard=config.tensorboard,
                enabled=here.is_main,
            )
        )
        for event in events:
            log.event(start.step, event.kind, event.text, **event.values)
        if start.checkpoint is None:
            save(0)
        if start.step >= total:
            return checkpoints(run)[-1]

        wrapped: nn.Module = objective
        if here.size > 1:
            devices = [here.device.index] if here.device.type == "cuda" else None
            wrapped = DistributedDataParallel(objective, device_ids=devices)
        objective.train()
        pace = _Pace(2 * items * plan.pairs_per_item)
        stop.defer()
        unchecked: _Outcome | None = None
        for step, batch in enumerate(loader, start=start.step):
            pace.data_ready()
            # Seeded by step: whatever draws (stochastic depth) does so equally in a run that was resumed.
            torch.manual_seed(_step_seed(config.seed, step, here.rank))
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            with torch.autocast(here.device.type, dtype=torch.bfloat16, enabled=bf16):
                loss, parts = wrapped(*[batch[name].to(here.device, non_blocking=True) for name in _INPUTS])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(objective.parameters(), config.optim.clip_norm)
            optimizer.step()
            # Read a step late, so that the device has work while the next step is launched; nothing is saved before.
            previous = unchecked
            if previous is not None:
                check(previous)
            wish = here.any(stop.name is not None)
            unchecked = _Outcome(step, {"norm": norm, "loss": loss, **parts, "stop": wish})
            done = step + 1
            pace.step_done()
            log.step(done, pace.pictures_per_second)
            if done % config.log_every == 0 or done % config.checkpoint_every == 0 or done == total:
                check(unchecked)
            if done % config.log_every == 0 or done == total:
                means = here.mean(torch.stack([loss.detach(), *parts.values()]).float())
                log.write(
                    done,
                    {
                        **dict(zip(["loss", *parts], means.tolist(), strict=True)),
                        "lr": rate(step),
                        "gradient_norm": float(norm),
                        "inverse_temperature": float(objective.log_scale.detach().exp()),
                        "epoch": done / sampler.steps_per_epoch,
                        "pictures_per_second": pace.pictures_per_second,
                        "data_wait_share": pace.wait_share,
                        "eta_seconds": pace.seconds_per_step * (total - done),
                        "broken_pictures": len(quarantine),
                    },
                )
                pace.reset()
            if done % config.checkpoint_every == 0 or done == total:
                save(done)
                pace.skip()
            if on_step is not None:
                on_step(done)
            # Several processes must end after the same step: the one at which all have read the same wish.
            stopping = stop.name is not None if here.size == 1 else previous is not None and previous.read()["stop"] > 0
            if stopping and done < total:
                check(unchecked)
                saved = save(done) if done % config.checkpoint_every else checkpoints(run)[-1]
                what = f"stopped by {stop.name or 'a signal to another process'} after step {done} of {total}"
                log.event(done, "stopped", what)
                raise Stopped(f"{what}, saved as {saved}; the same command continues the run")
        return checkpoints(run)[-1]


def _pair_plan(data: DataConfig, seed: int) -> PairPlan:
    """The plan that the settings describe, its files read."""
    manifest = read_manifest(data.train, root=data.root)
    if data.plan == "supervised":
        assert data.references is not None, "checked by DataConfig"
        assert data.ground_truth is not None, "checked by DataConfig"
        root = None if Path(data.references).is_dir() else data.root
        references = read_manifest(data.references, root=root)
        truth = read_ground_truth(data.ground_truth)
        return SupervisedPairs(manifest, references, truth, data.policy, seed, data.augment_probability)
    kind, columns = (DescriptorPairs, 7) if data.plan == "descriptor" else (MatcherPairs, 127)
    if data.neighbours is None:
        return kind(manifest, data.policy, seed)
    neighbours = read_neighbours(data.neighbours, manifest, data.neighbour_columns or columns)
    return kind(manifest, data.policy, seed, neighbours)


def _fingerprint(plan: PairPlan) -> str:
    """A hash of which pictures a plan deals out, and in which order: of their names, not of where they lie."""
    digest = hashlib.sha256()

    def add(*names: object) -> None:
        digest.update("\0".join(map(str, names)).encode(errors="surrogateescape") + b"\1")

    add(*plan.pictures.uuids)
    if isinstance(plan, SupervisedPairs):
        add(*plan.queries.uuids)
        for table in (plan.items, plan.copied):
            digest.update(table.values.tobytes())
    elif isinstance(plan, DescriptorPairs | MatcherPairs) and plan.neighbours is not None:
        for i in range(0, len(plan), max(1, len(plan) // 4096)):  # a table can be larger than memory
            add(*plan.neighbours.of(i).tolist())
    return digest.hexdigest()[:16]


def _step_seed(seed: int, step: int, rank: int) -> int:
    """What torch draws a step from: the same in every process and version, another for every step and rank."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _begin_with(objective: DescriptorObjective, weights: str) -> str:
    """Put the weights of a file, a checkpoint or a run into a new model, and what the loss has learnt, if it is known;
    returns what came of it."""
    path = find_model(weights)
    said = load_start(objective.model, path)
    if path.name == MODEL and (path.parent / STATE).is_file() and damage(path.parent, [STATE]) is None:
        with torch.no_grad():
            objective.log_scale.copy_(read_state(path.parent)["log_scale"])
        said.append(f"InfoNCE's temperature is taken: log_scale {float(objective.log_scale):.4g}")
    return "; ".join(said)


def _restore(objective: DescriptorObjective, checkpoint: Path) -> None:
    """Put a checkpoint's model and the loss's own parameters into an objective."""
    found = load_checkpoint(checkpoint / MODEL)
    if found.config != objective.model.config:
        raise RunError(f"{checkpoint} holds another model ({found.config}) than the settings say; choose another out")
    objective.model.load_state_dict(found.state_dict())
    with torch.no_grad():
        objective.log_scale.copy_(read_state(checkpoint)["log_scale"])


class _Outcome:
    """Numbers of a step, on their way to the host."""

    def __init__(self, step: int, values: dict[str, Tensor]) -> None:
        self.step = step
        self._names = list(values)
        numbers = torch.stack([value.detach().float() for value in values.values()])
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:
            # Memory that is not pinned would make the copy wait for all that is queued.
            host = torch.empty(numbers.shape, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._numbers = numbers

    def read(self) -> dict[str, float]:
        """The numbers, once the device has come so far."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._numbers.tolist(), strict=True))


class _Pace:
    """Throughput and the share of time spent waiting for data, since the last reset."""

    def __init__(self, pictures_per_step: int) -> None:
        self._pictures = pictures_per_step
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._mark = time.perf_counter()
        self._steps = 0
        self._waited = self._spent = 0.0

    def skip(self) -> None:
        """Leave out the time since the last step (a checkpoint was written)."""
        self._mark = time.perf_counter()

    def data_ready(self) -> None:
        """A batch has arrived: what passed since the last mark was waiting."""
        now = time.perf_counter()
        self._waited += now - self._mark
        self._spent += now - self._mark
        self._mark = now

    def step_done(self) -> None:
        """The step is finished: what passed since the batch arrived was work."""
        now = time.perf_counter()
        self._spent += now - self._mark
        self._mark = now
        self._steps += 1

    @property
    def seconds_per_step(self) -> float:
        return self._spent / max(self._steps, 1)

    @property
    def pictures_per_second(self) -> float:
        return self._pictures * self._steps / max(self._spent, 1e-9)

    @property
    def wait_share(self) -> float:
        return self._waited / max(self._spent, 1e-9)
