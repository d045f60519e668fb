"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from copynce.config import require
from copynce.errors import ConfigError
from copynce.models import DescriptorConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pictures come from and how they are edited."""

    train: str = MISSING
    """CSV with the columns uuid,path, a folder of pictures (read recursively), or tar shards (a folder of them, or a
    pattern such as ``train-{000..127}.tar``); the supervised plan's queries."""
    root: str | None = None
    """Folder that a CSV's paths are relative to; none: the CSV's own."""
    plan: Literal["descriptor", "matcher", "supervised"] = "descriptor"
    """Which pairs. descriptor: a picture edited and as it is, and the same of a neighbour where ``neighbours`` are
    given. matcher: such a pair (30 %), else a picture and another one, a neighbour or any. supervised: a query of
    ``train`` and one of the ``references`` that it copies by the ``ground_truth``."""
    neighbours: str | None = None
    """Mined neighbours of the pictures: .npy, integers [N, K] in the manifest's order, or .json {uuid: [uuid, ...]}."""
    neighbour_columns: int | None = None
    """How many neighbours of each picture are used, itself not counted; none: 7 (descriptor) or 127 (matcher)."""
    references: str | None = None
    """The supervised plan's references: CSV, folder or shards."""
    ground_truth: str | None = None
    """The supervised plan's copies: JSON {query: [references]} or CSV query_id,reference_id."""
    augment_probability: float = 0.0
    """Share of the supervised plan's queries that are edited by the policy; the others are shown as they are."""
    policy: str = "descriptor"
    """Augmentation policy of :data:`copynce.pixtrace.POLICIES`."""
    batch_size: int = 96
    """Items per process and step: pairs, or two pairs each in the descriptor plan with neighbours."""
    threads: int = 2
    """DALI's CPU threads per process."""
    processes: int = 0
    """Worker processes that sample, read, plan and trace, per process of the training; 0: a thread does, which shares
    Python's lock with the training loop (try 2 where a GPU trains)."""
    max_megapixels: float = 100.0
    """A picture with more million pixels is skipped and listed, as a guard against decompression bombs."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, "data.batch_size", "at least 2", self.batch_size)
        require(self.threads >= 1, "data.threads", "at least 1", self.threads)
        require(self.processes >= 0, "data.processes", "at least 0", self.processes)
        require(self.max_megapixels > 0, "data.max_megapixels", "positive", self.max_megapixels)
        require(0 <= self.augment_probability <= 1, "data.augment_probability", "in [0, 1]", self.augment_probability)
        columns = self.neighbour_columns
        require(columns is None or columns >= 1, "data.neighbour_columns", "at least 1", columns)
        if columns is not None and self.neighbours is None:
            raise ConfigError("data.neighbour_columns needs a file of neighbours, data.neighbours=FILE")
        supervised = self.plan == "supervised"
        here = f"with data.plan={self.plan}"
        for name in ("references", "ground_truth"):
            file, expected = getattr(self, name), "given" if supervised else "none"
            require((file is not None) == supervised, f"data.{name}", f"{expected} {here}", file)
        if supervised:
            require(self.neighbours is None, "data.neighbours", f"none {here}", self.neighbours)
        else:
            edited = self.augment_probability
            require(edited == 0, "data.augment_probability", f"0 {here}", edited)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and parameters of the loss; defaults are the released descriptor's (PROTOCOLS 8)."""

    copynce_weight: float = 5.0
    gamma: float = 3.0
    """Sharpening exponent of the overlap prior (eq. 5)."""
    temperature: float = 1 / 16
    """Of the patch affinity's softmax."""
    prior: Literal["released", "paper"] = "released"
    target: Literal["overlap", "feature", "location", "both"] = "overlap"
    """What patches are drawn to: the overlap prior, or the paper's rivals (nearest patches by feature, location)."""
    neighbours: int = 1
    """Nearest patches of a rival target (k of Table 2)."""
    form: Literal["nce", "cosine"] = "nce"
    """Of CopyNCE: cross-entropy over patches, or the rival that only pulls targets together."""
    info_nce_weight: float = 1.0
    log_scale: float = 3.2
    """Initial log of InfoNCE's learnable inverse temperature: exp(3.2) = 24.5."""
    koleo_weight: float = 5.0
    gather: Literal["differentiable", "local_gradient"] = "differentiable"
    """Features of other ranks as negatives: with their gradients, or as constants (the released code)."""

    def __post_init__(self) -> None:
        for name in ("copynce_weight", "info_nce_weight", "koleo_weight", "gamma"):
            require(getattr(self, name) >= 0, f"loss.{name}", "at least 0", getattr(self, name))
        require(self.neighbours >= 1, "loss.neighbours", "at least 1", self.neighbours)
        require(self.temperature > 2 / 80, "loss.temperature", "above 0.025", self.temperature)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and cosine; defaults are the released descriptor's (PROTOCOLS 10)."""

    lr: float = 6e-4
    """Base learning rate, multiplied by sqrt(items of all processes in a step / 1024); an item of two pairs is one."""
    weight_decay: float = 0.04
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 3.0
    """Largest norm of the gradient; infinity switches clipping off."""
    epochs: int = 30
    steps: int | None = None
    """Total steps; overrides epochs where given. 0 writes the untrained model and stops."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up from 1 % of the learning rate; at most a tenth of the run is used."""
    min_lr: float = 2e-6

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", "positive", self.lr)
        require(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)
        require(self.clip_norm > 0, "optim.clip_norm", "positive", self.clip_norm)
        require(self.epochs >= 1, "optim.epochs", "at least 1", self.epochs)
        require(self.steps is None or self.steps >= 0, "optim.steps", "at least 0", self.steps)
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", "at least 0", self.warmup_epochs)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    out: str = MISSING
    """Folder of the run: config, checkpoints, log, list of broken pictures."""
    data: DataConfig = field(default_factory=DataConfig)
    model: DescriptorConfig = field(default_factory=DescriptorConfig)
    weights: str | None = None
    """Backbone weights to start from: safetensors with timm's names, or a checkpoint; none: random."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 123
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest checkpoint in ``out``, if there is one. never: refuse a folder that has one."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train, decode and edit; auto: on GPUs where there are any."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the encoder; losses are float32. auto: bf16 where the processor or GPU multiplies it in hardware."""
    threads: int | None = None
    """PyTorch's CPU threads per process; none: as many as it chooses."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last one is always written."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
