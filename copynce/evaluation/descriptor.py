"""The evaluation of a descriptor, from pictures to metrics (PROTOCOLS 2 and 3)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from copynce import __version__
from copynce.config import require
from copynce.data import EvaluationSplit, Manifest
from copynce.errors import DataError
from copynce.evaluation.evaluating import Evaluating, Judging
from copynce.evaluation.metrics import Predictions, Rule
from copynce.evaluation.predictions import Candidates, best_of_all, ranked_predictions, write_predictions
from copynce.evaluation.tables import Metrics, Row
from copynce.files import file_sha256
from copynce.provenance import processor_name, running_commit
from copynce.retrieval.extract import FeatureStore, Precision, Views, extract
from copynce.retrieval.features import Features
from copynce.retrieval.normalization import Whitening, check_ranks
from copynce.retrieval.normalization import score_normalization as normalise_scores
from copynce.retrieval.rows import Rows
from copynce.retrieval.search import search

_ROWS = 65_536  # that are whitened at a time


def evaluate_descriptor(
    model: nn.Module,
    split: EvaluationSplit,
    out_dir: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    k: int = 10,
    global_candidates: int | None = None,
    score_normalization: bool = False,
    alpha: float = 1.0,
    start: int = 1,
    end: int = 5,
    threads: int = 2,
    rule: Rule = "step",
    model_file: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Metrics:
    """The metrics of `model` on `split`: exact search of every query among the references, `k` predictions each.

    model, batch_size, device, precision, threads: as in `extract`; queries decide for all what "auto" means.
    global_candidates: keep only so many predictions, the best over all queries (PROTOCOLS 1.4: 10 times the queries);
        of equal scores the first in the order of queries, then of their ranks. None: all.
    score_normalization: also report uap_sn, rp90_sn and rp90_threshold_sn, the scores normalised against the split's
        training pictures with `alpha`, `start`, `end` (the predictions file keeps the plain scores).
    rule: how average precision is summed.
    model_file: the file that `model` was loaded from. With it, features are kept in `out_dir`/features as they are
        made, and taken from there by the next evaluation of the same file, pictures and code.
    progress: called as progress(role, done, total) while "query", "reference" and "training" pictures are read.
    say: receives a sentence about what is not as it was asked for.

    Leaves in `out_dir` (made if absent): predictions.csv, metrics.json (what is returned) and, if any picture is
    broken, skipped.jsonl with each one's path and reason; the results of an earlier evaluation there are removed. A
    broken query returns nothing and so counts as missed; a broken reference cannot be found. Where the ground truth has
    no pair at all (it is hidden, or not there), there is nothing to score: the metrics then have no "uap", and say
    "positives": 0.
    Raises ConfigError for settings that do not fit, DataError if no query, reference or training picture can be
    decoded, or if the split has too few training pictures to normalise with.
    """
    options = DescriptorOptions(
        batch_size=batch_size, device=device, precision=precision, k=k, global_candidates=global_candidates,
        score_normalization=score_normalization, alpha=alpha, start=start, end=end, threads=threads,
        judging=Judging(rule),
    )  # fmt: skip
    evaluating = Evaluating(Path(out_dir), split, progress, say)
    model_hash = None if model_file is None else file_sha256(model_file)
    result = judge_descriptor(model, evaluating, options, model_file, model_hash)
    evaluating.write_metrics(result.metrics)
    return result.metrics


@dataclass(frozen=True)
class DescriptorOptions:
    """As the arguments of `evaluate_descriptor`.

    whiten: two more rows with PCA whitening to so many dimensions, at most those that the training pictures have,
    without and with score normalisation after it. candidates: pairs of each query that are given on, its best.
    """

    batch_size: int = 64
    device: torch.device | str = "cpu"
    precision: Precision = "auto"
    k: int = 10
    global_candidates: int | None = None
    score_normalization: bool = False
    alpha: float = 1.0
    start: int = 1
    end: int = 5
    threads: int = 2
    whiten: int | None = None
    candidates: int = 0
    judging: Judging = field(default_factory=Judging)


@dataclass(frozen=True)
class DescriptorResult:
    """metrics: for metrics.json. rows: the descriptor, with score normalisation and whitening too where asked for; none
    where there is no ground truth. candidates: the best pairs of each query."""

    metrics: Metrics
    rows: list[Row]
    candidates: Candidates


def judge_descriptor(
    model: nn.Module,
    evaluating: Evaluating,
    options: DescriptorOptions,
    model_file: str | os.PathLike[str] | None,
    model_hash: str | None,
) -> DescriptorResult:
    """As `evaluate_descriptor`, but for metrics.json, which is the caller's. model_hash: of `model_file`."""
    split = evaluating.split
    _check(split, options)
    evaluating.prepare("features")

    def features(role: str, manifest: Manifest, precision: Precision) -> Features:
        return described(model, evaluating, options, role, manifest, precision, model_hash)

    query = features("query", split.queries, options.precision)
    reference = features("reference", split.references, query.precision)
    training = None
    if (options.score_normalization or options.whiten) and evaluating.positives:
        assert split.training is not None, "checked above"
        training = features("training", split.training, query.precision)
    result: DescriptorResult | None = None
    with evaluating.processes.together():
        if evaluating.is_main:
            result = _judged(evaluating, options, query, reference, training)
            device = torch.device(options.device)
            result.metrics.update(
                {
                    "model": None if model_file is None else str(Path(model_file).absolute()),
                    "model_sha256": model_hash,
                    "dataset": str(split.references.root.absolute()),
                    "precision": query.precision,
                    "batch_size": options.batch_size,
                    "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
                    "version": __version__,
                    "commit": running_commit(),
                }
            )
    return evaluating.processes.broadcast_object(result)  # type: ignore[return-value]


def described(
    model: nn.Module,
    evaluating: Evaluating,
    options: DescriptorOptions,
    role: str,
    manifest: Manifest,
    precision: Precision,
    model_hash: str | None,
    views: Views | None = None,
) -> Features:
    """The descriptors of pictures, or of views of them, kept in the folder features as they are made."""
    return extract(
        model,
        manifest,
        batch_size=options.batch_size,
        device=options.device,
        precision=precision,
        quarantine=evaluating.quarantine,
        threads=options.threads,
        processes=evaluating.processes,
        keep=None if model_hash is None else FeatureStore(evaluating.out / "features", role, model_hash),
        views=views,
        progress=lambda done: evaluating.progress(role, done, len(manifest)),
        say=evaluating.say,
    )


def _judged(
    evaluating: Evaluating,
    options: DescriptorOptions,
    query: Features,
    reference: Features,
    training: Features | None,
) -> DescriptorResult:
    """The result of these features, and predictions.csv."""
    split, k = evaluating.split, options.k
    scores, indices = search(query.values, reference.values, max(k, options.candidates))
    best = slice(options.candidates)
    chosen = ranked_predictions(query.uuids, reference.uuids, scores[:, best], indices[:, best])
    scores, indices = scores[:, :k], indices[:, :k]

    def predictions(scores: np.ndarray) -> Predictions:  # with the indices as they are then
        found = ranked_predictions(query.uuids, reference.uuids, scores, indices)
        return best_of_all(found, options.global_candidates)

    plain = predictions(scores)
    evaluating.forget()
    write_predictions(evaluating.out / "predictions.csv", plain)
    metrics: Metrics = {"split": split.name}
    rows: list[Row] = []
    if evaluating.positives:
        rows.append(options.judging.row("descriptor", plain, split.ground_truth))
        metrics |= rows[0].metrics
    else:
        metrics |= {"queries": len(split.queries), "positives": 0, "predictions": len(plain.scores)}
    metrics |= {
        "k": k,
        "global_candidates": options.global_candidates,
        "references": len(split.references),
        "skipped_queries": len(split.queries) - len(query.uuids),
        "skipped_references": len(split.references) - len(reference.uuids),
    }
    if training is not None:
        assert split.training is not None, "checked when they were read"
        metrics["skipped_training"] = len(split.training) - len(training.uuids)
        ranks = {"start": options.start, "end": options.end}

        def add(title: str, suffix: str, scores: np.ndarray) -> None:
            rows.append(options.judging.row(title, predictions(scores), split.ground_truth))
            metrics.update({f"{key}{suffix}": rows[-1].metrics[key] for key in ("uap", "rp90", "rp90_threshold")})

        if options.score_normalization:
            _check_training(split, len(training.uuids), options.end)
            metrics |= {"alpha": options.alpha, **ranks}
            normal = normalise_scores(scores, query.values, training.values, alpha=options.alpha, **ranks)
            add("+ score normalisation", "_sn", normal)
        if options.whiten:
            dims = min(options.whiten, training.values.shape[1], max(len(training.uuids) - 1, 1))
            whitening = Whitening.fit(training.values, dims)
            metrics["whitened_dims"] = dims
            query_rows, reference_rows, training_rows = (
                _whitened(whitening, side.values) for side in (query, reference, training)
            )
            scores, indices = search(query_rows, reference_rows, k)
            add("whitened", "_whitened", scores)
            if options.score_normalization:
                normal = normalise_scores(scores, query_rows, training_rows, alpha=options.alpha, **ranks)
                add("whitened + score normalisation", "_whitened_sn", normal)
    return DescriptorResult(metrics, rows, Candidates(chosen.queries, chosen.references))


def _whitened(whitening: Whitening, rows: Rows) -> NDArray[np.float32]:
    whitened = np.empty((len(rows), len(whitening.matrix)), np.float32)
    for start in range(0, len(rows), _ROWS):
        whitened[start : start + _ROWS] = whitening(np.asarray(rows[start : start + _ROWS]))
    return whitened


def _check(split: EvaluationSplit, options: DescriptorOptions) -> None:
    """Raise ConfigError or DataError for what cannot work, before a picture is read."""
    k, most = options.k, options.k * len(split.queries)
    require(k >= 1, "k", "at least 1", k)
    require(options.batch_size >= 1, "batch_size", "at least 1", options.batch_size)
    require(options.threads >= 1, "threads", "at least 1", options.threads)
    if options.global_candidates is not None:
        require(1 <= options.global_candidates < most, "global_candidates",
                f"at least 1 and below the {most} predictions of k={k} for {len(split.queries)} queries; raise k",
                options.global_candidates)  # fmt: skip
    if options.score_normalization:
        check_ranks(options.start, options.end)
        _check_training(split, None if split.training is None else len(split.training), options.end)
    if options.whiten is not None and split.training is None:
        raise DataError(f"split {split.name!r}: whitening needs training pictures, but it has none")


def _check_training(split: EvaluationSplit, found: int | None, end: int) -> None:
    if found is None:
        raise DataError(f"split {split.name!r}: score normalisation needs training pictures, but it has none")
    if found < end:
        raise DataError(
            f"split {split.name!r}: score normalisation with end={end} needs as many training pictures, got {found}"
        )
