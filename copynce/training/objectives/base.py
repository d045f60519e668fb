"""What the trainer asks of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from copynce.errors import RunError
from copynce.models import AnyModel, load_checkpoint, load_start, save_checkpoint
from dali_pipelines import PairBatch


class Objective(nn.Module, ABC):
    """A model with its losses: what DDP wraps, so that one forward makes one synchronised backward."""

    #: What is trained, and what a checkpoint's file holds.
    model: AnyModel

    @abstractmethod
    def forward(self, batch: PairBatch, watch: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, float32, and measures by name, detached: the unweighted parts, and maybe
        other numbers of the batch. Of a scalar the log has the mean over the ranks; of one [2], a sum and what it is a
        sum over, the quotient over all of them. ``watch``: whether to measure what costs something too."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What the losses have learnt beside the model: tensors and plain values, on the CPU."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave; what another objective gave is left."""

    def begin_with(self, path: Path) -> list[str]:
        """Start the model from a file of weights; returns sentences about what was taken, left and new."""
        return load_start(self.model, path)

    def restore(self, path: Path) -> None:
        """Load the model from its file in a checkpoint. Raises RunError if that is another model."""
        found = load_checkpoint(path)
        if found.config != self.model.config:
            raise RunError(f"{path} holds another model ({found.config}) than the settings say; choose another out")
        self.model.load_state_dict(found.state_dict())

    def save_model(self, path: Path, card: dict[str, Any], mean: AnyModel | None = None) -> None:
        """Write the model, or ``mean`` in its place, with its ``card``, ready for evaluation; the file appears whole or
        not at all."""
        save_checkpoint(path, self.model if mean is None else mean, card)

    @abstractmethod
    def facts(self) -> dict[str, float]:
        """What the losses have learnt, as numbers for the log."""
