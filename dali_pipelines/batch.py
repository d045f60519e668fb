"""What the pair loader takes and gives: pairs to show, and a batch of them shown."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from dali_pipelines.sources import AnyPath

if TYPE_CHECKING:
    import torch

    from copynce.pixtrace import EditProgram


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two views. ``positive``: whether the query's picture is a copy of the reference's.

    ``traced``: whether the programs tell which pixels are copied: of a positive pair whose views show one file, and of
    a negative pair, where none is. A copy that somebody else made is positive but not traced.
    """

    query_path: AnyPath
    query_program: EditProgram
    reference_path: AnyPath
    reference_program: EditProgram
    positive: bool
    uuid: str
    traced: bool = True

    def __post_init__(self) -> None:
        if self.positive and self.traced and os.fspath(self.query_path) != os.fspath(self.reference_path):
            raise ValueError(
                "the views of a traced positive pair must show one picture, "
                f"got {os.fspath(self.query_path)} and {os.fspath(self.reference_path)}"
            )


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """B pairs of views.

    ``query``, ``reference``: [B, 3, S, S], normalised, of the loader's dtype and device. ``query_to_reference``,
    ``reference_to_query``: int32 [B, S, S] tables, -1 throughout for a pair that is not positive or not traced.
    ``positive``, ``traced``: bool [B], as in :class:`Pair`. ``uuids``: that of each pair really shown.
    """

    query: torch.Tensor
    reference: torch.Tensor
    query_to_reference: torch.Tensor
    reference_to_query: torch.Tensor
    positive: torch.Tensor
    traced: torch.Tensor
    uuids: list[str]

    def to(self, device: torch.device) -> PairBatch:
        """The same on ``device``, without waiting for what is under way there."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "uuids"}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return dataclasses.replace(self, **moved)
