"""Search of 25,000 queries among a million references: seconds, memory and recall, exact and approximate.

    python -m benchmarks.scale --folder scale                    25,000 x 1,000,000 x 512, minutes of a core
    python -m benchmarks.scale --folder small --references 50000 --queries 500                          a look

The rows are made up: 64 numbers drawn around one of 20,000 centres, spread over the columns, and some noise. They are
written once as a series of memory-mapped files, as ``copynce extract`` leaves them. What is printed as memory is what
the process holds beside mapped files and beyond what it held before the search; seconds are those of the clock and, as
``cpu``, those of the processor.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.errors import DataError
from copynce.provenance import processor_name
from copynce.retrieval.approximate import ApproximateSearch
from copynce.retrieval.features import Features, FeatureStore, read_features, write_features
from copynce.retrieval.search import normalised, search

PART = 8192


def make(folder: Path, name: str, rows: int, columns: int, seed: int) -> Features:
    """The features, made if they are not there."""
    try:
        found = read_features(folder, side=name).features
        if found.values.shape == (rows, columns):
            return found
    except (DataError, FileNotFoundError):
        pass
    shared = np.random.default_rng(0)
    centres = shared.normal(size=(20_000, 64)).astype(np.float32)
    spread = shared.normal(size=(64, columns)).astype(np.float32) / 8
    store = FeatureStore(folder, name, "made up")
    for part, start in enumerate(range(0, rows, PART)):
        generator = np.random.default_rng([seed, part])
        count = min(PART, rows - start)
        drawn: NDArray[Any] = centres[generator.integers(len(centres), size=count)]
        drawn = (drawn + 0.7 * generator.normal(size=drawn.shape)) @ spread
        drawn += 0.1 * generator.normal(size=drawn.shape)
        names = [f"{name[0].upper()}{start + i:07d}" for i in range(count)]
        write_features(store.path(part), Features(names, normalised(drawn)), {}, last=start + PART >= rows)
    store.remove_after(-(-rows // PART))
    return read_features(folder, side=name).features


def anonymous_mb() -> float:
    """Memory of this process that is no file, in MB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


@contextmanager
def watched() -> Iterator[Callable[[], float]]:
    """The most memory since the block began, in MB beyond what it began with."""
    before = anonymous_mb()
    most, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], anonymous_mb())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most[0] - before
    finally:
        over.set()
        thread.join()


def seconds(name: str, begin: float, cpu: float) -> dict[str, object]:
    return {f"{name}_s": round(time.monotonic() - begin, 1), f"{name}_cpu_s": round(time.process_time() - cpu, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the features are kept")
    parser.add_argument("--queries", type=int, default=25_000)
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--only", choices=["exact", "approximate"], help="one of the two")
    options = parser.parse_args()
    query = make(options.folder, "query", options.queries, options.columns, 1)
    reference = make(options.folder, "reference", options.references, options.columns, 2)
    row: dict[str, object] = {
        "queries": options.queries,
        "references": options.references,
        "columns": options.columns,
        "k": options.k,
        "references_mb": round(options.references * options.columns * 4 / 2**20),
        "processor": processor_name(),
    }

    def told(done: int) -> None:
        print(f"{done} of {options.queries} queries, {time.monotonic() - begin:.0f} s", flush=True)

    if options.only != "approximate":
        with watched() as most:
            begin, cpu = time.monotonic(), time.process_time()
            search(query.values, reference.values, options.k, progress=told)
            row |= seconds("exact", begin, cpu) | {"exact_mb": round(most())}
    if options.only != "exact":
        with watched() as most:
            begin, cpu = time.monotonic(), time.process_time()
            index = ApproximateSearch(reference.values, options.k)
            row |= seconds("index", begin, cpu)
            begin, cpu = time.monotonic(), time.process_time()
            index(query.values)
            row |= seconds("approximate", begin, cpu) | {"approximate_mb": round(most())}
        row |= {"lists": index.lists, "code_bytes": index.code, "recall": round(index.recall(query.values), 4)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
