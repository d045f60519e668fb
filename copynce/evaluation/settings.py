"""The settings of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from copynce.config import require
from copynce.errors import ConfigError

#: The first rank that score normalisation averages, of CopyNCE's protocol.
START = 1

#: Pairs of each query that a matcher scores, where they are the descriptor's.
CANDIDATES = 10


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

    dataset: str | None = None
    """Folder in the form of DISC21, of SSCD's DISC21, of Copydays, or with references.csv, query_NAME.csv and
    gt_NAME.json."""
    split: str = "dev"
    """Which queries: a NAME of the folder; DISC21 has val (dev set I), dev (dev set II), test (phase 2), Copydays all,
    strong, crops and jpeg."""
    lists: str | None = None
    """Folder of DISC21's id lists and ground truth; none: the dataset's own folder."""
    queries: str | None = None
    """In place of dataset: query pictures, a CSV (uuid,path), a folder or shards; with references, and maybe
    ground_truth and training. So NDEC: its queries, the references of DISC21."""
    references: str | None = None
    """Reference pictures, likewise."""
    training: str | None = None
    """Pictures for score normalisation, likewise."""
    ground_truth: str | None = None
    """CSV query_id,reference_id or JSON {query: [references]}; none: the dataset's own."""
    protocol: Literal["auto", "copynce", "phase2", "ndec", "copydays", "sscd"] = "auto"
    """Whose rules hold where settings are none. auto: what the dataset is known for, else copynce; ndec is copynce."""
    matcher: str | None = None
    """With a descriptor: a run, checkpoint or weights file of a matcher that scores its candidates: a whole table."""
    candidates: str | None = None
    """For a matcher, by itself or with a descriptor: file of the pairs to score; none: the descriptor's, the first
    candidates_k of each query, by local_views where they are asked for."""
    candidates_k: int | None = None
    """How many of the descriptor's pairs of each query the matcher scores; none: 10."""
    local_crops: bool | None = None
    """A matcher also scores with local crops ensembling, some 35 times the work; false: only whole pictures; none:
    true."""
    local_views: bool = False
    """Queries are also asked in parts, as copynce search does: the highest cosine of 23 views is the score of a pair,
    in rows of their own, and the best of these pairs are a matcher's candidates, which it also scores in the view that
    was the nearest."""
    search: bool = False
    """Also what copynce search does, a row of its own: queries asked whole, turned and in parts, and of each the ten
    references that are nearest judged by matcher, place and pixels. For a model with a calibration, as default."""
    memory: float | None = None
    """Gigabytes of a matcher's encodings that are held, see copynce match; none: 4."""
    out: str | None = None
    """Where predictions, metrics.json, table.md and report.html go; none: RUN/eval-SPLIT, or FILE-eval-SPLIT beside a
    weights file FILE. Features and scores are kept there too, for the next evaluation of the same."""
    score_normalization: bool | None = None
    """Also score with the training pictures' similarities subtracted (uap_sn, rp90_sn); none: with a matcher or the
    protocol sscd, where there are training pictures."""
    alpha: float | None = None
    """Weight of what score normalisation subtracts; none: 1."""
    start: int | None = None
    """First rank of the training pictures' similarities that score normalisation averages, from 0; none: 1, sscd 0."""
    end: int | None = None
    """The rank after the last of them; as many training pictures are needed. None: 5, sscd 3."""
    whiten: int | None = None
    """Also with PCA whitening, trained on the training pictures, to so many dimensions at most; 0: no; none: with the
    protocol sscd 512, where there are training pictures."""
    batch_size: int = 64
    """Pictures per forward pass."""
    k: int | None = None
    """Predictions per query of the descriptor; with fewer references, all of them. None: 10, copydays 100."""
    global_candidates: int | None = None
    """Keep only so many predictions, the best over all queries (the challenge: 10 times the queries, with a larger k);
    none: all, phase2 10 times the queries."""
    ap: Literal["auto", "step", "trapezoid"] = "auto"
    """How average precision is summed in uAP and mAP; auto: in steps, copydays by trapezoids."""
    repetitions: int = 1000
    """Of the bootstrap over queries that gives the intervals (95 %, percentiles); 0: no intervals."""
    seed: int = 0
    """Of the bootstrap."""
    shown: int = 12
    """How many of the worst false matches, and of the worst misses, report.html shows; 0: no report and no curves."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to decode, compute and search; auto: on a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model. auto: bf16 where the hardware multiplies it and the first batch's descriptors agree with those in
    fp32 (cosine .9999)."""
    threads: int = 2
    """DALI's CPU threads."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "k", "threads", "candidates_k", "global_candidates"):
            if getattr(self, name) is not None:
                require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("start", "whiten", "repetitions", "seed", "shown", "memory"):
            if getattr(self, name) is not None:
                require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(self.memory is None or self.memory < 1e6, "memory", "below 1e6 (gigabytes)", self.memory)
        require(self.threads <= 1024, "threads", "at most 1024", self.threads)
        require(self.split != "", "split", "the name of a split", self.split)
        require(self.out != "", "out", "the name of a folder", self.out)
        require(self.alpha is None or math.isfinite(self.alpha), "alpha", "finite", self.alpha)
        start = START if self.start is None else self.start
        require(self.end is None or self.end > start, "end", f"above start={start}", self.end)
        if self.dataset is None:
            if self.queries is None or self.references is None:
                raise ConfigError("give the pictures as dataset=FOLDER split=NAME, or as queries= and references=")
            require(self.lists is None, "lists", "left out without dataset", self.lists)
        for name in ("queries", "references", "training"):
            if self.dataset is not None and getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)}: dataset={self.dataset} has its own; leave out one")
        if self.candidates is not None and self.candidates_k is not None:
            raise ConfigError(
                f"candidates_k={self.candidates_k}: the pairs are those of candidates={self.candidates}; leave out one"
            )

    def check_use(self, *, descriptor: bool, matcher: bool, normalised: bool) -> None:
        """Raise ConfigError for a setting that was given but has no use with these models, or where scores are not
        `normalised`. False and 0, which ask for nothing, always fit."""
        if not descriptor:
            self._unused(
                ("score_normalization", "whiten", "alpha", "start", "end", "k", "local_views", "search"),
                "for a descriptor, but there is only a matcher",
            )
        if not matcher:
            self._unused(("candidates", "candidates_k", "local_crops", "memory"), "for a matcher, but there is none",
                         "give matcher= too, or ")  # fmt: skip
        if not normalised:
            self._unused(("alpha", "start", "end"), "for score normalisation, which is off here",
                         "give score_normalization=true, or ", zero=True)  # fmt: skip

    def _unused(self, names: Sequence[str], what_for: str, way_out: str = "", *, zero: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and (value or zero):
                shown = str(value).lower() if isinstance(value, bool) else value
                raise ConfigError(f"{name}={shown} is {what_for}; {way_out}leave out {name}")
