"""Training of the descriptor: pairs from DALI and PixTrace, CopyNCE + InfoNCE + KoLeo, AdamW, DDP, resume."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from copynce.config import save_config
from copynce.data import Quarantine, read_ground_truth, read_manifest, read_neighbours
from copynce.data.pairs import DescriptorPairs, MatcherPairs, PairPlan, PairSampler, SupervisedPairs
from copynce.errors import RunError, TrainingError
from copynce.losses import copynce_loss, info_nce, koleo
from copynce.models import Descriptor, load_backbone, load_checkpoint, param_groups
from copynce.training.checkpoints import checkpoints, read_state, step_of, write_checkpoint
from copynce.training.config import DataConfig, LossConfig, TrainConfig
from copynce.training.distributed import World, world
from copynce.training.log import RunLog
from copynce.training.memory import keep_heap
from copynce.training.schedule import cosine_schedule, scaled_lr
from dali_pipelines import PairLoader

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


def bf16_in_hardware(device: torch.device) -> bool:
    """True where bfloat16 matrix products are faster than float32 ones: recent GPUs, AVX512-BF16 or AMX processors."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def train(config: TrainConfig, *, on_step: Callable[[int], None] | None = None) -> Path:
    """Run or continue a training; returns the newest checkpoint's folder.

    ``on_step`` is called with the number of finished steps after each. Raises DataError, ConfigError or RunError for a
    wrong input, TrainingError if the loss is no number.
    """
    with world(config.device) as here:
        return _train(config, here, on_step)


def _train(config: TrainConfig, here: World, on_step: Callable[[int], None] | None) -> Path:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if here.device.type == "cpu":
        keep_heap()
    run = Path(config.out)
    plan = _pair_plan(config.data, config.seed)
    sampler = PairSampler(plan, config.data.batch_size, config.seed, rank=here.rank, world_size=here.size)
    total = config.optim.steps
    if total is None:
        total = config.optim.epochs * sampler.steps_per_epoch
    items = config.data.batch_size * here.size
    warmup = min(round(config.optim.warmup_epochs * sampler.steps_per_epoch), math.ceil(total / 10))
    rate = cosine_schedule(
        scaled_lr(config.optim.lr, items), total=max(total, 1), warmup=warmup, min_lr=config.optim.min_lr
    )

    torch.manual_seed(config.seed)  # the same initial weights on every rank
    objective = DescriptorObjective(Descriptor(config.model), config.loss)
    model = objective.model
    # What makes the batches: a run continues only as it began.
    batches: dict[str, int | str] = {
        "items": items,
        "seed": config.seed,
        "plan": f"{config.data.plan}, {len(plan)} items of {plan.pairs_per_item}",
    }
    first_step = _start(config, run, objective, batches, here)
    objective.to(here.device)
    optimizer = torch.optim.AdamW(
        param_groups(objective, config.optim.weight_decay), lr=rate(0), betas=config.optim.betas
    )
    if first_step > 0:
        optimizer.load_state_dict(read_state(checkpoints(run)[-1])["optimizer"])

    def save(step: int) -> None:
        if here.is_main:
            state = {
                "step": step,
                "optimizer": optimizer.state_dict(),
                "log_scale": objective.log_scale.detach().cpu(),
                **batches,
            }
            write_checkpoint(run, step, model, state, keep=config.keep_checkpoints)
        here.barrier()

    def check(outcome: _Outcome) -> None:
        """Raise TrainingError if a step's loss or gradients are no numbers, by the gradient's norm: it covers those of
        every rank, DDP having averaged them."""
        if not math.isfinite(outcome.read()["norm"]):
            listed = ", ".join(f"{name} {value:g}" for name, value in outcome.read().items())
            raise TrainingError(
                f"step {outcome.step}: the gradient is not finite ({listed}); the last checkpoint is "
                f"{checkpoints(run)[-1]}, a lower optim.lr or optim.clip_norm may help"
            )

    if first_step == 0:
        save(0)
    if first_step >= total:
        return checkpoints(run)[-1]

    wrapped: nn.Module = objective
    if here.size > 1:
        devices = [here.device.index] if here.device.type == "cuda" else None
        wrapped = DistributedDataParallel(objective, device_ids=devices)
    precision = config.precision
    bf16 = precision == "bf16" or (precision == "auto" and bf16_in_hardware(here.device))
    quarantine = Quarantine(run / ("broken.jsonl" if here.is_main else f"broken-rank{here.rank}.jsonl"))

    with (
        PairLoader(
            sampler.batches(first_step, total),
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
        ) as loader,
        RunLog(
            run, first_step=first_step, total_steps=total, tensorboard=config.tensorboard, enabled=here.is_main
        ) as log,
    ):
        objective.train()
        pace = _Pace(2 * items * plan.pairs_per_item)
        unchecked: _Outcome | None = None
        for step, batch in enumerate(loader, start=first_step):
            pace.data_ready()
            # Seeded by step: whatever draws (stochastic depth) does so equally in a run that was resumed.
            torch.manual_seed(hash((config.seed, step, here.rank)) % 2**63)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            with torch.autocast(here.device.type, dtype=torch.bfloat16, enabled=bf16):
                loss, parts = wrapped(*[batch[name].to(here.device, non_blocking=True) for name in _INPUTS])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(objective.parameters(), config.optim.clip_norm)
            optimizer.step()
            # Read a step late, so that the device has work while the next step is launched; nothing is saved before.
            if unchecked is not None:
                check(unchecked)
            unchecked = _Outcome(step, {"norm": norm, "loss": loss, **parts})
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


def _start(
    config: TrainConfig, run: Path, objective: DescriptorObjective, batches: dict[str, int | str], here: World
) -> int:
    """Load what the run begins with; returns the number of steps already done.

    Raises RunError if a run is already there whose ``batches`` (what they are made of) were others.
    """
    found = checkpoints(run)
    if found and config.resume == "never":
        raise RunError(f"{run} already holds {found[-1].name}; choose another out, or resume=auto to continue it")
    if here.is_main:
        run.mkdir(parents=True, exist_ok=True)
        save_config(config, run / "config.yaml")
        (run / "commit.txt").write_text(_commit() + "\n")
    here.barrier()
    if not found:
        if config.weights is not None:
            load_backbone(objective.model, config.weights)
        return 0
    state = read_state(found[-1])
    for name, value in batches.items():
        found_value = state.get(name, value)  # older checkpoints have no plan
        if found_value != value:
            raise RunError(
                f"{run} was trained with {name}={found_value}, got {value}; a run continues only as it began "
                "(items = those of one step over all processes)"
            )
    objective.model.load_state_dict(load_checkpoint(found[-1] / "model.safetensors").state_dict())
    with torch.no_grad():
        objective.log_scale.copy_(state["log_scale"])
    return step_of(found[-1])


def _commit() -> str:
    """The commit of the running code, "unknown" outside of a checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


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
