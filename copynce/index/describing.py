"""Files described for an index, and how whoever does it gives them back: this process, or workers elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from copynce.index.listing import File
from copynce.index.reading import Facts, NotedFile
from copynce.index.settings import IndexConfig
from copynce.model import Model
from copynce.models.precision import bf16_in_hardware
from copynce.retrieval.extract import Precision
from copynce.retrieval.features import Computed
from dali_pipelines.sources import AnyPath


@dataclass(frozen=True)
class Described:
    """Some pictures of a list. places: int64 [b], in the list. descriptors: float32 [b, D], unit. facts: [b], of their
    files. precision: in which they were computed."""

    places: NDArray[np.int64]
    descriptors: NDArray[np.float32]
    facts: list[Facts]
    precision: Computed


class Describer(Protocol):
    """What describes a list of files, piece by piece."""

    def __call__(
        self,
        model: Model,
        files: Sequence[File],
        config: IndexConfig,
        known: Computed | None,
        on_broken: Callable[[AnyPath, str], None],
        say: Callable[[str], None] | None,
    ) -> Generator[Described, None, None]:
        """Yield each of the files in one `Described`, but for those told to `on_broken(path, reason)`.

        known: what the index was begun with, None before its first pictures. say: receives sentences on the way. What
        it holds is given back when the generator is closed.
        """


def precision_of(known: Computed | None, model: Model, config: IndexConfig) -> Precision:
    """What to compute in: "auto" is what the index was begun with, where the hardware has it, so that a picture and its
    equal in the index have one descriptor."""
    if config.precision != "auto" or known is None:
        return config.precision
    return "bf16" if known == "bf16" and bf16_in_hardware(model.device) else "fp32"


def describe_here(
    model: Model,
    files: Sequence[File],
    config: IndexConfig,
    known: Computed | None,
    on_broken: Callable[[AnyPath, str], None],
    say: Callable[[str], None] | None,
) -> Generator[Described, None, None]:
    """The describer that is this process."""
    noted = [NotedFile(file) for file in files]
    batches = model.stream(
        noted,
        on_broken,
        batch_size=min(config.batch_size, config.block),
        precision=precision_of(known, model, config),
        threads=config.threads,
        say=say,
    )
    for places, descriptors, precision in batches:
        facts = [fact for at in places if (fact := noted[at].facts) is not None]
        assert len(facts) == len(places), "each was read"
        for at in places:
            noted[at].facts = None
        yield Described(places, descriptors, facts, "bf16" if precision == "bf16" else "fp32")
