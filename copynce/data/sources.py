"""Pair sources from settings: the lists and files that these name are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

from copynce.data.layouts import read_ground_truth
from copynce.data.manifest import read_manifest
from copynce.data.mixtures import MixedPairs
from copynce.data.neighbours import Neighbours, read_neighbours
from copynce.data.pairs import DescriptorPairs, MatcherPairs, PairSource, SupervisedPairs
from copynce.data.settings import DataConfig, DescriptorData, MatcherData, MixtureData, SupervisedData

_T = TypeVar("_T", DescriptorPairs, MatcherPairs)


def open_source(data: DataConfig, seed: int) -> PairSource:
    """The source that the settings describe, its files read. Raises DataError for a list or file that is not right."""
    if isinstance(data, MixtureData):
        labelled = _labelled(data, seed, data.labelled_root)
        return MixedPairs(labelled, _traced(MatcherPairs, data, seed), data.share, seed)
    if isinstance(data, SupervisedData):
        return _labelled(data, seed, data.root)
    if isinstance(data, MatcherData):
        return _traced(MatcherPairs, data, seed)
    return _traced(DescriptorPairs, data, seed)


def with_neighbours(source: PairSource, neighbours: Neighbours) -> PairSource:
    """The same source with other neighbours of its pictures. Raises TypeError for one whose pairs have none."""
    if isinstance(source, MixedPairs):
        return dataclasses.replace(source, generated=dataclasses.replace(source.generated, neighbours=neighbours))
    if isinstance(source, DescriptorPairs | MatcherPairs):
        return dataclasses.replace(source, neighbours=neighbours)
    raise TypeError(f"source must have neighbours, got {type(source).__name__}")


def neighbour_columns(data: DescriptorData | MatcherData | MixtureData) -> int:
    """How many neighbours of a picture are used."""
    return data.neighbour_columns or (7 if isinstance(data, DescriptorData) else 127)


def _labelled(data: SupervisedData | MixtureData, seed: int, root: str | None) -> SupervisedPairs:
    queries = read_manifest(data.queries, root=root)
    references = read_manifest(data.references, root=None if Path(data.references).is_dir() else root)
    truth = read_ground_truth(data.ground_truth)
    return SupervisedPairs(queries, references, truth, data.policy, seed, data.augment_probability)


def _traced(kind: type[_T], data: DescriptorData | MatcherData | MixtureData, seed: int) -> _T:
    manifest = read_manifest(data.train, root=data.root)
    if data.neighbours is None:
        return kind(manifest, data.policy, seed)
    return kind(manifest, data.policy, seed, read_neighbours(data.neighbours, manifest, neighbour_columns(data)))
