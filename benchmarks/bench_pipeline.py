"""Pairs per second of the training pipeline and pictures per second of the evaluation pipeline, on one core.

    pytest benchmarks/bench_pipeline.py --benchmark-only --benchmark-json=pipeline.json

Photographs are imitated by JPEGs of about 500 x 375 pixels and 40 kB, made on the fly. A round is one batch of 64 pairs
after warm-up, on so many pinned cores; ``extra_info`` in the JSON file carries the rate, CPU milliseconds a pair, and
where they go: the host's own work (files, plans, weights, tables), decoding, and each stage of the graph.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from copynce.pixtrace import EditProgram, sample_program
from dali_pipelines import Pair, PairLoader, PictureLoader
from dali_pipelines.loaders import MEAN, STD
from dali_pipelines.views import feed

PICTURES, BATCH, ROUNDS = 128, 64, 8


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
            programs = [
                sample_program("descriptor", seed=0, epoch=epoch, uuid=path.name) for path in paths[i : i + BATCH]
            ]
            yield [
                Pair(path, program, path, EditProgram(), label=True, uuid=path.name)
                for path, program in zip(paths[i : i + BATCH], programs, strict=True)
            ]


def pair_loader(paths: list[Path], size: int, threads: int) -> PairLoader:
    return PairLoader(
        pairs(paths),
        paths,
        size=size,
        batch_size=BATCH,
        threads=threads,
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
            assert first["query"].shape == first["reference"].shape == (BATCH, 3, size, size)
            assert (first["query_to_reference"] >= 0).any(dim=(1, 2)).float().mean() > 0.9
            for _ in range(6):  # empty what was prepared ahead
                next(batches)
            started, cpu = time.perf_counter(), time.process_time()
            benchmark.pedantic(lambda: next(batches), rounds=ROUNDS, iterations=1)
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    finally:
        os.sched_setaffinity(0, before)
    count = ROUNDS * BATCH
    benchmark.extra_info |= {
        "pairs_per_second": round(count / wall, 1),
        "pairs_per_second_and_core": round(count / wall / cores, 1),
        "cpu_ms_per_pair": round(1e3 * cpu / count, 2),
    }


@pytest.mark.parametrize("size", [224])
def test_where_the_time_goes(benchmark: Any, photographs: list[Path], size: int) -> None:
    """CPU ms a pair: host, decoding alone, the whole graph, and what it saves when one stage is switched off."""
    from dali_pipelines.graph import build_decoder, build_pipeline
    from dali_pipelines.views import input_table

    batches = list(itertools.islice(pairs(photographs), 4))
    loader = pair_loader(photographs, size, threads=1)
    prepared = [batch for batch in (loader._prepare(pairs) for pairs in batches) if batch is not None]
    fed = [feed(batch.scenes, size) for batch in prepared]
    files = [scene.pictures[0].data for batch in prepared for scene in batch.scenes]
    names = list(input_table(2))

    def cpu_ms(work: Any, count: int, repeats: int = 4) -> float:
        """Least CPU time of one of ``count`` equal parts of ``work``, in ms."""
        spent = []
        for _ in range(repeats):
            started = time.process_time()
            work()
            spent.append(time.process_time() - started)
        return round(1e3 * min(spent) / count, 2)

    def graph(off: str | None = None) -> Any:
        """A function that runs one batch of every kind through a warm pipeline."""
        arrays = [list(inputs) for inputs in fed]
        for inputs, v in itertools.product(arrays, (0, 1)):
            if off is not None:
                inputs[names.index(f"view_{v}.{off}")] = np.zeros(BATCH, bool)
        feeds = itertools.cycle(arrays)
        pipeline = build_pipeline(
            lambda: next(feeds), views=2, size=size, batch_size=BATCH, threads=1, device="cpu", normalize=(MEAN, STD)
        )
        pipeline.build()
        pipeline.run()
        return lambda: [pipeline.run() for _ in arrays]

    files_again = itertools.cycle(files)
    decoder = build_decoder(lambda: [next(files_again)], device="cpu")
    decoder.build()
    count = BATCH * len(fed)
    whole = cpu_ms(graph(), count)
    parts = {
        "host_plans_and_tables": cpu_ms(lambda: [loader._prepare(batch) for batch in batches], count),
        "host_arrays": cpu_ms(lambda: [feed(batch.scenes, size) for batch in prepared], count),
        "decode_alone": cpu_ms(lambda: [decoder.run() for _ in files], count),
        "graph": whole,
    }
    for stage in ("blend", "paint", "colour", "effects", "blur", "jpeg", "erase"):
        parts[f"graph_saves_without_{stage}"] = round(whole - cpu_ms(graph(stage), count), 2)
    loader.close()
    benchmark.extra_info |= {f"cpu_ms_{name}": value for name, value in parts.items()}
    benchmark.pedantic(graph(), rounds=3, iterations=1)


@pytest.mark.parametrize("size", [224])
def test_pictures(benchmark: Any, photographs: list[Path], size: int) -> None:
    """The evaluation's plain resize, one thread."""

    # Endless, so that building the pipeline is not in the rate.
    loader = PictureLoader(
        photographs * 64, size=size, batch_size=BATCH, threads=1, on_broken=lambda path, reason: pytest.fail(reason)
    )
    batches = iter(loader)
    for _ in range(6):
        indices, pictures = next(batches)
        assert pictures.shape == (len(indices), 3, size, size)
    benchmark.pedantic(lambda: next(batches), rounds=ROUNDS, iterations=1)
    benchmark.extra_info["pictures_per_second"] = round(BATCH / benchmark.stats["median"], 1)
    batches.close()  # type: ignore[attr-defined]
