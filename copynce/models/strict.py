"""Tensors into a module, or one sentence that names every difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from copynce.errors import DataError


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    """`load_state_dict`; returns sentences about values that were converted.

    Raises DataError, and leaves the module as it was, if a name is missing, unexpected or of another shape, or if a
    value is no finite float.
    """
    expected = module.state_dict()
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    _refuse(
        path,
        "does not fit the model",
        {
            "missing": [name for name in expected if name not in tensors],
            "unexpected": [name for name in tensors if name not in expected],
            "of another shape": shapes,
        },
    )
    types = {
        name: str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        for name, tensor in tensors.items()
    }
    # Counters (BatchNorm's num_batches_tracked) may be of any type, weights must be floats.
    odd = [
        f"{name} {types[name]}"
        for name, tensor in tensors.items()
        if tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.is_complex()
        or (expected[name].is_floating_point() and not tensor.is_floating_point())
    ]
    _refuse(path, "holds weights that are no floats", {"": odd})
    values = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    bad = {name: int((~value.isfinite()).sum()) for name, value in values.items()}
    _refuse(
        path,
        "holds weights that are not finite (NaN, infinity)",
        {"": [f"{name} ({count} of {values[name].numel()})" for name, count in bad.items() if count]},
    )
    empty = [name for name, value in values.items() if name.endswith(".weight") and value.ndim > 1 and not value.any()]
    _refuse(path, "holds weights that are all zero, as a file that was made but never filled", {"": empty})
    negative = [name for name, value in values.items() if name.endswith("running_var") and (value < 0).any()]
    _refuse(path, "holds negative variances", {"": negative})
    module.load_state_dict(values, strict=True)
    converted = sorted({types[name] for name in tensors if expected[name].is_floating_point()} - {"float32"})
    return [f"its {' and '.join(converted)} weights are converted to float32"] if converted else []


def _refuse(path: Path, what: str, faults: Mapping[str, list[str]]) -> None:
    """Raise a DataError if any of the lists holds something."""
    parts = [f"{title}: {listed(names)}" if title else listed(names) for title, names in faults.items() if names]
    if parts:
        raise DataError(f"{path} {what}{';' if list(faults) != [''] else ':'} {'; '.join(parts)}")


def listed(names: Sequence[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
