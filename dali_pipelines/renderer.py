"""Runs the graph over batches that a background thread prepares ahead, and survives pictures that fail in DALI.

On the CPU several lanes of the same graph render batches in turns, each with its part of the threads. DALI runs one
operator after the other and waits for the last sample of each, and between operators one thread works alone; the other
lanes fill these gaps.
"""

from __future__ import annotations

import functools
import itertools
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dali_pipelines.rooms import Room
from dali_pipelines.sources import AnyPath, Broken, BrokenPicture, EncodedPicture
from dali_pipelines.views import Scene, feed
from dali_pipelines.workers import Workers

Item = TypeVar("Item")
Payload = TypeVar("Payload")

#: Batches that the producer keeps ready, beside those inside of DALI.
QUEUE_DEPTH = 3

#: Most lanes of a loader on the CPU; each holds the memory of two batches.
MOST_LANES = 4


@dataclass(frozen=True)
class Batch(Generic[Payload]):
    """A prepared batch: scenes to render, the file behind every encoded picture, and what goes to the consumer."""

    scenes: Sequence[Scene]
    files: Sequence[tuple[AnyPath, EncodedPicture]]
    payload: Payload


@dataclass(frozen=True)
class _Fed(Generic[Item, Payload]):
    """A batch, what the pipeline is fed with for it, and what to call when nobody reads the arrays any more."""

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
            ready.get_nowait()  # a producer that waits for room sees the stop next
        except queue.Empty:
            thread.join(0.01)


class _Lane(Generic[Item, Payload]):
    """One pipeline of the graph and its batches, in order; ``deal`` gives it the next one or raises StopIteration."""

    def __init__(
        self,
        build: Callable[[Callable[[], list[object]]], Any],
        deal: Callable[[_Lane[Item, Payload]], _Fed[Item, Payload]],
    ) -> None:
        self.waiting: deque[_Fed[Item, Payload]] = deque()
        self.running: deque[_Fed[Item, Payload]] = deque()  # inside of DALI
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

    def stop(self) -> _Fed[Item, Payload]:
        """The batch that failed; those after it wait for the pipeline that the next run builds."""
        self._pipeline = None
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()
        return self.waiting.popleft()

    def close(self) -> None:
        """Let go of the pipeline, which refers to this lane: its threads and memory end now, not with a collection."""
        self._pipeline = None
        self.waiting.clear()
        self.running.clear()

    def _source(self) -> list[object]:
        self.running.append(self._deal(self))
        return self.running[-1].arrays


@dataclass
class Renderer(Generic[Item, Payload]):
    """The graph with its producer. ``prepare(item)`` reads files and returns a :class:`Batch`, or None for nothing.

    ``prepare`` must consult ``broken``: when a file fails in DALI though its header was fine, it is added there, its
    batch is prepared again, the pipeline is rebuilt and the stream goes on with the same batches in the same order.
    """

    prepare: Callable[[Item], Batch[Payload] | None]
    broken: Broken
    views: int
    size: int
    batch_size: int
    device: str = "cpu"
    device_id: int | None = None
    threads: int = 2
    lanes: int = 1  # at most; a device other than the CPU has one
    normalize: tuple[Sequence[float], Sequence[float]] | None = None
    #: Seconds that the consumer waited for a batch, and those of them in which DALI itself waited for the producer.
    wait_seconds: float = field(default=0.0, init=False)
    producer_wait_seconds: float = field(default=0.0, init=False)

    #: Memory of batches that the pipeline is done with.
    _rooms: deque[Room] = field(default_factory=deque, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "gpu"):
            raise ValueError(f"device must be 'cpu' or 'gpu', got {self.device!r}")
        for name in ("size", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.device == "gpu" and self.device_id is None:
            import torch

            self.device_id = torch.cuda.current_device()

    def stream(
        self, items: Iterable[Item], workers: Workers | None = None
    ) -> Iterator[tuple[Payload, tuple[Any, ...]]]:
        """Yield (payload, DALI outputs) per batch, in order; closing the generator stops the producer.

        With ``workers`` the items are the numbers of their batches, from 0. What lies in a worker's memory may be read
        until the next batch is asked for.
        """
        prepare = self._fed if workers is None else functools.partial(self._fetched, workers)
        producer: Producer[Item, _Fed[Item, Payload] | None] = Producer(prepare, items)
        try:
            yield from self._run(producer)
        finally:
            if workers is not None:
                workers.close()  # first: the producer may be waiting for one
            producer.close()

    def arrays(self, batch: Batch[Payload], room: Room) -> list[object]:
        """What the pipeline is fed with for a batch; ``room`` holds what is large until the pipeline has run."""
        return feed(batch.scenes, self.size, room.empty)

    def build(self, source: Callable[[], list[object]], threads: int) -> Any:
        """A pipeline that calls ``source`` for the arrays of each batch."""
        from dali_pipelines.graph import build_pipeline

        return build_pipeline(
            source,
            views=self.views,
            size=self.size,
            batch_size=self.batch_size,
            threads=threads,
            device=self.device,
            device_id=self.device_id,
            normalize=self.normalize,
        )

    def _fed(self, item: Item) -> _Fed[Item, Payload] | None:
        batch = self.prepare(item)
        if batch is None:
            return None
        try:
            room = self._rooms.popleft()
        except IndexError:  # all are on the way
            room = Room()
        room.clear()
        return _Fed(item, batch, self.arrays(batch, room), functools.partial(self._rooms.append, room))

    def _fetched(self, workers: Workers, item: Any) -> _Fed[Any, Payload] | None:
        found, release = workers.fetch(item)
        if found is None:
            release()
            return None
        batch, arrays = found
        return _Fed(item, batch, arrays, release)

    def _run(self, producer: Producer[Any, Any]) -> Iterator[tuple[Payload, tuple[Any, ...]]]:
        count = min(self.lanes, self.threads) if self.device == "cpu" else 1
        failure: list[BaseException] = []
        dealer = itertools.cycle(range(count))

        def deal(lane: _Lane[Any, Payload]) -> _Fed[Any, Payload]:
            """The next batch of a lane; those of the others on the way are put by."""
            started = time.perf_counter()
            try:
                while not lane.waiting:
                    fed = next(producer)
                    if fed is not None:
                        lanes[next(dealer)].waiting.append(fed)
            except StopIteration:
                raise
            except BaseException as error:
                # The batches before it are still delivered; then it is raised as it is, not wrapped by DALI.
                failure.append(error)
                raise StopIteration from None
            finally:
                self.producer_wait_seconds += time.perf_counter() - started
            return lane.waiting.popleft()

        shares = [self.threads // count + (k < self.threads % count) for k in range(count)]
        lanes = [_Lane(functools.partial(self.build, threads=share), deal) for share in shares]
        try:
            yield from self._deliver(lanes)
        finally:
            for lane in lanes:
                lane.close()
        if failure:
            raise failure[0]

    def _deliver(self, lanes: list[_Lane[Any, Payload]]) -> Iterator[tuple[Payload, tuple[Any, ...]]]:
        """What the lanes render, in turns, until the one whose turn it is has no batch."""
        turns = itertools.cycle(lanes)
        lane = next(turns)
        while True:
            started = time.perf_counter()
            try:
                outputs = lane.run()
            except StopIteration:
                break
            except RuntimeError as error:
                failed = lane.stop()
                repaired = self._repair(failed, error)
                failed.release()
                if repaired is None:  # nothing is left of this batch: the next one is the next lane's
                    lane = next(turns)
                else:
                    lane.waiting.appendleft(repaired)
                continue
            finally:
                self.wait_seconds += time.perf_counter() - started
            done = lane.running.popleft()
            yield done.batch.payload, outputs
            done.release()
            lane = next(turns)

    def _repair(self, fed: _Fed[Any, Payload], error: RuntimeError) -> _Fed[Any, Payload] | None:
        """Find the files of a failed batch that DALI cannot decode and prepare the batch without them."""
        files = {os.fspath(path): (path, picture) for path, picture in fed.batch.files}
        # All at once first: if no file is to blame, the error must not wait for a pipeline of each.
        if self._decode([picture for _, picture in files.values()]):
            raise error
        culprits = [path for path, picture in files.values() if not self._decode([picture])]
        if not culprits:
            raise error
        for path in culprits:
            self.broken.add(BrokenPicture(path, "the header is fine but the picture cannot be decoded"))
        return self._fed(fed.item)

    def _decode(self, pictures: Sequence[EncodedPicture]) -> bool:
        """True if DALI decodes all of them, to the sizes that their headers say."""
        from dali_pipelines.graph import build_decoder

        data = [picture.data for picture in pictures]
        decoder = build_decoder(
            lambda: data, batch_size=len(data), device=self.device, device_id=self.device_id
        )  # fmt: skip
        decoder.build()
        try:
            (decoded,) = decoder.run()
        except RuntimeError:
            return False
        return all(tuple(decoded[k].shape()[:2]) == picture.shape for k, picture in enumerate(pictures))
