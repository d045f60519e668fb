"""Manifests, evaluation sets and the list of broken pictures."""

from copynce.data.layouts import EvaluationSplit, GroundTruth, open_dataset, read_ground_truth
from copynce.data.manifest import PICTURE_SUFFIXES, Manifest, read_manifest
from copynce.data.neighbours import Neighbours, read_neighbours
from copynce.data.quarantine import Quarantine
from copynce.errors import DataError
from copynce.files import atomic_text

__all__ = [
    "PICTURE_SUFFIXES",
    "DataError",
    "EvaluationSplit",
    "GroundTruth",
    "Manifest",
    "Neighbours",
    "Quarantine",
    "atomic_text",
    "open_dataset",
    "read_ground_truth",
    "read_manifest",
    "read_neighbours",
]
