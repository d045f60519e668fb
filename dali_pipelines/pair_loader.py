"""The loader of training pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dali_pipelines.batch import Pair, PairBatch
from dali_pipelines.options import LoaderOptions
from dali_pipelines.preparation import PairFacts, PairPreparation
from dali_pipelines.renderer import MOST_REPLICAS, Batch, Renderer
from dali_pipelines.sources import AnyPath
from dali_pipelines.workers import Workers, require_guard

if TYPE_CHECKING:
    import torch


class PairLoader:
    """Iterates training batches as :class:`PairBatch`, on the device and of the dtype that ``options`` say.

    ``batches`` gives lists of :class:`Pair`, at most ``batch_size`` each; it is consumed ahead in a background thread
    and once only. ``pictures`` are the files from which layers choose. A pair with a broken file is replaced by
    ``substitute(pair, attempt)``, attempt = 1, 2, ..., and each broken file is told once to ``on_broken(path, reason)``
    (called from any thread). With ``processes`` so many worker processes sample programs, read, compose and trace,
    instead of a thread beside the caller's; ``batches`` is a sequence then, and it and ``substitute`` can be pickled.
    Batches depend neither on that nor on ``threads``. The background work ends with the iteration; leave a ``with``
    block or call :meth:`close` to end it earlier.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[Pair]],
        pictures: Sequence[AnyPath],
        options: LoaderOptions,
        *,
        substitute: Callable[[Pair, int], Pair],
        on_broken: Callable[[AnyPath, str], None],
        processes: int = 0,
    ) -> None:
        if processes < 0:
            raise ValueError(f"processes must be at least 0, got {processes}")
        if processes and not isinstance(batches, Sequence):
            raise ValueError(f"with processes, batches must be a sequence, got {type(batches).__name__}")
        if processes:
            require_guard()
        self._batches = batches
        self._processes = processes
        self._pinned = options.device == "gpu"
        self._preparation = PairPreparation(batches, pictures, options, substitute)
        self._preparation.start(on_broken)
        self._renderer: Renderer[Any, PairFacts] = Renderer(
            self._prepare, self._preparation.quarantine, options, views=2, replicas=MOST_REPLICAS
        )
        self._stream: Iterator[PairBatch] | None = None

    def __iter__(self) -> Iterator[PairBatch]:
        if self._stream is not None:
            raise RuntimeError("a PairLoader is iterated once; make a new one for the next batches")
        self._stream = self._iterate()
        return self._stream

    def __enter__(self) -> PairLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the background work; iterating further ends."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]
        self._preparation.reader.close()

    def _iterate(self) -> Iterator[PairBatch]:
        try:
            for facts, (query, reference) in self._rendered():
                yield PairBatch(
                    query,
                    reference,
                    self._kept(facts.query_to_reference),
                    self._kept(facts.reference_to_query),
                    self._kept(facts.positive),
                    self._kept(facts.traced),
                    facts.uuids,
                )
        finally:
            self._preparation.reader.close()

    def _rendered(self) -> Iterator[tuple[PairFacts, list[torch.Tensor]]]:
        if not self._processes:
            return self._renderer.stream(self._batches)
        assert isinstance(self._batches, Sequence), "checked when made"
        count = len(self._batches)
        workers = Workers(self._preparation, self._processes, count, self._preparation.quarantine)
        return self._renderer.stream(range(count), workers)

    def _prepare(self, item: Any) -> Batch[PairFacts] | None:
        """A batch of pairs, or the batch of that number."""
        return self._preparation.prepare(self._preparation.batches[item] if self._processes else item, self._empty)

    def _empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Memory for a table; for the GPU such as it copies from while the caller goes on."""
        if not self._pinned:
            return np.empty(shape, dtype)
        import torch

        size = math.prod(shape) * np.dtype(dtype).itemsize
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape)

    def _kept(self, array: np.ndarray) -> torch.Tensor:
        """An array as a tensor that no later batch overwrites."""
        import torch

        tensor = torch.from_numpy(array)
        if not self._processes:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned).copy_(tensor)
