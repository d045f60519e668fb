"""Pairs per second of the training pipeline and pictures per second of the evaluation pipeline, on one core.

    pytest benchmarks/bench_pipeline.py --benchmark-only --benchmark-json=pipeline.json

Photographs are imitated by JPEGs of about 500 x 375 pixels and 40 kB, made on the fly. A round is four batches of 64
pairs after warm-up (replicas deliver in bursts), on so many pinned cores; ``extra_info`` in the JSON file carries the
rate, CPU milliseconds a pair, and where they go: each step of the host, decoding, and each stage of the graph (printed
too, with ``-s``).
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.pixtrace import ComposedView, EditProgram, sample_program, trace_pairs
from dali_pipelines import LoaderOptions, Pair, PairLoader, PictureLoader, read_picture
from dali_pipelines.arena import Arena
from dali_pipelines.numba_ops.layout import COLOUR_STEPS, SLOTS
from dali_pipelines.options import Device
from dali_pipelines.packing import FLAGS, input_layouts, pack_batch
from dali_pipelines.preparation import PairPreparation
from dali_pipelines.reading import Quarantine
from dali_pipelines.workers import Workers

PICTURES, BATCH, ROUNDS, BATCHES = 128, 64, 8, 4


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    paths = []
    for i in range(PICTURES):
        width, height = (500, 375) if i % 4 else (375, 500)
        colours = np.zeros((height, width, 3))
        for cells, weight in ((4, 1.0), (16, 0.6), (64, 0.3), (200, 0.12)):  # detail at all scales, as in nature
            coarse = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            colours += weight * np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        paths.append(folder / f"{i:03}.jpg")
        Image.fromarray((colours / 2.02).astype(np.uint8)).save(paths[-1], quality=85)
    return paths


def pairs(paths: list[Path]) -> Iterator[list[Pair]]:
    """Endless batches of positive pairs, the descriptor policy on the query, the plain resize on the reference."""
    for epoch in itertools.count():
        for i in range(0, len(paths) - BATCH + 1, BATCH):
            yield positives(paths[i : i + BATCH], epoch)


def positives(paths: list[Path], epoch: int) -> list[Pair]:
    programs = [sample_program("descriptor", seed=0, epoch=epoch, uuid=path.name) for path in paths]
    return [
        Pair(path, program, path, EditProgram(), positive=True, uuid=path.name)
        for path, program in zip(paths, programs, strict=True)
    ]


def pair_loader(paths: list[Path], size: int, threads: int, device: Device = "cpu") -> PairLoader:
    return PairLoader(
        pairs(paths),
        paths,
        LoaderOptions(size=size, batch_size=BATCH, device=device, threads=threads),
        substitute=lambda pair, attempt: pair,
        on_broken=lambda path, reason: pytest.fail(f"{path}: {reason}"),
    )


@pytest.mark.parametrize("size", [224, 112])
@pytest.mark.parametrize("cores", [1, 2])
def test_pairs(benchmark: Any, photographs: list[Path], size: int, cores: int) -> None:
    """Query, reference and both tables of a batch of 64 positive pairs."""
    before = os.sched_getaffinity(0)
    if len(before) < cores:
        pytest.skip(f"needs {cores} cores, this process may use {len(before)}")
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        with pair_loader(photographs, size, threads=cores) as loader:
            batches = iter(loader)
            first = next(batches)
            assert first.query.shape == first.reference.shape == (BATCH, 3, size, size)
            assert (first.query_to_reference >= 0).any(dim=(1, 2)).float().mean() > 0.9
            for _ in range(6):  # empty what was prepared ahead
                next(batches)
            started, cpu = time.perf_counter(), time.process_time()
            benchmark.pedantic(lambda: next(batches), rounds=ROUNDS, iterations=BATCHES)
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    finally:
        os.sched_setaffinity(0, before)
    count = ROUNDS * BATCHES * BATCH
    benchmark.extra_info |= {
        "pairs_per_second": round(count / wall, 1),
        "pairs_per_second_and_core": round(count / wall / cores, 1),
        "cpu_ms_per_pair": round(1e3 * cpu / count, 2),
    }


class Batches(Sequence[list[Pair]]):
    """The batches of :func:`pairs`, each made where it is asked for."""

    def __init__(self, paths: list[Path], count: int) -> None:
        self.paths, self.batches = paths, count

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, at: int) -> list[Pair]:  # type: ignore[override]
        epoch, within = divmod(at, len(self.paths) // BATCH)
        return positives(self.paths[within * BATCH : (within + 1) * BATCH], epoch)


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_preparing_beside_a_loop(benchmark: Any, photographs: list[Path], processes: int) -> None:
    """Batches sampled, read, planned, traced and packed, not rendered, beside a thread that calls small operators of
    torch without end, as a loop does that launches a GPU's work; 0 processes: by a thread of this one."""
    ahead = 8
    count = ahead + ROUNDS * BATCHES + 1  # one more to find out what it returns
    options = LoaderOptions(size=224, batch_size=BATCH)
    preparation = PairPreparation(Batches(photographs, count), photographs, options, _same)
    workers = Workers(preparation, processes, count, Quarantine(None)) if processes else None
    preparation.start(lambda path, reason: pytest.fail(f"{path}: {reason}"))
    arena, numbers, launched, done = Arena(), itertools.count(), itertools.count(), threading.Event()

    def prepare() -> None:
        if workers is None:
            arena.clear()
            preparation.batch(next(numbers), arena.empty)
        else:
            workers.fetch(next(numbers))[1]()

    def loop() -> None:
        small = torch.zeros(8)
        while not done.is_set():
            small.add_(1.0)
            next(launched)

    beside = threading.Thread(target=loop)
    try:
        for _ in range(ahead):
            prepare()
        beside.start()
        started, before = time.perf_counter(), next(launched)
        benchmark.pedantic(prepare, rounds=ROUNDS, iterations=BATCHES)
        launches = (next(launched) - before) / (time.perf_counter() - started)
    finally:
        done.set()
        beside.join()
        preparation.reader.close()
        if workers is not None:
            workers.close()
    rate = BATCH / benchmark.stats["median"]
    benchmark.extra_info |= {"pairs_per_second": round(rate, 1), "launches_per_second": round(launches)}
    print(f"{processes} processes: {rate:.0f} pairs/s prepared, {launches / 1e3:.0f} thousand operators/s called")


def _same(pair: Pair, _: int) -> Pair:
    return pair


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [224, 336])
def test_pairs_on_the_gpu(benchmark: Any, photographs: list[Path], size: int) -> None:
    """The same with decoding, edits and normalisation on the GPU, fed by all cores that this process may use."""
    with pair_loader(photographs, size, threads=len(os.sched_getaffinity(0)), device="gpu") as loader:
        batches = iter(loader)
        assert next(batches).query.is_cuda
        for _ in range(6):
            next(batches)
        torch.cuda.synchronize()
        started, cpu = time.perf_counter(), time.process_time()

        def one() -> None:
            next(batches)
            torch.cuda.synchronize()

        benchmark.pedantic(one, rounds=4 * ROUNDS, iterations=1)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    count = 4 * ROUNDS * BATCH
    benchmark.extra_info |= {"pairs_per_second": round(count / wall, 1), "cpu_ms_per_pair": round(1e3 * cpu / count, 2)}
    print(f"{size} px: {count / wall:.0f} pairs/s, {1e3 * cpu / count:.2f} ms of CPU a pair")


#: Stages of a view in the order of the graph, each with what switches it off: flags, and numbers to set to a value.
STAGES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "place": (("edited",), {}),  # warp, dense map and the shrinking before, instead of the plain resize
    "blend": (("layer_0", "layer_1"), {"weight": -1.0}),
    "colour": ((), {"steps": np.tile(np.eye(3, 4), (COLOUR_STEPS, 1, 1)).reshape(-1)}),
    "effects": (("effects",), {}),
    "blur": (("blur",), {}),
    "jpeg": (("jpeg",), {}),
    "erase": ((), {"mask": -1.0}),
}


@pytest.mark.parametrize("size", [224])
def test_where_the_time_goes(benchmark: Any, photographs: list[Path], size: int) -> None:
    """CPU ms a pair, one thread: each step of the host, then what each stage adds to a graph that ends there."""
    from dali_pipelines.graph import build_decoder, build_pipeline

    batches = list(itertools.islice(pairs(photographs), 2))
    flat = [pair for batch in batches for pair in batch]
    count = len(flat)
    loader = pair_loader(photographs, size, threads=1)
    prepared = [batch for batch in (loader._prepare(pairs) for pairs in batches) if batch is not None]
    packed = [pack_batch(batch.scenes, size) for batch in prepared]
    files = [
        [
            picture.data
            for scene in batch.scenes
            for picture in (*scene.pictures, *(p for v in scene.views for p in v.layers))
        ]
        for batch in prepared
    ]
    encoded = itertools.cycle(files)
    names = list(input_layouts(2))
    tables = np.empty((2, count, size, size), np.int32)

    def cpu_ms(works: dict[str, Any], repeats: int = 5) -> dict[str, float]:
        """Least CPU time of one pair's part of each work, in ms; in turns, for other jobs come and go."""
        spent = {name: float("inf") for name in works}
        for name, work in [*works.items()] * repeats:
            started = time.process_time()
            work()
            spent[name] = min(spent[name], 1e3 * (time.process_time() - started) / count)
        return spent

    def graph(stages: list[str]) -> Any:
        """A function that runs one batch of every kind through a warm pipeline with these stages only."""
        arrays = [list(inputs) for inputs in packed]
        for inputs, v in itertools.product(arrays, (0, 1)):
            at = names.index(f"view_{v}.flags"), names.index(f"view_{v}.numbers")
            flags, numbers = (inputs[k].copy() for k in at)  # type: ignore[attr-defined]
            for names_off, values in (STAGES[stage] for stage in STAGES if stage not in stages):
                flags[:, [FLAGS.index(name) for name in names_off]] = False
                for name, value in values.items():
                    numbers[:, SLOTS[name]] = value
            if "place" not in stages:
                inputs[names.index("scene_flags")] = np.array([[True, False, False]] * BATCH)
                flags[:, FLAGS.index("as_plain")] = True
            inputs[at[0]], inputs[at[1]] = flags, numbers
        batches = itertools.cycle(arrays)
        # Nothing is computed ahead: all work for a batch falls between two readings of the clock.
        pipeline = build_pipeline(
            lambda: next(batches),
            views=2,
            size=size,
            batch_size=BATCH,
            threads=1,
            device="cpu",
            prefetch=1,
        )
        pipeline.build()
        pipeline.run()
        return lambda: [pipeline.run() for _ in arrays]

    def compose() -> list[tuple[ComposedView, ComposedView]]:
        grid = (size, size)
        shapes = [scene.pictures[0].shape for batch in prepared for scene in batch.scenes]
        return [
            (pair.query_program.composed(shape, grid), pair.reference_program.composed(shape, grid))
            for pair, shape in zip(flat, shapes, strict=True)
        ]

    arenas = [Arena() for _ in prepared]  # used again, as the loaders do

    def arrays() -> None:
        for batch, arena in zip(prepared, arenas, strict=True):
            arena.clear()
            pack_batch(batch.scenes, size, arena.empty)

    decoder = build_decoder(lambda: next(encoded), batch_size=max(map(len, files)), device="cpu")
    decoder.build()
    made = compose()
    order = list(STAGES)
    whole = graph(order)
    host = {
        "host: read": lambda: [read_picture(pair.query_path) for pair in flat],
        "host: sample": lambda: [next(pairs(photographs)) for _ in batches],
        "host: compose": compose,
        "host: tables": lambda: trace_pairs(made, (size, size), *tables),
        "host: arrays": arrays,
    }
    ends = {
        "decode": lambda: [decoder.run() for _ in prepared],  # the pictures of layers too
        "resize": graph([]),  # and normalise
        **{order[k]: graph(order[: k + 1]) for k in range(len(order) - 1)},
        order[-1]: whole,
    }
    parts = cpu_ms(host | ends)
    before = 0.0
    for name in ends:
        parts[name], before = parts[name] - before, parts[name]
    loader.close()
    outside = sum(parts[name] for name in host)
    for name, value in [*parts.items(), ("host", outside), ("graph", before), ("all", outside + before)]:
        print(f"{name:>14} {value:7.2f} ms a pair {100 * value / (outside + before):6.1f} %")
        benchmark.extra_info[f"cpu_ms_{name.replace(': ', '_')}"] = round(value, 2)
    benchmark.pedantic(whole, rounds=3, iterations=1)


@pytest.mark.parametrize("size", [224])
def test_pictures(benchmark: Any, photographs: list[Path], size: int) -> None:
    """The evaluation's plain resize, one thread."""

    # Endless, so that building the pipeline is not in the rate.
    options = LoaderOptions(size=size, batch_size=BATCH, threads=1)
    loader = PictureLoader(photographs * 64, options, on_broken=lambda path, reason: pytest.fail(reason))
    batches = iter(loader)
    for _ in range(6):
        indices, pictures = next(batches)
        assert pictures.shape == (len(indices), 3, size, size)
    benchmark.pedantic(lambda: next(batches), rounds=ROUNDS, iterations=BATCHES)
    benchmark.extra_info["pictures_per_second"] = round(BATCH / benchmark.stats["median"], 1)
    batches.close()  # type: ignore[attr-defined]
