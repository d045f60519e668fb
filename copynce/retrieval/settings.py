"""The settings of the commands that make, search and change features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from copynce.config import require
from copynce.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DescribingConfig:
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
class ExtractConfig(DescribingConfig):
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
class KnnConfig(DescribingConfig):
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
    approximate: bool = False
    """Search by IVF-PQ on the CPU, where an exact search takes too long; says how many of the exact neighbours it
    finds, measured on a sample. Scores are exact."""
    probes: int | None = None
    """With approximate: of the lists of references, 4 times the root of their number, how many a picture is looked for
    in; none: one in 16. More find more and take longer."""
    classes: str | None = None
    """CSV uuid,class: pictures of its own class are no neighbours of a picture."""
    model: str | None = None
    """A run, checkpoint or weights file: FEATURES (and references) are pictures, which it describes first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 1, "k", "at least 1", self.k)
        if self.probes is not None:
            require(self.approximate, "probes", "left out without approximate=true", self.probes)
            require(self.probes >= 1, "probes", "at least 1", self.probes)
        if self.references is None:
            require(self.references_ids is None, "references_ids", "left out without references", self.references_ids)
        for name in ("side", "ids", "references_side", "references_ids"):
            if self.model is not None and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is of features, but with model={self.model} pictures are given; leave it out"
                )


_BIASED = ("copynce", "sscd", "isc", "vsc")
_OF_RECIPES = {
    **dict.fromkeys(("start", "end", "weight"), _BIASED),
    "scale": ("stretch",),
    "dims": ("whiten",),
    **dict.fromkeys(("beta", "neighbours", "iterations", "augment"), ("negative",)),
}


@dataclass(frozen=True, kw_only=True)
class NormalizeConfig:
    """Settings of ``copynce normalize``."""

    recipe: Literal["copynce", "sscd", "isc", "vsc", "stretch", "whiten", "negative"] = "copynce"
    """copynce, sscd, isc, vsc: score normalisation as published under that name. stretch: queries are lengthened,
    scores are minus distances. whiten: PCA whitening of the features. negative: the mean of the nearest training
    features is subtracted from each."""
    training: str | None = None
    """Features of training pictures; none: the series "training" of the INPUT's folder."""
    training_side: str | None = None
    """Which features, of a folder with several series or of an HDF5 file."""
    training_ids: str | None = None
    """Names of the rows for a .npy or .pth file without: a CSV with a column uuid, a JSON list, or lines."""
    queries: str | None = None
    """Where INPUT is predictions: the features of their queries."""
    queries_side: str | None = None
    """As training_side, of those; none: "query" where there is more than one."""
    queries_ids: str | None = None
    """As training_ids, of those."""
    side: str | None = None
    """Which features of the INPUT; none: all."""
    ids: str | None = None
    """As training_ids, of the INPUT."""
    role: Literal["auto", "query", "reference"] = "auto"
    """What the features of INPUT are; auto: as their name or their file tells."""
    start: int | None = None
    """First rank that score normalisation averages, from 0; none: the recipe's."""
    end: int | None = None
    """The rank after the last of them; none: the recipe's."""
    weight: float | None = None
    """Of what score normalisation subtracts; none: the recipe's."""
    scale: float | None = None
    """With stretch: factor of the queries' lengths; none: 2.5."""
    dims: int | None = None
    """With whiten: columns that are left; none: all."""
    beta: float | None = None
    """With negative: factor of the mean that is subtracted; none: 0.35."""
    neighbours: int | None = None
    """With negative: how many training features are averaged; none: 10."""
    iterations: int | None = None
    """With negative: how often it is subtracted; none: once."""
    augment: int | None = None
    """With negative: training features are first averaged over so many of their nearest, itself among them; 0: not;
    none: 10."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to search; auto: on GPUs where there are any."""

    def __post_init__(self) -> None:
        for name, least in (
            ("start", 0),
            ("end", 1),
            ("dims", 1),
            ("neighbours", 1),
            ("iterations", 1),
            ("augment", 0),
        ):
            value = getattr(self, name)
            require(value is None or value >= least, name, f"at least {least}", value)
        for name in ("weight", "scale", "beta"):
            value = getattr(self, name)
            require(value is None or math.isfinite(value), name, "finite", value)
        require(self.scale is None or self.scale > 0, "scale", "above 0", self.scale)
        for name, recipes in _OF_RECIPES.items():
            if self.recipe not in recipes:
                require(getattr(self, name) is None, name, f"left out with recipe={self.recipe}", getattr(self, name))
