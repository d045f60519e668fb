"""Where, in a forward and backward pass, the first value appears that is no number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dali_pipelines import PairBatch

_MOST = 3  # names that a sentence lists


class FirstFault:
    """While its ``with`` block runs, every module's output, and the gradient of each, is looked at.

    ``output`` and ``gradient`` are then sentences about the first of either that holds what is no number, in the order
    in which they were made, or None. :meth:`watched` passes batches on and looks at their pictures; ``pictures`` are
    those that hold what is no number. It waits for the device at every module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._batch: PairBatch | None = None
        self._hooks = ExitStack()
        self.pictures: list[str] = []
        self.output: str | None = None
        self.gradient: str | None = None

    def __enter__(self) -> FirstFault:
        for name, module in self._model.named_modules():
            if name:
                self._hooks.callback(module.register_forward_hook(partial(self._look, name)).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def watched(self, batches: Iterable[PairBatch]) -> Iterator[PairBatch]:
        """The batches, one after the other."""
        for batch in batches:
            self._batch = batch
            for side, pictures in (("query", batch.query), ("reference", batch.reference)):
                bad = (~pictures.isfinite()).flatten(1).any(1)
                self.pictures += [f"{side} of {batch.uuids[row]}" for row in bad.nonzero().flatten().tolist()]
            yield batch

    def _look(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if self.output is None and not bool(tensor.detach().isfinite().all()):
                what = f"that of {name}, {type(module).__name__}"
                self.output = f"{what}: {_counted(tensor)}{self._rows(tensor)}{_reach(inputs)}"
            if tensor.requires_grad:
                tensor.register_hook(partial(self._look_back, name, type(module).__name__))

    def _look_back(self, name: str, kind: str, gradient: Tensor) -> None:
        if self.gradient is None and not bool(gradient.isfinite().all()):
            self.gradient = f"that of {name}, {kind}: {_counted(gradient)}{self._rows(gradient)}"

    def _rows(self, tensor: Tensor) -> str:
        """Which pictures or pairs of the batch the rows are, where each is one."""
        assert self._batch is not None, "a batch is under way"
        uuids = self._batch.uuids
        names = {
            len(uuids): [f"pair {uuid}" for uuid in uuids],
            2 * len(uuids): [f"{side} of {uuid}" for side in ("query", "reference") for uuid in uuids],
        }.get(len(tensor) if tensor.ndim else 0)
        bad = (~tensor.detach().isfinite()).flatten(1).any(1) if tensor.ndim > 1 else None
        if names is None or bad is None or bool(bad.all()):
            return ""
        return f", in {listed([names[row] for row in bad.nonzero().flatten().tolist()])}"


def faulty(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Those of the named tensors that hold what is no number: "NAME: 1 of 24 values"."""
    return [
        f"{name}: {_counted(tensor)}"
        for name, tensor in named
        if tensor is not None and not bool(tensor.detach().isfinite().all())
    ]


def listed(names: list[str]) -> str:
    """Some names, and how many there are more."""
    more = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f" and {more:,} more" if more > 0 else "")


def _counted(tensor: Tensor) -> str:
    count = int((~tensor.detach().isfinite()).sum())
    return f"{count:,} of {tensor.numel():,} values"


def _reach(inputs: Any) -> str:
    """The largest number that went in."""
    largest = [float(tensor.detach().abs().max()) for tensor in _tensors(inputs) if tensor.numel()]
    return f"; the largest number that goes in is {max(largest):.3g}" if largest else ""


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's inputs or output."""
    if isinstance(value, Tensor):
        if torch.is_floating_point(value):
            yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
