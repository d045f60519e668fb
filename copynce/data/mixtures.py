"""Sources made of others: the pairs on which a matcher is fine-tuned (PROTOCOLS 11)."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from copynce.data.manifest import Manifest
from copynce.data.pairs import MatcherPairs, SupervisedPairs, fingerprint_of
from dali_pipelines import Pair


@dataclasses.dataclass(frozen=True)
class MixedPairs:
    """All of the ``labelled`` copies, and some of the ``generated`` pairs: in each epoch a ``share`` of their items.

    The items of the labelled copies come first. The generated ones are taken from a permutation in turn, none twice
    before a round of ``1 / share`` epochs is over; which ones follows from ``seed`` and the epoch. Raises ValueError
    unless 0 < ``share`` <= 1.
    """

    labelled: SupervisedPairs
    generated: MatcherPairs
    share: float
    seed: int
    pairs_per_item: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    @property
    def pictures(self) -> Manifest:
        return self.generated.pictures

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return self.labelled.manifests + self.generated.manifests

    @property
    def fingerprint(self) -> str:
        return fingerprint_of((self.labelled.fingerprint, self.generated.fingerprint, self.drawn))

    @property
    def drawn(self) -> int:
        """How many of the generated items an epoch has, at least 1."""
        return max(1, round(self.share * len(self.generated)))

    def __len__(self) -> int:
        return len(self.labelled) + self.drawn

    def item(self, index: int, epoch: int) -> list[Pair]:
        if index < len(self.labelled):
            return self.labelled.item(index, epoch)
        past_rounds, part = divmod(epoch, len(self.generated) // self.drawn)
        order = _order(self.seed, past_rounds, len(self.generated))
        return self.generated.item(int(order[part * self.drawn + index - len(self.labelled)]), epoch)

    def substitute(self, broken: Pair, attempt: int) -> Pair:
        source = self.generated if broken.traced else self.labelled
        return source.substitute(broken, attempt)


@functools.lru_cache(maxsize=2)
def _order(seed: int, past_rounds: int, items: int) -> NDArray[np.int64]:
    """The order in which a round takes the items; another one than that of any epoch's."""
    return np.random.default_rng((seed, past_rounds, 1)).permutation(items)
