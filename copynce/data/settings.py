"""The settings of a training's data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from copynce.config import require, require_number
from copynce.errors import ConfigError

MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pictures come from and how they are edited."""

    train: str
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
        from copynce.pixtrace import POLICIES  # with Numba, which help does without

        require_number("data.batch_size", self.batch_size, least=2)
        require_number("data.threads", self.threads, least=1, most=MOST_THREADS)
        require_number("data.processes", self.processes, least=0, most=MOST_THREADS)
        require_number("data.max_megapixels", self.max_megapixels, least=1e-6, most=1e9)
        require_number("data.augment_probability", self.augment_probability, least=0, most=1)
        require(self.policy in POLICIES, "data.policy", f"one of {', '.join(sorted(POLICIES))}", self.policy)
        columns = self.neighbour_columns
        if columns is not None:
            require_number("data.neighbour_columns", columns, least=1)
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
