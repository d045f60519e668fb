"""The settings of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from copynce.config import require


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Settings of ``copynce measure``."""

    out: str | None = None
    """Folder for metrics.json, table.md and precision_recall.png; none: a folder FILE-measured beside the first
    file of predictions."""
    merge: bool = False
    """Take all files of predictions as one, and of a pair that is given more than once the highest score. Without it a
    pair that is given twice is an error, and each file is a row of the table."""
    k: int | None = None
    """Keep so many predictions of each query, its best; none: all."""
    global_candidates: int | None = None
    """Then keep only so many predictions, the best over all queries (the challenge: 10 times the queries); none:
    all."""
    ap: Literal["step", "trapezoid"] = "step"
    """How average precision is summed in uAP and mAP; Copydays has the trapezoid rule."""
    repetitions: int = 1000
    """Of the bootstrap over queries that gives the intervals (95 %, percentiles); 0: no intervals."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("k", "global_candidates"):
            if getattr(self, name) is not None:
                require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("repetitions", "seed"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(self.out != "", "out", "the name of a folder", self.out)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of ``copynce eval``."""

    dataset: str
    """Folder in the form of DISC21, or with references.csv, query_NAME.csv and gt_NAME.json."""
    split: str = "dev"
    """Which queries: a NAME of the folder; DISC21 has val (dev set I), dev (dev set II), test (phase 2)."""
    lists: str | None = None
    """Folder of DISC21's id lists and ground truth; none: the dataset's own folder."""
    out: str | None = None
    """Where predictions.csv and metrics.json go; none: RUN/eval-SPLIT, or FILE-eval-SPLIT beside a weights
    file FILE. Features are kept there too, for the next evaluation of the same model and pictures."""
    score_normalization: bool = False
    """Also score with the training pictures' similarities subtracted (uap_sn, rp90_sn)."""
    alpha: float = 1.0
    """Weight of what score normalisation subtracts."""
    start: int = 1
    """First rank of the training pictures' similarities that score normalisation averages, from 0."""
    end: int = 5
    """The rank after the last of them; as many training pictures are needed."""
    batch_size: int = 64
    """Pictures per forward pass."""
    k: int = 10
    """Predictions per query; with fewer references, all of them."""
    global_candidates: int | None = None
    """Keep only so many predictions, the best over all queries (the challenge: 10 times the queries, with a larger k);
    none: all."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to decode, compute and search; auto: on a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model. auto: bf16 where the hardware multiplies it and the first batch's descriptors agree with those in
    fp32 (cosine .9999)."""
    threads: int = 2
    """DALI's CPU threads."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "k", "threads"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.threads <= 1024, "threads", "at most 1024", self.threads)
        require(self.split != "", "split", "the name of a split", self.split)
        require(self.out != "", "out", "the name of a folder", self.out)
        require(math.isfinite(self.alpha), "alpha", "finite", self.alpha)
        require(self.start >= 0, "start", "at least 0", self.start)
        require(self.end > self.start, "end", f"above start={self.start}", self.end)
        if self.global_candidates is not None:
            require(self.global_candidates >= 1, "global_candidates", "at least 1", self.global_candidates)
