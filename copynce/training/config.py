"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from copynce.config import load_config as load_config  # copynce.training gives both
from copynce.config import require, require_number, section_chosen_by
from copynce.data.settings import DATA_SETTINGS, MOST_THREADS, DataConfig, SupervisedData
from copynce.errors import ConfigError
from copynce.models.settings import DescriptorConfig, MatcherConfig
from copynce.training.objectives.settings import LOSS_SETTINGS, LossConfig

_MODEL_SETTINGS = {"descriptor": DescriptorConfig, "matcher": MatcherConfig}
#: Which pairs an objective learns from, and why no others.
_PAIRS: dict[str, tuple[tuple[str, ...], str]] = {
    "descriptor": (("descriptor", "supervised"), "a descriptor learns from copies only"),
    "matcher": (
        ("matcher", "mixture"),
        "a matcher learns from copies and from pairs of different pictures (or copies and loss.batch_negatives)",
    ),
}
#: Settings that speak of a transformer's blocks, and why a ResNet's training has none of them.
_OF_BLOCKS = {
    "checkpoint_activations": "only the blocks of a vision transformer are computed again (a BatchNorm would count its "
    "batch twice)",
    "compile_blocks": "only the blocks of a vision transformer are compiled",
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and cosine; defaults are the released descriptor's (PROTOCOLS 10)."""

    lr: float = 6e-4
    """Base learning rate, multiplied by sqrt(items of all processes in a step / 1024); an item of two pairs is one."""
    weight_decay: float = 0.04
    """Of matrices; norms, biases, tokens, position embeddings and temperatures do not decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of the running means of the gradient and of its square."""
    accumulate: int = 1
    """Batches of data.batch_size items per process in one step: their gradients' mean is clipped and applied. A matcher
    learns as from one batch that large; a descriptor's pairs meet those of their own batch alone (InfoNCE, KoLeo)."""
    clip_norm: float = 3.0
    """Largest norm of the gradient; infinity switches clipping off."""
    epochs: int = 30
    """Passes over the items."""
    steps: int | None = None
    """Total steps; overrides epochs where given. 0 writes the untrained model and stops."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up from 1 % of the learning rate; at most a tenth of the run is used."""
    min_lr: float = 2e-6
    """Where the cosine ends, not multiplied."""

    def __post_init__(self) -> None:
        require_number("optim.lr", self.lr, above=0, most=1000)
        require_number("optim.weight_decay", self.weight_decay, least=0, most=1000)
        for beta in self.betas:
            require_number("optim.betas", beta, least=0, below=1)
        require_number("optim.accumulate", self.accumulate, least=1, most=10**6)
        require_number("optim.clip_norm", self.clip_norm, above=0, infinite=True)
        require_number("optim.epochs", self.epochs, least=1, most=10**9)
        if self.steps is not None:
            require_number("optim.steps", self.steps, least=0, most=10**12)
        require_number("optim.warmup_epochs", self.warmup_epochs, least=0, most=10**9)
        require_number("optim.min_lr", self.min_lr, least=0)
        require(self.min_lr <= self.lr, "optim.min_lr", f"at most optim.lr, {self.lr:g}", self.min_lr)


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Neighbours of the training pictures that the run mines itself (PROTOCOLS 5), in place of data.neighbours."""

    at_start: bool = False
    """Whether neighbours are mined before the first step."""
    every: int | None = None
    """Epochs after which a descriptor's neighbours are mined anew, with its weights of then, and again after as many;
    none: never."""
    model: str | None = None
    """Descriptor that mines at the start: a run, a checkpoint or a weights file. None: the one that is trained, as it
    begins; a matcher needs another."""
    k: int | None = None
    """How many neighbours of each picture are mined and used; none: as data.neighbour_columns."""
    batch_size: int = 64
    """Pictures per forward pass of a process."""

    def __post_init__(self) -> None:
        for name in ("every", "k", "batch_size"):
            if getattr(self, name) is not None:
                require_number(f"mining.{name}", getattr(self, name), least=1, most=10**9)
        if self.model is not None and not self.at_start:
            raise ConfigError(f"mining.model={self.model} mines at the start; give mining.at_start=true too")
        if self.k is not None and not self.wanted:
            raise ConfigError(f"mining.k={self.k} needs a mining: mining.at_start=true or mining.every=EPOCHS")

    @property
    def wanted(self) -> bool:
        """Whether anything is mined."""
        return self.at_start or self.every is not None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluations of the run's checkpoints on a split; the best by uAP stays, and ``out``/checkpoints/best names it."""

    every: int | None = None
    """Steps between two evaluations, each of a checkpoint written for it; the last step has one too. None: none."""
    every_epochs: int | None = None
    """The same in epochs, in place of evaluate.every."""
    dataset: str | None = None
    """Folder of an evaluation set, as of copynce eval."""
    split: str = "dev"
    """Which queries of it."""
    lists: str | None = None
    """Folder of DISC21's id lists and ground truth; none: the dataset's own folder."""
    queries: str | None = None
    """In place of dataset: query pictures, a CSV (uuid,path), a folder or shards; with references and ground_truth."""
    references: str | None = None
    """Reference pictures, likewise."""
    ground_truth: str | None = None
    """CSV query_id,reference_id or JSON {query: [references]}; none: the dataset's own."""
    candidates: str | None = None
    """For a matcher: file of the pairs to score."""
    batch_size: int = 64
    """Pictures per forward pass of a process."""

    def __post_init__(self) -> None:
        for name in ("every", "every_epochs", "batch_size"):
            if getattr(self, name) is not None:
                require_number(f"evaluate.{name}", getattr(self, name), least=1, most=10**12)
        if self.every is not None and self.every_epochs is not None:
            raise ConfigError(
                f"evaluate.every={self.every} steps and evaluate.every_epochs={self.every_epochs}: leave out one"
            )
        if self.wanted and self.dataset is None and (self.queries is None or self.references is None):
            raise ConfigError(
                "evaluate.every needs pictures: evaluate.dataset=FOLDER and evaluate.split=NAME, or evaluate.queries, "
                "evaluate.references and evaluate.ground_truth"
            )
        for name in ("queries", "references"):
            if self.dataset is not None and getattr(self, name) is not None:
                raise ConfigError(f"evaluate.{name}: evaluate.dataset={self.dataset} has its own; leave out one")
        given = [name for name in ("dataset", "queries", "references", "candidates") if getattr(self, name) is not None]
        if given and not self.wanted:
            raise ConfigError(f"evaluate.{given[0]} needs evaluate.every=STEPS or evaluate.every_epochs=EPOCHS")

    @property
    def wanted(self) -> bool:
        """Whether anything is evaluated."""
        return self.every is not None or self.every_epochs is not None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    out: str
    """Folder of the run: config, checkpoints, log, list of broken pictures."""
    objective: Literal["descriptor", "matcher"] = "descriptor"
    """What is trained; ``model`` and ``loss`` are its settings, and ``data.pairs`` must be of its kind."""
    data: DataConfig = section_chosen_by("data.pairs", DATA_SETTINGS)
    model: DescriptorConfig | MatcherConfig = section_chosen_by("objective", _MODEL_SETTINGS)
    weights: str | None = None
    """What to start from: a backbone, a released file, or a checkpoint or run, head and temperature included; timm, or
    timm:NAME.TAG: timm's own pretrained weights, from the network; none: random."""
    loss: LossConfig = section_chosen_by("objective", LOSS_SETTINGS)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    ema: float | None = None
    """Decay of a running mean of the model's weights, such as 0.999: w <- ema w + (1 - ema) trained weights after each
    step, from those of step 1 on. Checkpoints then have the mean as their model, beside the trained weights."""
    seed: int = 123
    """Of first weights, order of items, edits and what the model draws."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest checkpoint in ``out``, if there is one. never: refuse a folder that has one."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train, decode and edit; auto: on GPUs where there are any."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the encoder; losses are float32. auto: bf16 where the processor or GPU multiplies it in hardware. fp16: with
    the loss scaled, and steps whose gradient overflows left out."""
    checkpoint_activations: bool = False
    """Whether backward computes each transformer block again instead of keeping what it made: the same gradients, about
    a third more time, a fraction of the memory."""
    compile_blocks: bool = False
    """Whether torch.compile makes a program of each transformer block when training begins (a minute or less): the same
    numbers but for rounding. Off, for it has not been measured faster yet."""
    threads: int | None = None
    """PyTorch's CPU threads per process; none: as many as it chooses."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last one is always written."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    tensorboard: bool = True
    """Whether curves are written for TensorBoard too, into ``out``."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the numbers too; needs the package wandb (extra ``[wandb]``)."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            require_number(name, getattr(self, name), least=1)
        if self.ema is not None:
            require_number("ema", self.ema, above=0, below=1)
        require_number("seed", self.seed, least=0, below=2**63)
        if self.threads is not None:
            require_number("threads", self.threads, least=1, most=MOST_THREADS)
        pairs, reason = _PAIRS[self.objective]
        if getattr(self.loss, "batch_negatives", 0):  # which are its pairs of different pictures
            pairs = (*pairs, "descriptor")
        if self.data.pairs not in pairs:
            fitting = f"{' or '.join(pairs)} with objective={self.objective}"
            raise ConfigError(f"data.pairs must be {fitting}, got {self.data.pairs}: {reason}")
        self._check_mining()
        if self.evaluate.wanted and self.objective == "matcher" and self.evaluate.candidates is None:
            raise ConfigError(
                "evaluate.every with objective=matcher needs evaluate.candidates=FILE, the pairs to score"
            )
        if self.evaluate.candidates is not None and self.objective != "matcher":
            raise ConfigError(f"evaluate.candidates={self.evaluate.candidates} is for objective=matcher; leave it out")
        from copynce.models.check import check_model  # with torch, which help does without
        from copynce.models.resnet import is_resnet_name

        if is_resnet_name(self.model.backbone):
            for name, reason in _OF_BLOCKS.items():
                if getattr(self, name):
                    raise ConfigError(f"{name} must be false with model.backbone={self.model.backbone}: {reason}")
        patches = check_model(self.model)
        if self.loss.target != "overlap":
            here = f"at most {patches}, the patches of a picture"
            require(self.loss.neighbours <= patches, "loss.neighbours", here, self.loss.neighbours)

    def _check_mining(self) -> None:
        """Raise ConfigError for a mining that these data or this model cannot have."""
        mining = self.mining
        if not mining.wanted:
            return
        if isinstance(self.data, SupervisedData):
            raise ConfigError("mining finds neighbours among data.train, which data.pairs=supervised has not")
        if mining.at_start and self.data.neighbours is not None:
            raise ConfigError(
                f"mining.at_start=true, but data.neighbours={self.data.neighbours} are given already; leave out one"
            )
        if not mining.at_start and self.data.neighbours is None:
            raise ConfigError(
                "mining.every needs neighbours to begin with: give mining.at_start=true, or data.neighbours=FILE"
            )
        if self.objective == "matcher" and mining.every is not None:
            raise ConfigError("mining.every mines with a descriptor's weights; with objective=matcher leave it out")
        if self.objective == "matcher" and mining.model is None:
            raise ConfigError("mining.at_start with objective=matcher needs mining.model, a descriptor that mines")
