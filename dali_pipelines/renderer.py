"""Runs the graph over batches that a background thread prepares ahead, and survives pictures that fail in DALI.

On the CPU several replicas of the graph render batches in turns, each with its part of the threads. DALI runs one
operator after the other and waits for the last picture of each, and between operators one thread works alone; the other
replicas fill these gaps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dali_pipelines.arena import Arena
from dali_pipelines.options import LoaderOptions
from dali_pipelines.packing import Scene, pack_batch
from dali_pipelines.reading import Quarantine
from dali_pipelines.sources import AnyPath, EncodedPicture
from dali_pipelines.workers import Workers

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Payload = TypeVar("Payload")

#: Batches that the producer keeps ready, beside those inside of DALI; each holds its packed arrays, files and tables.
QUEUE_DEPTH = 3

#: Most replicas of a graph on the CPU: each holds the memory of two batches, and two threads in one leave few gaps.
MOST_REPLICAS = 4


@dataclass(frozen=True)
class Batch(Generic[Payload]):
    """A prepared batch: scenes to render, the file behind every encoded picture, and what goes to the consumer."""

    scenes: Sequence[Scene]
    files: Sequence[tuple[AnyPath, EncodedPicture]]
    payload: Payload


@dataclass(frozen=True)
class _Packed(Generic[Item, Payload]):
    """A batch, its packed arrays, and what to call when nobody reads these any more."""

    item: Item
    batch: Batch[Payload]
    arrays: list[object]
    release: Callable[[], None]


class Producer(Generic[Item, Payload]):
    """Prepares items ahead in a daemon thread; iterating yields the results in order, or raises its exception."""

    def __init__(self, prepare: Callable[[Item], Payload], items: Iterable[Item], depth: int = QUEUE_DEPTH) -> None:
        self._ready: queue.Queue[Payload | _End] = queue.Queue(depth)
        self._stop = threading.Event()
        self._end: _End | None = None
        self._thread = threading.Thread(
            target=_produce, args=(prepare, items, self._ready, self._stop), name="dali_pipelines producer", daemon=True
        )
        # Also runs at interpreter exit, when nobody closed the loader.
        self.close = weakref.finalize(self, _join, self._thread, self._ready, self._stop)
        self._thread.start()

    def __next__(self) -> Payload:
        if self._end is None:
            found = self._ready.get()
            if not isinstance(found, _End):
                return found
            self._end = found
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


def _produce(
    prepare: Callable[[Any], Any], items: Iterable[Any], ready: queue.Queue[Any], stop: threading.Event
) -> None:
    end = _End()
    try:
        for item in items:
            if stop.is_set():
                return
            ready.put(prepare(item))
    except BaseException as error:  # handed over whole, with its traceback; the consumer raises it
        end = _End(error)
    ready.put(end)


def _join(thread: threading.Thread, ready: queue.Queue[Any], stop: threading.Event) -> None:
    stop.set()
    while thread.is_alive():
        try:
            ready.get_nowait()  # a producer that waits for a free place sees the stop next
        except queue.Empty:
            thread.join(0.01)


class _Replica(Generic[Item, Payload]):
    """One pipeline of the graph and its batches, in order; ``deal`` gives it the next one or raises StopIteration."""

    def __init__(
        self,
        build: Callable[[Callable[[], list[object]]], Any],
        deal: Callable[[_Replica[Item, Payload]], _Packed[Item, Payload]],
    ) -> None:
        self.waiting: deque[_Packed[Item, Payload]] = deque()
        self.running: deque[_Packed[Item, Payload]] = deque()  # inside of DALI
        self._build = build
        self._deal = deal
        self._pipeline: Any = None

    def run(self) -> Any:
        """The outputs of the first running batch; RuntimeError if it failed, StopIteration after the last one."""
        if self._pipeline is None:
            self.waiting.appendleft(self._deal(self))  # no pipeline is built for nothing
            self._pipeline = self._build(self._source)
            self._pipeline.build()
        return self._pipeline.run()

    def stop(self) -> _Packed[Item, Payload]:
        """The batch that failed; those after it wait for the pipeline that the next run builds."""
        self._pipeline = None
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()
        return self.waiting.popleft()

    def close(self) -> None:
        """Let go of the pipeline, which refers to this: its threads and memory end now, not with a collection."""
        self._pipeline = None
        self.waiting.clear()
        self.running.clear()

    def _source(self) -> list[object]:
        self.running.append(self._deal(self))
        return self.running[-1].arrays


@dataclass
class Renderer(Generic[Item, Payload]):
    """The graph with its producer. ``prepare(item)`` reads files and returns a :class:`Batch`, or None for nothing.

    ``prepare`` must consult ``quarantine``: when a file fails in DALI though its header was fine, it is added there,
    its batch is prepared again, the pipeline is rebuilt and the stream goes on with the same batches in the same order.
    """

    prepare: Callable[[Item], Batch[Payload] | None]
    quarantine: Quarantine
    options: LoaderOptions
    views: int
    normalized: bool = True  # else uint8 [B, S, S, 3]
    replicas: int = 1  # at most; a device other than the CPU has one

    #: Memory of batches that the pipeline is done with.
    _arenas: deque[Arena] = field(default_factory=deque, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.options.device == "gpu" and self.options.device_id is None:
            import torch

            self.options = dataclasses.replace(self.options, device_id=torch.cuda.current_device())

    def stream(
        self, items: Iterable[Item], workers: Workers | None = None
    ) -> Iterator[tuple[Payload, list[torch.Tensor]]]:
        """Yield (payload, views) per batch, in order; closing the generator stops the producer.

        With ``workers`` the items are the numbers of their batches, from 0. What of the payload lies in a worker's
        memory may be read until the next batch is asked for.
        """
        prepare = self._pack if workers is None else functools.partial(self._fetch, workers)
        producer: Producer[Item, _Packed[Item, Payload] | None] = Producer(prepare, items)
        to_torch = _ToTorch(self.options.dtype if self.normalized else "uint8")
        try:
            with contextlib.closing(self._run(producer)) as batches:
                for payload, outputs in batches:
                    yield payload, to_torch(outputs)
        finally:
            if workers is not None:
                workers.close()  # first: the producer may be waiting for one
            producer.close()
            to_torch.finish()

    def arrays(self, batch: Batch[Payload], arena: Arena) -> list[object]:
        """What the pipeline takes for a batch; ``arena`` holds what is large until the pipeline has run."""
        return pack_batch(batch.scenes, self.options.size, arena.empty)

    def build(self, source: Callable[[], list[object]], threads: int) -> Any:
        """A pipeline that calls ``source`` for the arrays of each batch."""
        from dali_pipelines.graph import build_pipeline

        options = self.options
        return build_pipeline(
            source,
            views=self.views,
            size=options.size,
            batch_size=options.batch_size,
            threads=threads,
            device=options.device,
            device_id=options.device_id,
            normalized=self.normalized,
        )

    def _pack(self, item: Item) -> _Packed[Item, Payload] | None:
        batch = self.prepare(item)
        if batch is None:
            return None
        try:
            arena = self._arenas.popleft()
        except IndexError:  # all are on the way
            arena = Arena()
        arena.clear()
        return _Packed(item, batch, self.arrays(batch, arena), functools.partial(self._arenas.append, arena))

    def _fetch(self, workers: Workers, item: Any) -> _Packed[Any, Payload] | None:
        found, release = workers.fetch(item)
        if found is None:
            release()
            return None
        batch, arrays = found
        return _Packed(item, batch, arrays, release)

    def _run(self, producer: Producer[Any, Any]) -> Generator[tuple[Payload, tuple[Any, ...]]]:
        threads = self.options.threads
        count = min(self.replicas, threads) if self.options.device == "cpu" else 1
        failure: list[BaseException] = []
        # Batches go to the replicas in turns, and are taken from them in turns: so their order stays.
        dealer = itertools.cycle(range(count))

        def deal(replica: _Replica[Any, Payload]) -> _Packed[Any, Payload]:
            """The next batch of a replica; those of the others on the way are put by."""
            try:
                while not replica.waiting:
                    packed = next(producer)
                    if packed is not None:
                        replicas[next(dealer)].waiting.append(packed)
            except StopIteration:
                raise
            except BaseException as error:
                # The batches before it are still delivered; then it is raised as it is, not wrapped by DALI.
                failure.append(error)
                raise StopIteration from None
            return replica.waiting.popleft()

        shares = [threads // count + (k < threads % count) for k in range(count)]
        replicas = [_Replica(functools.partial(self.build, threads=share), deal) for share in shares]
        try:
            yield from self._deliver(replicas)
        finally:
            for replica in replicas:
                replica.close()
        if failure:
            raise failure[0]

    def _deliver(self, replicas: list[_Replica[Any, Payload]]) -> Iterator[tuple[Payload, tuple[Any, ...]]]:
        """What the replicas render, in turns, until the one whose turn it is has no batch."""
        turns = itertools.cycle(replicas)
        replica = next(turns)
        while True:
            try:
                outputs = replica.run()
            except StopIteration:
                break
            except RuntimeError as error:
                failed = replica.stop()
                repaired = self._repair(failed, error)
                failed.release()
                if repaired is None:  # nothing is left of this batch: the next one is the next replica's
                    replica = next(turns)
                else:
                    replica.waiting.appendleft(repaired)
                continue
            done = replica.running.popleft()
            yield done.batch.payload, outputs
            done.release()
            replica = next(turns)

    def _repair(self, packed: _Packed[Any, Payload], error: RuntimeError) -> _Packed[Any, Payload] | None:
        """Find the files of a failed batch that DALI cannot decode and prepare the batch without them."""
        files = {os.fspath(path): (path, picture) for path, picture in packed.batch.files}
        # All at once first: if no file is to blame, the error must not wait for a pipeline of each.
        if self._decode([picture for _, picture in files.values()]):
            raise error
        culprits = [path for path, picture in files.values() if not self._decode([picture])]
        if not culprits:
            raise error
        for path in culprits:
            self.quarantine.add(path, "the header is fine but the picture cannot be decoded")
        return self._pack(packed.item)

    def _decode(self, pictures: Sequence[EncodedPicture]) -> bool:
        """True if DALI decodes all of them, to the sizes that their headers say."""
        from dali_pipelines.graph import build_decoder

        data = [picture.data for picture in pictures]
        options = self.options
        decoder = build_decoder(
            lambda: data, batch_size=len(data), device=options.device, device_id=options.device_id
        )  # fmt: skip
        decoder.build()
        try:
            (decoded,) = decoder.run()
        except RuntimeError:
            return False
        return all(tuple(decoded[k].shape()[:2]) == picture.shape for k, picture in enumerate(pictures))


class _ToTorch:
    """DALI's batches as torch tensors of ``dtype``, on their device.

    On the CPU a tensor is DALI's memory, which it keeps, unless its dtype is another. On a GPU it is a copy: DALI would
    use its memory again as soon as nobody on the host holds it, though torch's stream has yet to read it.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._copied: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()  # and when

    def __call__(self, outputs: Sequence[Any]) -> list[torch.Tensor]:
        import torch

        dtype = getattr(torch, self._dtype)  # DALI knows no bfloat16
        found = [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs]
        if not found[0].is_cuda:
            return [tensor.to(dtype) for tensor in found]
        copies = [tensor.to(dtype, copy=True) for tensor in found]
        self._copied.append((torch.cuda.current_stream(found[0].device).record_event(), found))
        while self._copied and self._copied[0][0].query():
            self._copied.popleft()
        return copies

    def finish(self) -> None:
        """Wait for the last copies; what they copy is held until then."""
        while self._copied:
            self._copied.popleft()[0].synchronize()
