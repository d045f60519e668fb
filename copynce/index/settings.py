"""The settings of an index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from copynce.config import require, require_number
from copynce.retrieval.settings import DescribingConfig


@dataclass(frozen=True, kw_only=True)
class IndexConfig(DescribingConfig):
    """Settings of ``copynce index`` and :class:`copynce.Index`."""

    compare: Literal["stat", "hash"] = "stat"
    """How a file is known to be unchanged: by size and time of change, or by its content, which is read."""
    block: int = 1024
    """Pictures of a transaction, at most: a killed command repeats no more."""
    block_seconds: float = 20.0
    """Seconds after which a transaction is closed with what there is."""
    descriptor: Literal["float32", "float16"] = "float32"
    """Type of the numbers kept, of an index that is begun; float16 takes half the space and rounds to 3 digits."""
    memory_gib: float = 4.0
    """Descriptors of up to so many GiB are searched in memory, exactly; for more, an IVF-PQ index is built when they
    are added, and searched with re-ranking."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.block >= 1, "block", "at least 1", self.block)
        require_number("block_seconds", self.block_seconds, above=0)
        require_number("memory_gib", self.memory_gib, least=0)
