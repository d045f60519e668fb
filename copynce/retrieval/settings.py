"""The settings of the commands that make, search and change features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from copynce.config import require
from copynce.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Describing:
    """How pictures are described."""

    batch_size: int = 64
    """Pictures per forward pass."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to decode, compute and search; auto: on a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model. auto: bf16 where the hardware multiplies it and the first batch's descriptors agree with those in
    fp32 (cosine .9999)."""
    threads: int = 2
    """DALI's CPU threads per process."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(1 <= self.threads <= 1024, "threads", "from 1 to 1024", self.threads)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(_Describing):
    """Settings of ``copynce extract``."""

    root: str | None = None
    """Folder that a CSV's paths are relative to; none: the CSV's own."""
    split: str | None = None
    """PICTURES is an evaluation set, such as DISC21: which of its splits to describe (see ``copynce eval``)."""
    role: Literal["all", "query", "reference", "training"] = "all"
    """With split: which of its pictures."""
    lists: str | None = None
    """With split: folder of DISC21's id lists and ground truth; none: the dataset's own folder."""
    hdf5: str | None = None
    """With split: also write queries and references as the descriptor track's HDF5 file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split is None:
            for name in ("lists", "hdf5"):
                require(getattr(self, name) is None, name, "left out without split", getattr(self, name))
            require(self.role == "all", "role", "left out without split", self.role)
        elif self.root is not None:
            raise ConfigError(f"root is for one CSV, but split={self.split} names an evaluation set; leave it out")
        if self.hdf5 is not None:
            require(self.role == "all", "role", "all where hdf5 is written", self.role)


@dataclass(frozen=True, kw_only=True)
class KnnConfig(_Describing):
    """Settings of ``copynce knn``."""

    k: int = 128
    """Neighbours of each picture, itself not counted."""
    side: str | None = None
    """Which features, of a folder with several or of an HDF5 file: query, reference, training."""
    ids: str | None = None
    """Names of the rows for a .npy or .pth file without: a CSV with a column uuid, a JSON list, or lines."""
    references: str | None = None
    """Other features (or, with model, pictures) to search in; none: the same."""
    references_side: str | None = None
    """As side, of those."""
    references_ids: str | None = None
    """As ids, of those."""
    classes: str | None = None
    """CSV uuid,class: pictures of its own class are no neighbours of a picture."""
    model: str | None = None
    """A run, checkpoint or weights file: FEATURES (and references) are pictures, which it describes first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 1, "k", "at least 1", self.k)
        if self.references is None:
            require(self.references_ids is None, "references_ids", "left out without references", self.references_ids)
        for name in ("side", "ids", "references_side", "references_ids"):
            if self.model is not None and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is of features, but with model={self.model} pictures are given; leave it out"
                )
