"""How fast this machine makes a training's batches: measured, with nothing else to do."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from copynce.data.pairs import PairSampler
from dali_pipelines import LoaderOptions, PairBatch, PairLoader
from dali_pipelines.preparation import PairPreparation
from dali_pipelines.sources import AnyPath

_WARM_UP = 4  # batches, in which code is compiled and queues fill


@dataclass(frozen=True)
class LoaderRate:
    """``pictures`` were read in all, those of the first batches too. ``rate``: pictures/s. ``core_seconds``: of all
    threads and workers, a picture. ``worker_seconds``: of these what worker processes can do, a picture. ``views``,
    ``tables``: bytes of a batch."""

    batches: int
    pictures: int
    rate: float
    core_seconds: float
    worker_seconds: float
    views: int
    tables: int


def measure_loader(
    sampler: PairSampler,
    options: LoaderOptions,
    *,
    processes: int,
    seconds: float,
    on_broken: Callable[[AnyPath, str], None],
) -> LoaderRate:
    """The rate of a loader over the first batches of ``sampler``, for about ``seconds`` after those that warm it up."""
    source, batches = sampler.source, sampler.batches(0, 10**6)
    counted = pictures = 0
    with PairLoader(
        batches, source.pictures.paths, options, substitute=source.substitute, on_broken=on_broken, processes=processes
    ) as loader:
        begin = start = time.perf_counter()
        work = 0.0
        for number, batch in enumerate(loader, start=1):
            pictures += 2 * len(batch.uuids)
            counted += 2 * len(batch.uuids)
            _finish(batch)
            now = time.perf_counter()
            if number == 1 or (number <= _WARM_UP and now - begin < seconds):
                start, work, counted = now, _cpu_seconds(), 0
            elif now - start >= seconds:
                break
        elapsed, work = now - start, _cpu_seconds() - work
        views = batch.query.nbytes + batch.reference.nbytes
        tables = batch.query_to_reference.nbytes + batch.reference_to_query.nbytes
    alone = _alone(sampler, options, on_broken)
    return LoaderRate(number, pictures, counted / elapsed, work / counted, alone, views, tables)


def _finish(batch: PairBatch) -> None:
    """Wait until the batch is there: on a GPU it may still be on its way."""
    if batch.query.is_cuda:
        import torch

        torch.cuda.synchronize(batch.query.device)


def _alone(sampler: PairSampler, options: LoaderOptions, on_broken: Callable[[AnyPath, str], None]) -> float:
    """Seconds a picture of this thread alone: what worker processes do, and without them a thread under Python's
    lock."""
    batches = sampler.batches(0, 2)
    preparation = PairPreparation(batches, sampler.source.pictures.paths, options, sampler.source.substitute)
    preparation.start(on_broken)
    try:
        preparation.batch(0, np.empty)
        start = time.thread_time()
        preparation.batch(1, np.empty)
        return (time.thread_time() - start) / (2 * len(batches[1]))
    finally:
        preparation.reader.close()


def _cpu_seconds() -> float:
    """What this process and its workers have worked so far, all threads together."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
