"""Memory and open file handles of the training pipeline, epoch by epoch: both must stay flat.

    python -m benchmarks.leaks DATA [--epochs 3] [--size 224] [--batch-size 64] [--threads 1] [--processes 0] \
        [--json leaks.json]

DATA is what ``data.train`` takes: a folder, a CSV or tar shards. One loader runs through all epochs with the full
descriptor policy, as in training; after each epoch what the C heap has free is handed back to the system and the
process is measured, with its workers: own memory, resident or swapped out, and what they share, without the pages of
program files, which come and go as the system needs room. The exit status is 1 if that has grown by more than 2 % from
the end of the first epoch to that of the last, or if there are more handles.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from copynce.data import Quarantine, read_manifest
from copynce.data.pairs import DescriptorPairs, PairSampler
from dali_pipelines import LoaderOptions, PairLoader

#: The share by which memory may grow: allocators and DALI's buffers settle on the largest pictures met.
LIMIT = 0.02

#: Batches after the last epoch, so that as many are on their way at its end as at the end of the first.
_AHEAD = 8


def own_mib() -> float:
    """Memory of this process and its workers in MiB, resident or swapped out, without what its C heap holds free."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    owner, *workers = (_status(pid) for pid in _processes())
    shared = max(owner["RssShmem"], sum(status["RssShmem"] for status in workers))
    return (shared + sum(status["RssAnon"] + status["VmSwap"] for status in (owner, *workers))) / 1024


def open_handles() -> int:
    """Number of file descriptors of this process and its workers that stay open: the least of several looks.

    The loader reads the next pictures meanwhile, and each is open for a moment.
    """
    counts = []
    for _ in range(20):
        counts.append(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in _processes()))
        time.sleep(0.01)
    return min(counts)


def _processes() -> list[int]:
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid is not None)]


def _status(pid: int) -> dict[str, int]:
    """Sizes in KiB, by the kernel's names."""
    lines = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(value.split()[0]) for name, value in lines if value.endswith(" kB")}


def measure(
    data: str, *, epochs: int, size: int, batch_size: int, threads: int, processes: int
) -> list[dict[str, float]]:
    """One row per epoch: mib, handles, pairs, seconds, broken."""
    manifest = read_manifest(data)
    plan = DescriptorPairs(manifest, "descriptor", seed=0)
    sampler = PairSampler(plan, batch_size, seed=0)
    quarantine = Quarantine()
    rows: list[dict[str, float]] = []
    with PairLoader(
        sampler.batches(0, epochs * sampler.steps_per_epoch + _AHEAD),
        manifest.paths,
        LoaderOptions(size=size, batch_size=batch_size, threads=threads),
        substitute=plan.substitute,
        on_broken=quarantine.add,
        processes=processes,
    ) as loader:
        batches = iter(loader)
        for _ in range(epochs):
            started, pairs = time.perf_counter(), 0
            for _ in range(sampler.steps_per_epoch):
                pairs += len(next(batches).uuids)
            row = {"mib": own_mib(), "handles": open_handles(), "pairs": pairs}
            rows.append({**row, "seconds": time.perf_counter() - started, "broken": len(quarantine)})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description="Memory and file handles of the training pipeline over epochs.")
    parser.add_argument("data", help="a folder, a CSV or tar shards")
    parser.add_argument("--epochs", type=int, default=3, help="at least 2 (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs per batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="DALI's CPU threads (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=0, help="workers that prepare (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error(f"--epochs must be at least 2, got {options.epochs}")
    rows = measure(
        options.data,
        epochs=options.epochs,
        size=options.size,
        batch_size=options.batch_size,
        threads=options.threads,
        processes=options.processes,
    )
    for epoch, row in enumerate(rows, start=1):
        print(
            f"epoch {epoch}: {row['mib']:.1f} MiB, {row['handles']} handles, {row['pairs']} pairs in "
            f"{row['seconds']:.1f} s, {row['broken']} broken pictures"
        )
    growth = rows[-1]["mib"] / rows[0]["mib"] - 1
    opened = rows[-1]["handles"] - rows[0]["handles"]
    print(f"memory {growth:+.2%} from the end of the first epoch to the end of the last, handles {opened:+}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(growth > LIMIT or opened > 0)


if __name__ == "__main__":
    sys.exit(main())
