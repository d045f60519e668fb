"""The settings of a training's data: one class for each way to make pairs, which ``data.pairs`` chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from copynce.config import require, require_number
from copynce.errors import ConfigError

MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class _AnyPairs:
    """What all ways share."""

    root: str | None = None
    """Folder that a list's paths are relative to; none: the list's own."""
    policy: str = "descriptor"
    """Augmentation policy of :data:`copynce.pixtrace.POLICIES`."""
    batch_size: int = 96
    """Items per process and step: pairs, or two pairs each with descriptor pairs and ``neighbours``."""
    threads: int = 2
    """DALI's CPU threads per process."""
    processes: int = 0
    """Worker processes that sample, read, compose and trace, per process of the training; 0: a thread does, which
    shares Python's lock with the training loop (try 2 where a GPU trains)."""
    max_megapixels: float = 100.0
    """A picture with more million pixels is skipped and listed, as a guard against decompression bombs."""

    def __post_init__(self) -> None:
        from copynce.pixtrace import POLICIES  # with Numba, which help does without

        require_number("data.batch_size", self.batch_size, least=2)
        require_number("data.threads", self.threads, least=1, most=MOST_THREADS)
        require_number("data.processes", self.processes, least=0, most=MOST_THREADS)
        require_number("data.max_megapixels", self.max_megapixels, least=1e-6, most=1e9)
        require(self.policy in POLICIES, "data.policy", f"one of {', '.join(sorted(POLICIES))}", self.policy)


@dataclass(frozen=True, kw_only=True)
class _TracedPairs(_AnyPairs):
    """Pairs made of one list of pictures."""

    train: str
    """CSV with the columns uuid,path, a JSON list of file names, a folder of pictures (read recursively), or tar shards
    (a folder of them, or a pattern such as ``train-{000..127}.tar``)."""
    neighbours: str | None = None
    """Mined neighbours of the pictures: .npy, integers [N, K] in the manifest's order, or .json {uuid: [uuid, ...]}."""
    neighbour_columns: int | None = None
    """How many neighbours of each picture are used, itself not counted; none: 7 (descriptor) or 127
    (matcher, mixture)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbour_columns is not None:
            require_number("data.neighbour_columns", self.neighbour_columns, least=1)
            if self.neighbours is None:
                raise ConfigError("data.neighbour_columns needs a file of neighbours, data.neighbours=FILE")

    @property
    def trained_on(self) -> str:
        """The list whose pictures are edited, for a model's card."""
        return self.train


@dataclass(frozen=True, kw_only=True)
class DescriptorData(_TracedPairs):
    """Copies only."""

    pairs: Literal["descriptor"] = "descriptor"
    """Which pairs. descriptor: a picture edited and as it is, and the same of a neighbour where ``neighbours`` are
    given. matcher: such a pair (30 %), else a picture and another one, a neighbour or any. supervised: a query of
    ``queries`` and one of the ``references`` that it copies by the ``ground_truth``. mixture: all of these copies and a
    ``share`` of the matcher's pairs of ``train``."""


@dataclass(frozen=True, kw_only=True)
class MatcherData(_TracedPairs):
    """Copies and pairs of different pictures."""

    pairs: Literal["matcher"] = "matcher"
    policy: str = "matcher"
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class _LabelledPairs(_AnyPairs):
    """Copies that somebody else made."""

    queries: str
    """The edited pictures: CSV, folder or shards."""
    references: str
    """The pictures that they copy: CSV, folder or shards."""
    ground_truth: str
    """Which copies which: JSON {query: [references]} or CSV query_id,reference_id."""
    augment_probability: float = 0.0
    """Share of the queries that are edited by the policy; the others are shown as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("data.augment_probability", self.augment_probability, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class SupervisedData(_LabelledPairs):
    """Such copies only."""

    pairs: Literal["supervised"] = "supervised"

    @property
    def trained_on(self) -> str:
        """The list whose pictures are edited, for a model's card."""
        return self.queries


@dataclass(frozen=True, kw_only=True)
class MixtureData(_LabelledPairs, _TracedPairs):
    """Such copies, and pairs made of one list of pictures as a matcher's."""

    pairs: Literal["mixture"] = "mixture"
    policy: str = "matcher"
    batch_size: int = 32
    labelled_root: str | None = None
    """Folder that the paths of ``queries`` and ``references`` are relative to; none: each CSV's own."""
    share: float = 0.0833
    """Of the pictures of ``train``, how many make an item in an epoch: others in the next (released: 83,300 of 1M)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("data.share", self.share, above=0, most=1)

    @property
    def trained_on(self) -> str:
        """The lists whose pictures are shown, for a model's card."""
        return f"{self.queries} and {self.train}"


DataConfig = DescriptorData | MatcherData | SupervisedData | MixtureData

#: By the value of ``data.pairs``.
DATA_SETTINGS: dict[str, type] = {
    "descriptor": DescriptorData,
    "matcher": MatcherData,
    "supervised": SupervisedData,
    "mixture": MixtureData,
}
