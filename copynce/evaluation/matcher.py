"""The evaluation of a matcher: scores of candidate pairs, whole pictures and with local crops (PROTOCOLS 4)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from copynce.evaluation.evaluating import Evaluating, Judging
from copynce.evaluation.metrics import Predictions
from copynce.evaluation.predictions import Candidates, best_of_all, write_predictions
from copynce.evaluation.tables import Metrics, Row
from copynce.models import Matcher
from copynce.retrieval.extract import Precision
from copynce.retrieval.matching import MEMORY, score_pairs
from copynce.retrieval.pair_scores import PairScores, ScoreStore


@dataclass(frozen=True)
class MatcherOptions:
    """local_crops: a second row, with local crops ensembling. global_candidates: keep only so many predictions, the
    best over all queries. The others are those of `score_pairs`."""

    local_crops: bool = True
    batch_size: int = 64
    device: torch.device | str = "cpu"
    precision: Precision = "auto"
    threads: int = 2
    memory: int = MEMORY
    global_candidates: int | None = None
    judging: Judging = field(default_factory=Judging)


@dataclass(frozen=True)
class MatcherResult:
    """metrics: facts for metrics.json. rows: the matcher, with local crops too where asked for; none where there is no
    ground truth, nor on other processes than the first."""

    metrics: Metrics
    rows: list[Row]


def judge_matcher(
    matcher: Matcher,
    candidates: Candidates,
    evaluating: Evaluating,
    options: MatcherOptions,
    model_file: str | os.PathLike[str],
    model_hash: str,
) -> MatcherResult:
    """The rows of `matcher`, read from `model_file` of that hash, on `candidates` of the evaluation's split.

    Leaves predictions-matcher.csv and predictions-lce.csv; scores are kept in the folders scores and scores-lce as they
    are made, and taken from there by the next evaluation of the same file, candidates and pictures. A pair with a
    broken picture has no prediction. Errors as of `score_pairs`.
    """
    steps = [("matcher", "matcher", "scores", False)]
    if options.local_crops:
        steps.append(("lce", "+ local crops", "scores-lce", True))
    evaluating.prepare(*(folder for _, _, folder, _ in steps))
    split = evaluating.split
    metrics: Metrics = {
        "matcher": str(Path(model_file).absolute()),
        "matcher_sha256": model_hash,
        "candidates": len(candidates.queries),
    }
    rows: list[Row] = []
    precision = options.precision
    for name, title, folder, local_crops in steps:
        role = "pairs" if not local_crops else "pairs with local crops"
        found = score_pairs(
            matcher,
            candidates,
            split.queries,
            split.references,
            local_crops=local_crops,
            batch_size=options.batch_size,
            device=options.device,
            precision=precision,
            threads=options.threads,
            memory=options.memory,
            quarantine=evaluating.quarantine,
            keep=ScoreStore(evaluating.out / folder, model_hash),
            processes=evaluating.processes,
            progress=lambda done, role=role: evaluating.progress(role, done, len(candidates.queries)),  # type: ignore[misc]
            say=evaluating.say,
        )
        precision = found.precision  # one for both
        with evaluating.processes.together():
            if evaluating.is_main:
                rows += _judged(name, title, found, evaluating, options, metrics)
    return MatcherResult(metrics, rows)


def _judged(
    name: str, title: str, found: PairScores, evaluating: Evaluating, options: MatcherOptions, metrics: Metrics
) -> list[Row]:
    """The row of these scores, if there is a ground truth, and their file; `metrics` receives the facts."""
    predictions = Predictions(found.queries, found.references, found.scores)
    predictions = best_of_all(predictions, options.global_candidates)
    evaluating.forget()
    write_predictions(evaluating.out / f"predictions-{name}.csv", predictions)
    metrics |= {
        f"precision_{name}": found.precision,
        f"unscored_pairs_{name}": len(found.unscored),
        f"encoder_passes_{name}": found.encodings,
        f"fusion_passes_{name}": found.fusions,
    }
    if not evaluating.positives:
        return []
    row = options.judging.row(title, predictions, evaluating.split.ground_truth)
    keys = ("uap", "rp90", "rp90_threshold", "map", "recall_at_1", "recall_at_10")
    metrics |= {f"{key}_{name}": row.metrics[key] for key in keys}
    return [row]
