"""The settings of the commands that make candidate pairs and match them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from copynce.config import require
from copynce.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TwoSides:
    """Queries and references: two lists of pictures, or a split of an evaluation set."""

    queries: str | None = None
    """Query pictures: a CSV (uuid,path), a folder or shards; none: those of dataset."""
    references: str | None = None
    """Reference pictures, likewise."""
    dataset: str | None = None
    """In place of both: a folder in the form of DISC21, or with references.csv and query_NAME.csv."""
    split: str = "dev"
    """With dataset: which queries; DISC21 has val (dev set I), dev (dev set II), test (phase 2)."""
    lists: str | None = None
    """With dataset: folder of DISC21's id lists; none: the dataset's own folder."""
    out: str
    """Folder of the result."""
    batch_size: int = 64
    """Pictures, or views of them, per forward pass."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to decode and compute; auto: on a GPU where there is one. Views are cut on the CPU."""
    threads: int = 2
    """DALI's CPU threads per process."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(1 <= self.threads <= 1024, "threads", "from 1 to 1024", self.threads)
        both = self.queries is not None and self.references is not None
        if (self.dataset is None) != both or (self.dataset is not None and (self.queries or self.references)):
            raise ConfigError(
                "give the pictures as queries= and references=, or as dataset= and split=; got "
                + (
                    ", ".join(f"{name}=" for name in ("queries", "references", "dataset") if getattr(self, name))
                    or "none"
                )
            )
        if self.dataset is None:
            require(self.lists is None, "lists", "left out without dataset", self.lists)


@dataclass(frozen=True, kw_only=True)
class MatchConfig(TwoSides):
    """Settings of ``copynce match``."""

    local_crops: bool = False
    """Local crops ensembling: the highest score of 34 pairs of views (35 encoder passes where pictures are in one pair
    only) in place of one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matcher. auto: bf16 where the hardware multiplies it and the logits of the first pairs change by at most
    .1."""
    memory: float = 4.0
    """Gigabytes of encodings that are held: of ViT-S/16 at 224 px 0.3 MB a picture, with local crops 7.6 MB a query or
    3 MB a reference. Where neither side fits, the pictures of the other are encoded once for each block that does."""
    part: int = 16_384
    """Fusion passes whose scores are one file, which one process makes. One that takes longer than a minute leaves what
    it has, so a killed matching loses about that, and the encodings that were held."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.memory < 1e6, "memory", "at least 0 and below 1e6 (gigabytes)", self.memory)
        require(self.part >= 1, "part", "at least 1", self.part)


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig(TwoSides):
    """Settings of ``copynce candidates``."""

    mode: Literal["M:N", "1:N"] = "M:N"
    """M:N: the best references of each of four groups of query views (124 entries a query); 1:N: of each of 45 views
    (390)."""
    k: int = 400
    """Candidates of each query, at most."""
    duplicates: Literal["merge", "keep"] = "merge"
    """merge: each pair once, with its highest score; keep: the entries of all groups one after the other, as the
    released code leaves them, whatever k."""
    box: Literal["released", "meant"] = "released"
    """The view of a query's middle half ends at 3W//2, beyond the picture and black there, as in the released code, or
    at 3W//4 as was meant."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the descriptor. auto: bf16 where the hardware multiplies it and the first batch's descriptors agree with those
    in fp32 (cosine .9999)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 1, "k", "at least 1", self.k)
