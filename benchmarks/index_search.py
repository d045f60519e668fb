"""Search of one picture's descriptor in an index of many: time cold and warm, memory, exact and IVF-PQ, recall@1.

    copynce index add real.index PICTURES --model runs/descriptor
    python -m benchmarks.index_search real.index --count 1000000 [--descriptor float16] [--json search.json]

The descriptors are those of a real index, each again and again with noise: cosines to the real one are drawn between .5
and .95, those of queries to a row of the index between .6 and .95. Each way of searching is one new process. Cold is
its first query, after imports, with the table's files taken out of the page cache; warm is the median of the next ones,
one after the other. Memory is the process' peak, and what it was before the first query. The picture's own description
is not part of it. recall@1: how often IVF-PQ's first has the score of the exact first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from copynce.index import Index
from copynce.index.searching import build_approximate
from copynce.index.table import PictureTable
from copynce.provenance import processor_name, running_commit

_BLOCK = 50_000  # rows made and written together
_MIB = 2**20


def near(rows: NDArray[np.float32], cosines: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float32]:
    """Unit vectors with these cosines [N] to unit `rows` [N, D]."""
    noise = draw.standard_normal(rows.shape, np.float32)
    noise -= (noise * rows).sum(1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return (cosines[:, None] * rows + np.sqrt(1 - cosines[:, None] ** 2) * noise).astype(np.float32)


def make(real: Path, place: Path, count: int, descriptor: str, queries: int, seed: int) -> NDArray[np.float32]:
    """An index of `count` rows around those of `real`; queries [N, D] around some of its rows."""
    origin = PictureTable.open(str(real))
    if origin is None:
        raise SystemExit(f"{real}: there is no index")
    start = origin.descriptors()[1].astype(np.float32)
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    draw = np.random.default_rng(seed)
    table = PictureTable.create(str(place), origin.model, descriptor)
    asked: list[NDArray[np.float32]] = []
    for first in range(0, count, _BLOCK):
        number = min(_BLOCK, count - first)
        rows = near(start[draw.integers(len(start), size=number)], draw.uniform(0.5, 0.95, number), draw)
        share = queries * (first + number) // count - queries * first // count
        chosen = draw.choice(number, share, replace=False)
        asked.append(near(rows[chosen], draw.uniform(0.6, 0.95, share), draw))
        names = [f"/archive/{(first + i) // 1000:06d}/{first + i:09d}.jpg" for i in range(number)]
        # Not by `put`: all are known to be new, and nobody else is here.
        ones = np.ones(number, np.int64)
        table.engine.add(rows_of(table, names, rows, ones, ones))
    table.compact()
    return np.concatenate(asked)


def rows_of(
    table: PictureTable,
    names: list[str],
    descriptors: NDArray[np.float32],
    size: NDArray[np.int64],
    mtime_ns: NDArray[np.int64],
) -> pa.Table:
    """Rows as the table has them, of files with these paths, sizes and times [N]; what else it notes is made up."""
    kind = table.schema.field("descriptor").type
    values = pa.array(descriptors.astype(kind.value_type.to_pandas_dtype()).ravel())
    constant = {"sha256": "0" * 64, "width": 1, "height": 1, "model": "0" * 64}
    columns: dict[str, Any] = {name: [value] * len(names) for name, value in constant.items()}
    columns |= {"id": names, "path": names, "size": size, "mtime_ns": mtime_ns}
    columns["taken"] = pa.nulls(len(names), pa.timestamp("s"))
    columns["descriptor"] = pa.FixedSizeListArray.from_arrays(values, kind.list_size)
    return pa.table(columns).select(table.schema.names).cast(table.schema)


def forget(place: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for file in place.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ask(place: Path, queries: Path, out: Path, exact: bool) -> None:
    """One way of searching, in this process; leaves what was measured, and the scores of the first found."""
    asked = np.load(queries)
    index = Index(place, memory_gib=1e6 if exact else 0.0)
    before = _resident()
    seconds, scores = [], []
    for query in asked:
        begun = time.perf_counter()
        found = index.nearest(query[None], 1)
        seconds.append(time.perf_counter() - begun)
        scores.append(float(found.scores[0, 0]))
    told = {"cold_s": seconds[0], "warm_s": float(np.median(seconds[1:])), "before_mib": before, "peak_mib": _peak()}
    out.write_text(json.dumps({**told, "scores": scores}))


def measure(real: Path, folder: Path, count: int, descriptor: str, queries: int, seed: int) -> dict[str, Any]:
    """Make the index, search it both ways; what was measured."""
    place = folder / "index"
    begun = time.monotonic()
    np.save(folder / "queries.npy", make(real, place, count, descriptor, queries, seed))
    made, begun = time.monotonic() - begun, time.monotonic()
    table = PictureTable.open(str(place))
    assert table is not None, "made above"
    recall = build_approximate(table)
    built = time.monotonic() - begun
    found: dict[str, Any] = {
        "rows": count,
        "dim": table.schema.field("descriptor").type.list_size,
        "descriptor": descriptor,
        "queries": queries,
        "folder_mib": table.bytes() / _MIB,
        "make_s": made,
        "build_s": built,
        "recall_at_10_noted": recall,
        "machine": processor_name(),
        "commit": running_commit(),
    }
    scores = {}
    for way in ("exact", "ivf_pq") if recall is not None else ("exact",):
        forget(place)
        out = folder / f"{way}.json"
        command = [sys.executable, "-m", "benchmarks.index_search", str(place), "--ask", way, "--out", str(out)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        found[way] = json.loads(out.read_text())
        scores[way] = np.array(found[way].pop("scores"))
    if "ivf_pq" in scores:
        found["recall_at_1"] = float((scores["ivf_pq"] >= scores["exact"] - 1e-6).mean())
    return found


def _resident() -> float:
    """MiB of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / _MIB


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", type=Path, metavar="INDEX", help="whose descriptors are the real ones")
    parser.add_argument("--count", type=int, default=1_000_000, help="rows (default: %(default)s)")
    parser.add_argument("--descriptor", choices=("float32", "float16"), default="float32", help="kept numbers")
    parser.add_argument("--queries", type=int, default=200, help="one after the other (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the index is made, and removed at the end (default: /tmp)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--ask", choices=("exact", "ivf_pq"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.ask is not None:
        ask(options.real, options.real.parent / "queries.npy", options.out, options.ask == "exact")
        return 0
    if not 2 <= options.queries <= options.count:
        parser.error("--queries must be at least 2 and at most --count")
    folder = Path(tempfile.mkdtemp(prefix="index-search-", dir=options.folder)).absolute()
    try:
        found = measure(options.real, folder, options.count, options.descriptor, options.queries, options.seed)
    finally:
        shutil.rmtree(folder)
    kept = f"{found['rows']} rows of {found['dim']} {found['descriptor']} numbers"
    print(f"{kept}, {found['folder_mib']:.0f} MiB on the disk")
    for way in ("exact", "ivf_pq"):
        if way in found:
            one = found[way]
            print(
                f"{way:7} cold {one['cold_s']:.2f} s, warm {1000 * one['warm_s']:.1f} ms, "
                f"memory {one['peak_mib']:.0f} MiB ({one['before_mib']:.0f} before the first query)"
            )
    if "recall_at_1" in found:
        print(f"IVF-PQ built in {found['build_s']:.0f} s; recall@1 {found['recall_at_1']:.3f} of exact")
    else:
        print("too few rows for IVF-PQ")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
