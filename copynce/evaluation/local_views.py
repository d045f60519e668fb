"""The evaluation of a descriptor whose queries are asked in parts, as `copynce search` does it.

The score of a pair is the highest cosine of any view of the query and the whole reference. With score normalisation
each view is normalised by itself, before the highest is taken: a view that resembles everything, a piece of sky, gains
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from copynce.evaluation.descriptor import DescriptorOptions, described
from copynce.evaluation.evaluating import Evaluating
from copynce.evaluation.metrics import Predictions
from copynce.evaluation.predictions import Candidates, best_of_all, write_predictions
from copynce.evaluation.tables import Metrics, Row
from copynce.retrieval.extract import Precision
from copynce.retrieval.features import Features
from copynce.retrieval.normalization import Bias
from copynce.retrieval.query_views import QUERY_VIEWS, best_references
from copynce.retrieval.search import search


@dataclass(frozen=True)
class LocalViewsResult:
    """metrics: facts for metrics.json. rows: by local views, with score normalisation too where asked for; none where
    there is no ground truth. candidates: the best pairs of each query, by the last of these. views: int64, which of
    `QUERY_VIEWS` was the nearest in each."""

    metrics: Metrics
    rows: list[Row]
    candidates: Candidates
    views: NDArray[np.int64]


def judge_local_views(
    model: nn.Module, evaluating: Evaluating, options: DescriptorOptions, precision: Precision, model_hash: str
) -> LocalViewsResult:
    """The rows of `model`, whose file has that hash, by local views of the queries.

    options: as of the descriptor's other rows. precision: that of the whole pictures. Leaves
    predictions-local-views.csv, with the scores that are not normalised. Errors as of `extract`.
    """
    evaluating.prepare("features")
    split = evaluating.split
    query = described(model, evaluating, options, "query-views", split.queries, precision, model_hash, QUERY_VIEWS)
    reference = described(model, evaluating, options, "reference", split.references, precision, model_hash)
    training = None
    if options.score_normalization and evaluating.positives:
        assert split.training is not None, "the whole pictures' rows are normalised already"
        training = described(model, evaluating, options, "training", split.training, precision, model_hash)
    result: LocalViewsResult | None = None
    with evaluating.processes.together():
        if evaluating.is_main:
            result = _judged(evaluating, options, query, reference, training)
    return evaluating.processes.broadcast_object(result)  # type: ignore[return-value]


def _judged(
    evaluating: Evaluating, options: DescriptorOptions, query: Features, reference: Features, training: Features | None
) -> LocalViewsResult:
    """The result of these features, and predictions-local-views.csv."""
    scores, at = search(query.values, reference.values, max(options.k, options.candidates))
    shape = len(query.uuids), QUERY_VIEWS.count, scores.shape[1]
    scores, at = scores.reshape(shape), at.reshape(shape)
    metrics: Metrics = {}
    rows: list[Row] = []

    def best(scores: np.ndarray, k: int) -> tuple[Predictions, NDArray[np.int64]]:
        queries, references, views, highest = best_references(scores, at, k)
        names = np.asarray(query.uuids, object), np.asarray(reference.uuids, object)
        return Predictions(names[0][queries], names[1][references], highest.astype(np.float64)), views

    def add(title: str, suffix: str, scores: np.ndarray) -> Predictions:
        predictions = best_of_all(best(scores, options.k)[0], options.global_candidates)
        if evaluating.positives:
            rows.append(options.judging.row(title, predictions, evaluating.split.ground_truth))
            keys = ("uap", "rp90", "rp90_threshold", "map", "recall_at_1", "recall_at_10")
            metrics.update({f"{key}{suffix}": rows[-1].metrics[key] for key in keys})
        return predictions

    predictions = add("local views", "_local_views", scores)
    write_predictions(evaluating.out / "predictions-local-views.csv", predictions)
    if training is not None:
        similarities, _ = search(query.values, training.values, k=options.end)
        bias = Bias(options.start, options.end, options.alpha).of(similarities)
        scores = scores - bias.reshape(*shape[:2], 1)
        add("local views + score normalisation", "_local_views_sn", scores)
    found, views = best(scores, options.candidates)
    return LocalViewsResult(metrics, rows, Candidates(found.queries, found.references), views)
