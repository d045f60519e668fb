"""The paper's ablation tables (PROTOCOLS 14) as sets of named runs, each with the paper's figure.

The figures are micro-average precision in percent on dev set II of DISC21, after the full training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: What the paper has where a training did not converge.
FAILS = "fails"
_MINED = (
    "data.neighbours",
    "data.neighbour_columns",
    *(f"mining.{name}" for name in ("at_start", "every", "model", "k", "batch_size")),
)


@dataclass(frozen=True)
class Row:
    """A row: its ``label``, the named ``run``, the ``paper``'s figure (None: it has none). ``without``: settings of the
    call that this row's run is not given. ``name``: of the run's folder, unlike any other row's."""

    label: str
    run: str
    paper: float | str | None
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.run}-unmined" if self.without else self.run


@dataclass(frozen=True)
class Table:
    """A table: what it varies, and its rows. ``kind``: of the models, which says how they are evaluated."""

    sentence: str
    rows: tuple[Row, ...]
    kind: str = "descriptor"


def _rivals(prefix: str, rows: Mapping[str, float | str]) -> tuple[Row, ...]:
    """Rows of other targets, {TARGET-FORM or TARGET-FORM-K: figure}."""
    names = {"feature": "FeatNN", "location": "LocNN", "both": "both", "cosine": "cosine", "nce": "NCE"}

    def label(key: str) -> str:
        return ", ".join(f"k = {part}" if part.isdigit() else names[part] for part in key.split("-"))

    return tuple(Row(label(key), f"{prefix}-{key}", paper) for key, paper in rows.items())


_GAMMA = "gamma = {}".format
_WEIGHT = "w = {}".format

TABLES: Mapping[str, Table] = {
    "descriptor-weight": Table(
        "The descriptor: CopyNCE's weight.",
        (
            Row("w = 0 (baseline)", "ablation-weight-0", 68.9),
            Row(_WEIGHT(3), "ablation-weight-3", 70.5),
            Row("w = 5 (full)", "descriptor", 70.5),
            Row(_WEIGHT(8), "ablation-weight-8", 69.9),
        ),
    ),
    "descriptor-gamma": Table(
        "The descriptor: the prior's sharpness.",
        (
            Row(_GAMMA(0), "ablation-gamma-0", 67.9),
            Row(_GAMMA(0.5), "ablation-gamma-0.5", 69.7),
            Row(_GAMMA(1), "ablation-gamma-1", 70.0),
            Row(_GAMMA(2), "ablation-gamma-2", 70.4),
            Row("gamma = 3 (full)", "descriptor", 70.5),
            Row(_GAMMA("inf"), "ablation-gamma-inf", 70.1),
        ),
    ),
    "descriptor-form": Table(
        "The descriptor: CopyNCE's form.",
        (Row("cross-entropy (full)", "descriptor", 70.5), Row("cosine", "ablation-cosine", 68.6)),
    ),
    "descriptor-layer": Table(
        "The descriptor: the block whose patches CopyNCE compares.",
        (Row("10th", "ablation-layer-10", 70.3), Row("12th (full)", "descriptor", 70.5)),
    ),
    "descriptor-r50": Table(
        "The descriptor on a ResNet-50 at 448 px: CopyNCE.",
        (
            Row("w = 0 (baseline)", "ablation-r50-weight-0", 67.8),
            Row("full", "descriptor-r50", 68.8),
        ),
    ),
    "descriptor-mining": Table(
        "The descriptor: mined neighbours (data.neighbours=FILE), with CopyNCE and without.",
        (
            Row("mined, CopyNCE (full)", "descriptor", 70.5),
            Row("mined, w = 0 (baseline)", "ablation-weight-0", 68.9),
            Row("not mined, CopyNCE", "descriptor", 61.8, without=_MINED),
            Row("not mined, w = 0", "ablation-weight-0", 57.7, without=_MINED),
        ),
    ),
    "descriptor-rivals": Table(
        "The descriptor: what patches are drawn to.",
        (
            Row("overlap (full)", "descriptor", 70.5),
            *_rivals(
                "ablation",
                {
                    "feature-cosine-1": 56.5, "feature-cosine-4": 48.1, "feature-nce-1": 57.0, "feature-nce-4": 42.6,
                    "location-cosine-1": 67.7, "location-cosine-4": 67.2, "location-nce-1": 64.7,
                    "location-nce-4": 64.2, "both-cosine-1": 68.5, "both-cosine-4": 66.0, "both-nce-1": 64.9,
                    "both-nce-4": 64.3,
                },
            ),
        ),
    ),
    "matcher-weight": Table(
        "The matcher: CopyNCE's weight.",
        (
            Row("w = 0 (baseline)", "ablation-matcher-weight-0", 70.9),
            Row(_WEIGHT(1), "ablation-matcher-weight-1", 81.7),
            Row("w = 3 (full)", "matcher", 83.5),
            Row(_WEIGHT(5), "ablation-matcher-weight-5", 83.5),
        ),
        "matcher",
    ),
    "matcher-gamma": Table(
        "The matcher: the prior's sharpness.",
        (
            Row(_GAMMA(0), "ablation-matcher-gamma-0", 82.5),
            Row(_GAMMA(0.5), "ablation-matcher-gamma-0.5", 82.6),
            Row("gamma = 1 (full)", "matcher", 83.5),
            Row(_GAMMA(2), "ablation-matcher-gamma-2", 82.9),
            Row(_GAMMA(3), "ablation-matcher-gamma-3", 83.0),
            Row(_GAMMA("inf"), "ablation-matcher-gamma-inf", 82.6),
        ),
        "matcher",
    ),
    "matcher-split": Table(
        "The matcher: how the blocks are divided.",
        (
            Row("6 + 6", "ablation-matcher-split-6-6", 84.0),
            Row("8 + 4 (full)", "matcher", 83.5),
            Row("10 + 2", "ablation-matcher-split-10-2", 79.4),
        ),
        "matcher",
    ),
    "matcher-rivals": Table(
        "The matcher: what patches are drawn to.",
        (
            Row("overlap (full)", "matcher", 83.5),
            *_rivals(
                "ablation-matcher",
                {
                    "feature-cosine": FAILS, "feature-nce": FAILS, "location-cosine": FAILS, "location-nce": 78.7,
                    "both-cosine": FAILS, "both-nce": 80.8,
                },
            ),
        ),
        "matcher",
    ),
}  # fmt: skip
