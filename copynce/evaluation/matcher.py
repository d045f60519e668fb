"""The evaluation of a matcher: scores of candidate pairs, whole pictures and with local crops (PROTOCOLS 4)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class _Step:
    """One row: its `name` in files and metrics, its `title`, the `folder` of its scores, what progress is `said` to be
    of, and how pairs are scored."""

    name: str
    title: str
    folder: str
    said: str
    local_crops: bool = False
    query_views: NDArray[np.int64] | None = None


def judge_matcher(
    matcher: Matcher,
    candidates: Candidates,
    evaluating: Evaluating,
    options: MatcherOptions,
    model_file: str | os.PathLike[str],
    model_hash: str,
    views: NDArray[np.int64] | None = None,
) -> MatcherResult:
    """The rows of `matcher`, read from `model_file` of that hash, on `candidates` of the evaluation's split.

    views: of each pair, which of `QUERY_VIEWS` was nearest to the reference, for a row of these in place of the whole
    queries; None: no such row.
    Leaves predictions-matcher.csv, predictions-lce.csv and predictions-matcher-local-views.csv; scores are kept in the
    folders scores, scores-lce and scores-local-views as they are made, and taken from there by the next evaluation of
    the same file, candidates and pictures. A pair with a broken picture has no prediction. Errors as of `score_pairs`.
    """
    steps = [_Step("matcher", "matcher", "scores", "pairs")]
    if options.local_crops:
        steps.append(_Step("lce", "+ local crops", "scores-lce", "pairs with local crops", local_crops=True))
    if views is not None:
        named = "matcher_local_views", "matcher, local views", "scores-local-views", "pairs in local views"
        steps.append(_Step(*named, query_views=views))
    evaluating.prepare(*(step.folder for step in steps))
    split = evaluating.split
    metrics: Metrics = {
        "matcher": str(Path(model_file).absolute()),
        "matcher_sha256": model_hash,
        "candidates": len(candidates.queries),
    }
    rows: list[Row] = []
    precision = options.precision
    for step in steps:
        found = score_pairs(
            matcher,
            candidates,
            split.queries,
            split.references,
            local_crops=step.local_crops,
            query_views=step.query_views,
            batch_size=options.batch_size,
            device=options.device,
            precision=precision,
            threads=options.threads,
            memory=options.memory,
            quarantine=evaluating.quarantine,
            keep=ScoreStore(evaluating.out / step.folder, model_hash),
            processes=evaluating.processes,
            progress=lambda done, said=step.said: evaluating.progress(said, done, len(candidates.queries)),  # type: ignore[misc]
            say=evaluating.say,
        )
        precision = found.precision  # one for all
        with evaluating.processes.together():
            if evaluating.is_main:
                rows += _judged(step, found, evaluating, options, metrics)
    return MatcherResult(metrics, rows)


def _judged(
    step: _Step, found: PairScores, evaluating: Evaluating, options: MatcherOptions, metrics: Metrics
) -> list[Row]:
    """The row of these scores, if there is a ground truth, and their file; `metrics` receives the facts."""
    predictions = Predictions(found.queries, found.references, found.scores)
    predictions = best_of_all(predictions, options.global_candidates)
    evaluating.forget()
    write_predictions(evaluating.out / f"predictions-{step.name.replace('_', '-')}.csv", predictions)
    metrics |= {
        f"precision_{step.name}": found.precision,
        f"unscored_pairs_{step.name}": len(found.unscored),
        f"encoder_passes_{step.name}": found.encodings,
        f"fusion_passes_{step.name}": found.fusions,
    }
    if not evaluating.positives:
        return []
    row = options.judging.row(step.title, predictions, evaluating.split.ground_truth)
    keys = ("uap", "rp90", "rp90_threshold", "map", "recall_at_1", "recall_at_10")
    metrics |= {f"{key}_{step.name}": row.metrics[key] for key in keys}
    return [row]
