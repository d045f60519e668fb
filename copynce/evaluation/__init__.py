"""From descriptors to metrics: extraction, exact search, score normalisation, the challenge's metrics and files."""

from copynce.evaluation.extract import extract
from copynce.evaluation.metrics import (
    Predictions,
    mean_average_precision,
    micro_average_precision,
    recall_at_k,
    recall_at_precision,
    recall_at_rank,
    score_predictions,
)
from copynce.evaluation.normalization import score_normalization
from copynce.evaluation.predictions import ranked_predictions, read_predictions, write_predictions
from copynce.evaluation.protocols import evaluate_descriptor
from copynce.evaluation.search import search
from copynce.retrieval.features import Features

__all__ = [
    "Features",
    "Predictions",
    "evaluate_descriptor",
    "extract",
    "mean_average_precision",
    "micro_average_precision",
    "ranked_predictions",
    "read_predictions",
    "recall_at_k",
    "recall_at_precision",
    "recall_at_rank",
    "score_normalization",
    "score_predictions",
    "search",
    "write_predictions",
]
