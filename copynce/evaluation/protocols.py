"""The standard evaluation of a descriptor, from pictures to metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from copynce import __version__
from copynce.config import require
from copynce.data import EvaluationSplit, Manifest, Quarantine
from copynce.errors import ConfigError, DataError
from copynce.evaluation.metrics import Predictions, score_predictions
from copynce.evaluation.predictions import best_of_all, ranked_predictions, write_predictions
from copynce.files import atomic_text, file_sha256
from copynce.provenance import processor_name, running_commit
from copynce.retrieval.extract import FeatureStore, Precision, extract
from copynce.retrieval.features import Features
from copynce.retrieval.normalization import check_ranks
from copynce.retrieval.normalization import score_normalization as normalise_scores
from copynce.retrieval.search import search

Metrics = dict[str, float | int | str | None]


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
    model_file: the file that `model` was loaded from. With it, features are kept in `out_dir`/features as they are
        made, and taken from there by the next evaluation of the same file, pictures and code.
    progress: called as progress(role, done, total) while "query", "reference" and "training" pictures are read.
    say: receives a sentence about what is not as it was asked for.

    Leaves in `out_dir` (made if absent): predictions.csv, metrics.json (what is returned) and, if any picture is
    broken, skipped.jsonl with each one's path and reason. A broken query returns nothing and so counts as missed; a
    broken reference cannot be found. Where the ground truth has no pair at all (it is hidden, or not there), there is
    nothing to score: the metrics then have no "uap", and say "positives": 0.
    Raises ConfigError for settings that do not fit, DataError if no query, reference or training picture can be
    decoded, or if the split has too few training pictures to normalise with.
    """
    out_dir = Path(out_dir)
    require(k >= 1, "k", "at least 1", k)
    require(batch_size >= 1, "batch_size", "at least 1", batch_size)
    require(threads >= 1, "threads", "at least 1", threads)
    if global_candidates is not None:
        most = k * len(split.queries)
        require(1 <= global_candidates < most, "global_candidates",
                f"at least 1 and below the {most} predictions of k={k} for {len(split.queries)} queries; raise k",
                global_candidates)  # fmt: skip
    if score_normalization:
        check_ranks(start, end)
        _check_training(split, None if split.training is None else len(split.training), end)
    _check_out(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    skipped = out_dir / "skipped.jsonl"
    skipped.unlink(missing_ok=True)  # of an earlier evaluation
    quarantine = Quarantine(skipped)
    model_hash = None if model_file is None else file_sha256(model_file)
    positives = sum(map(len, split.ground_truth.values()))
    if not positives and say is not None:
        say(
            f"split {split.name!r} has no ground truth (no file, or no pair in it): there will be predictions, but "
            "nothing to score"
        )

    for manifest in (split.queries, split.references, split.training):
        if manifest is not None:
            manifest.report(say or (lambda line: None), quarantine.add)

    def features(role: str, manifest: Manifest, precision: Precision) -> Features:
        def report(done: int) -> None:
            if progress is not None:
                progress(role, done, len(manifest))

        return extract(
            model,
            manifest,
            batch_size=batch_size,
            device=device,
            precision=precision,
            quarantine=quarantine,
            threads=threads,
            keep=None if model_hash is None else FeatureStore(out_dir / "features", role, model_hash),
            progress=report,
            say=say,
        )

    query = features("query", split.queries, precision)
    reference = features("reference", split.references, query.precision)
    scores, indices = search(query.values, reference.values, k)

    def predictions(scores: np.ndarray) -> Predictions:
        return best_of_all(ranked_predictions(query.uuids, reference.uuids, scores, indices), global_candidates)

    plain = predictions(scores)
    (out_dir / "metrics.json").unlink(missing_ok=True)  # it would speak of other predictions
    write_predictions(out_dir / "predictions.csv", plain)
    metrics: Metrics = {"split": split.name}
    if positives:
        metrics |= score_predictions(plain, split.ground_truth)
    else:
        metrics |= {"queries": len(split.queries), "positives": 0, "predictions": len(plain.scores)}
    metrics |= {
        "k": k,
        "global_candidates": global_candidates,
        "references": len(split.references),
        "skipped_queries": len(split.queries) - len(query.uuids),
        "skipped_references": len(split.references) - len(reference.uuids),
    }
    if score_normalization and positives:
        assert split.training is not None, "checked above"
        training = features("training", split.training, query.precision)
        _check_training(split, len(training.uuids), end)
        normal = normalise_scores(scores, query.values, training.values, start=start, end=end, alpha=alpha)
        result = score_predictions(predictions(normal), split.ground_truth)
        metrics |= {f"{key}_sn": result[key] for key in ("uap", "rp90", "rp90_threshold")}
        metrics |= {"alpha": alpha, "start": start, "end": end}
        metrics["skipped_training"] = len(split.training) - len(training.uuids)
    device = torch.device(device)
    metrics |= {
        "model": None if model_file is None else str(Path(model_file).absolute()),
        "model_sha256": model_hash,
        "dataset": str(split.references.root.absolute()),
        "precision": query.precision,
        "batch_size": batch_size,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "version": __version__,
        "commit": running_commit(),
    }
    with atomic_text(out_dir / "metrics.json") as file:
        json.dump(metrics, file, indent=2)
        file.write("\n")
    return metrics


def _check_training(split: EvaluationSplit, found: int | None, end: int) -> None:
    if found is None:
        raise DataError(f"split {split.name!r}: score normalisation needs training pictures, but it has none")
    if found < end:
        raise DataError(
            f"split {split.name!r}: score normalisation with end={end} needs as many training pictures, got {found}"
        )


def _check_out(out_dir: Path) -> None:
    """Raise ConfigError if a name below `out_dir` is taken by a file where a folder must be, or the other way round."""
    for folder in (out_dir / "features", *(out_dir / "features").parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"out: {folder} must be a folder, or not there yet, but it is a file; choose another out")
    for name in ("predictions.csv", "metrics.json", "skipped.jsonl"):
        if (out_dir / name).is_dir():
            raise ConfigError(f"out: {out_dir / name} must be a file, or not there yet, but it is a folder")
