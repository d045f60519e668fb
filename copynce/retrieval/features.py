"""Descriptors in files: safetensors that hold the rows, the pictures' names and what the rows were made from.

The tensors are ``values`` float32 [N, D] and ``uuids``, a JSON list as uint8; the metadata's ``copynce.features`` is a
JSON object ``{"made_from": {...}, "broken": [[uuid, reason], ...]}``. A file is written whole or not at all, and its
rows are memory-mapped when it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from copynce.errors import DataError
from copynce.files import whole_file

_METADATA = "copynce.features"

Computed = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Features:
    """Descriptors with the pictures they belong to, in manifest order; broken pictures are left out.

    uuids: N names. values: float32 [N, D], rows of length 1. precision: "fp32" or "bf16", what they were computed in.
    """

    uuids: list[str]
    values: NDArray[np.float32]
    precision: Computed = "fp32"


@dataclass(frozen=True)
class FeatureFile:
    """What a file holds: `features` (rows memory-mapped), the broken pictures (uuid, reason), and `made_from`: plain
    values that name model, pictures and settings, by which a reader tells whether the features are those it wants."""

    features: Features
    broken: list[tuple[str, str]]
    made_from: dict[str, Any]


def write_features(
    path: str | os.PathLike[str],
    features: Features,
    made_from: Mapping[str, Any],
    broken: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a file of features, whole or not at all. made_from: anything JSON can hold; see `FeatureFile`.

    Raises WriteError if the disk is full or the folder takes no file.
    """
    path = Path(path)
    facts = {"made_from": dict(made_from), "precision": features.precision, "broken": list(broken)}
    names = np.frombuffer(json.dumps(features.uuids).encode(), np.uint8)
    tensors: dict[str, NDArray[Any]] = {"values": np.ascontiguousarray(features.values, np.float32), "uuids": names}
    content = save(tensors, metadata={_METADATA: json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content)


def read_features(path: str | os.PathLike[str]) -> FeatureFile:
    """The content of a file of `write_features`. Raises DataError if it is another file or damaged, FileNotFoundError
    if it is absent."""
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {})[_METADATA])
            uuids = json.loads(file.get_tensor("uuids").tobytes())
            rows, columns = file.get_slice("values").get_shape()
        values = _mapped(path, rows, columns)
        broken = [(str(uuid), str(reason)) for uuid, reason in facts["broken"]]
        features = Features(uuids, values, facts["precision"])
        if features.precision not in get_args(Computed):
            raise ValueError(f"unknown precision {features.precision!r}")
        made_from = dict(facts["made_from"])
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a readable file of features ({type(error).__name__}: {error})") from error
    if len(uuids) != len(values):
        raise DataError(f"{path}: {len(uuids)} names for {len(values)} rows")
    return FeatureFile(features, broken, made_from)


def _mapped(path: Path, rows: int, columns: int) -> NDArray[np.float32]:
    """The tensor ``values`` of the file, mapped: a safetensors file is a length, a JSON header, then the tensors."""
    if rows == 0:  # nothing can be mapped
        return np.empty((rows, columns), np.float32)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header))["values"]
    if entry["dtype"] != "F32":
        raise ValueError(f"expected float32 rows, got {entry['dtype']}")
    offset = 8 + header + entry["data_offsets"][0]
    return np.memmap(path, np.float32, "r", offset, (rows, columns))
