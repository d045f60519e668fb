"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of ``copynce eval``."""

    dataset: str = MISSING
    """Folder in the form of DISC21, or with references.csv, query_NAME.csv and gt_NAME.json."""
    split: str = "dev"
    """Which queries: a NAME of the folder; DISC21 has val (dev set I), dev (dev set II), test (phase 2)."""
    lists: str | None = None
    """Folder of DISC21's id lists and ground truth; none: the dataset's own folder."""
    out: str | None = None
    """Where predictions.csv and metrics.json go; none: RUN/eval-SPLIT, or eval-SPLIT beside a weights file."""
    score_normalization: bool = False
    """Also score with the training pictures' similarities subtracted (uap_sn, rp90_sn)."""
    batch_size: int = 64
    k: int = 10
    """Predictions per query."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int = 2
    """DALI's CPU threads."""
