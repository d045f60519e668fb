"""What the pair loader gives: one batch of training pairs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
