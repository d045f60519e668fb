"""The standard evaluation of a descriptor, from pictures to metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from copynce.data import DataError, EvaluationSplit, Manifest, Quarantine, atomic_text
from copynce.evaluation.extract import Features, extract
from copynce.evaluation.metrics import score_predictions
from copynce.evaluation.normalization import score_normalization as normalise_scores
from copynce.evaluation.predictions import ranked_predictions, write_predictions
from copynce.evaluation.search import search


def evaluate_descriptor(
    model: nn.Module,
    split: EvaluationSplit,
    out_dir: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    k: int = 10,
    score_normalization: bool = False,
    threads: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float | int | str | None]:
    """The metrics of `model` on `split`: exact search of every query among the references, `k` predictions each.

    model, batch_size, device, threads: as in `extract`.
    score_normalization: also report uap_sn, rp90_sn and rp90_threshold_sn, the scores normalised against the split's
        training pictures (CopyNCE's defaults; the predictions file keeps the plain scores).
    progress: called as progress(role, done, total) while "query", "reference" and "training" pictures are read.

    Leaves in `out_dir` (made if absent): predictions.csv, metrics.json (what is returned) and, if any picture is
    broken, skipped.jsonl with each one's path and reason. A broken query returns nothing and so counts as missed; a
    broken reference cannot be found.
    Raises DataError if no query, reference or training picture can be decoded, or if the split has no training
    pictures to normalise with.
    """
    if score_normalization and split.training is None:
        raise DataError(f"split {split.name!r}: score normalisation needs training pictures, but it has none")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    skipped = out_dir / "skipped.jsonl"
    skipped.unlink(missing_ok=True)  # of an earlier evaluation
    quarantine = Quarantine(skipped)

    def features(role: str, manifest: Manifest) -> Features:
        def report(done: int) -> None:
            if progress is not None:
                progress(role, done, len(manifest))

        return extract(
            model,
            manifest,
            batch_size=batch_size,
            device=device,
            quarantine=quarantine,
            threads=threads,
            progress=report,
        )

    query, reference = features("query", split.queries), features("reference", split.references)
    scores, indices = search(query.values, reference.values, k)
    predictions = ranked_predictions(query.uuids, reference.uuids, scores, indices)
    metrics: dict[str, float | int | str | None] = {
        "split": split.name,
        **score_predictions(predictions, split.ground_truth),
        "k": k,
        "references": len(split.references),
        "skipped_queries": len(split.queries) - len(query.uuids),
        "skipped_references": len(split.references) - len(reference.uuids),
    }
    if score_normalization:
        assert split.training is not None, "checked above"
        training = features("training", split.training)
        normal = normalise_scores(scores, query.values, training.values)
        result = score_predictions(
            ranked_predictions(query.uuids, reference.uuids, normal, indices), split.ground_truth
        )
        metrics |= {f"{key}_sn": result[key] for key in ("uap", "rp90", "rp90_threshold")}
        metrics["skipped_training"] = len(split.training) - len(training.uuids)
    write_predictions(out_dir / "predictions.csv", predictions)
    with atomic_text(out_dir / "metrics.json") as file:
        json.dump(metrics, file, indent=2)
        file.write("\n")
    return metrics
