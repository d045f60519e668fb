"""An index under kills: `copynce index add`, killed at random moments again and again, loses and doubles nothing.

    python -m benchmarks.index_kills --count 100 [--writers 1] [--pictures 48] [--seed 0] [--json kills.json]

A tiny random model describes tiny pictures, two a transaction, so that many kills fall into writing; the index is also
compacted on the way. The writers are forks of this process, which has imported everything; after a transaction each
leaves the number of pictures that it reports as done. SIGKILL hits all of them. Then the index must open, hold every
picture that was reported, none twice, and the command goes on; a picture is changed now and then. Once an index is
whole, every row must be that of its file (content, size, descriptor); then the next one is begun. Printed are the
kills, where they fell, and what was wrong; the exit status is 1 if anything was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import copynce.index.index  # before the forks
from copynce.data.synthetic import make_pictures
from copynce.files import file_sha256
from copynce.index.table import PictureTable
from copynce.models import build_descriptor, save_checkpoint
from dali_pipelines.graph import build_pipeline

#: Seconds after which a writer that was not killed has failed.
PATIENCE = 600.0

_SETTINGS: dict[str, Any] = {"batch_size": 2, "block": 2, "threads": 1, "precision": "fp32", "device": "cpu"}


def make(folder: Path, pictures: int) -> tuple[Path, Path]:
    """(pictures, weights of a tiny random model)."""
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    save_checkpoint(folder / "tiny.safetensors", build_descriptor(img_size=32, dim=16, backbone_options=options))
    make_pictures(folder / "pictures", pictures, seed=5, side_px=(32, 48))
    # Defined and not built: a fork would have none of its threads.
    build_pipeline(lambda: [], views=1, size=32, batch_size=2, threads=1, device="cpu")
    return folder / "pictures", folder / "tiny.safetensors"


def start(work: Callable[[], object], told: Path) -> int:
    """A fork that does this, and writes what goes wrong; its process id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(told, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def add(index: Path, pictures: Path, weights: Path, reported: Path) -> None:
    """What a writer does; `reported` receives how many pictures it has reported as done, after each transaction."""
    reported.write_bytes(b"")

    def report(done: int, total: int) -> None:
        with reported.open("ab") as file:
            file.write(b"%d\n" % done)

    copynce.index.index.Index(index, weights, **_SETTINGS).add(pictures, progress=report)


def look(index: Path, out: Path) -> None:
    """Leave what the index holds: its rows but for the descriptors, and these."""
    table = PictureTable.open(str(index))
    rows = [] if table is None else table.columns(["path", "sha256", "size"]).to_pylist()
    out.with_suffix(".json").write_text(json.dumps(rows))
    np.save(out.with_suffix(".npy"), np.empty((0, 0)) if table is None else table.descriptors()[1])


def ended(processes: list[int], seconds: float) -> list[int]:
    """The exit statuses of those that have ended by then; they leave the list."""
    statuses, end = [], time.monotonic() + seconds
    while processes:
        for process in list(processes):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                processes.remove(process)
                statuses.append(os.waitstatus_to_exitcode(status))
        if time.monotonic() > end:
            break
        time.sleep(0.002)
    return statuses


class Run:
    """One index that is killed until it is whole."""

    def __init__(self, folder: Path, pictures: Path, weights: Path, writers: int) -> None:
        self.folder, self.index, self._writers = folder, folder / "index", writers
        self._pictures, self._weights = pictures, weights
        folder.mkdir()
        self._told = folder / "told.txt"

    def go(self, seconds: float) -> tuple[bool, list[int]]:
        """Start the writers and kill them after so long: whether there were any left, and how the others ended."""
        processes = [
            start(partial(add, self.index, self._pictures, self._weights, self._reported(n)), self._told)
            for n in range(self._writers)
        ]
        statuses = ended(processes, seconds)
        killed = bool(processes)
        for process in processes:
            os.kill(process, signal.SIGKILL)
        ended(processes, PATIENCE)
        return killed, statuses

    def _reported(self, writer: int) -> Path:
        return self.folder / f"reported-{writer}"

    def reported(self) -> int:
        """Pictures that the writers of the last start reported, the most of one: all are given the same."""
        lines = [file.read_bytes().split(b"\n")[:-1] for file in self.folder.glob("reported-*")]
        return max((int(found[-1]) for found in lines if found), default=0)

    def forget_reports(self) -> None:
        for file in self.folder.glob("reported-*"):
            file.unlink()

    def held(self) -> tuple[list[dict[str, Any]], np.ndarray]:
        """(rows, descriptors) of the index as a new process finds them."""
        out = self.folder / "held"
        if ended([start(lambda: look(self.index, out), self._told)], PATIENCE) != [0]:
            raise RuntimeError(f"the index cannot be read; {self._told} tells more")
        return json.loads(out.with_suffix(".json").read_text()), np.load(out.with_suffix(".npy"))


def faults(rows: list[dict[str, Any]], descriptors: np.ndarray, expected: dict[str, np.ndarray]) -> list[str]:
    """What is wrong with the rows of a whole index; expected: {SHA-256: descriptor}, of which files may be."""
    wrong = []
    for row, descriptor in zip(rows, descriptors, strict=True):
        digest = file_sha256(row["path"])
        if row["sha256"] != digest or row["size"] != os.path.getsize(row["path"]):
            wrong.append(f"{row['path']} is another file")
        # Sums of other batches may differ in their last digits.
        elif digest in expected and float(descriptor @ expected[digest]) < 1 - 1e-5:
            wrong.append(f"{row['path']} has another descriptor")
    return wrong


def measure(folder: Path, *, count: int, writers: int, pictures: int, seed: int) -> dict[str, Any]:
    """Kill `count` times in all; what happened."""
    warnings.filterwarnings("ignore", message="lancedb fork support")  # nothing of it has run before a fork
    torch.set_num_threads(1)
    draw = random.Random(seed)
    source, weights = make(folder, pictures)
    names = {os.path.abspath(path) for path in source.iterdir()}
    begun = time.monotonic()
    whole = Run(folder / "whole", source, weights, writers)
    _, statuses = whole.go(PATIENCE)
    duration = time.monotonic() - begun
    rows, descriptors = whole.held()
    if any(statuses) or {row["path"] for row in rows} != names:
        raise SystemExit(f"the undisturbed start ended with {statuses}; {folder}/whole/told.txt tells more")
    expected = {row["sha256"]: descriptor for row, descriptor in zip(rows, descriptors, strict=True)}
    originals = {path: Path(path).read_bytes() for path in sorted(names)}
    report: dict[str, Any] = {"kills": 0, "indexes": 0, "lost": 0, "double": 0, "wrong": []}
    moments: Counter[str] = Counter()
    while report["kills"] < count:
        run = Run(folder / f"run-{report['indexes']}", source, weights, writers)
        before = 0  # rows that must be there
        while True:
            run.forget_reports()
            last = report["kills"] >= count
            killed, statuses = run.go(PATIENCE if last else draw.uniform(0, 0.9 * duration))
            report["wrong"] += [f"a writer ended with {status}" for status in statuses if status]
            rows, descriptors = run.held()
            paths = [row["path"] for row in rows]
            report["double"] += len(paths) - len(set(paths))
            report["lost"] += max(0, before + (run.reported() if writers == 1 else 0) - len(paths))
            if not killed:
                break
            report["kills"] += 1
            moments["before the first row" if not rows else "between rows" if len(rows) < len(names) else "after"] += 1
            if rows and draw.random() < 0.3:
                changed = Path(draw.choice(sorted(paths)))
                # With its own content it would count below as a row that is there, and be reported as made anew too.
                others = [originals[name] for name in sorted(names) if originals[name] != changed.read_bytes()]
                changed.write_bytes(draw.choice(others))
            # Rows that are to be made anew will be reported, and add none.
            before = sum(row["sha256"] == file_sha256(row["path"]) for row in rows)
        if set(paths) != names:
            report["lost"] += len(names - set(paths))
        report["wrong"] += faults(rows, descriptors, expected)
        report["indexes"] += 1
        if report["wrong"] or report["lost"] or report["double"]:
            break
        for path, content in originals.items():
            Path(path).write_bytes(content)
        shutil.rmtree(run.folder)
    return {**report, "moments": dict(moments), "seconds_undisturbed": duration}


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, compare, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="kills in all (default: %(default)s)")
    parser.add_argument("--writers", type=int, default=1, help="that add the same at once (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=48, help="of an index (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args(arguments)
    if min(options.count, options.writers, options.pictures - 1) < 1:
        parser.error("--count and --writers must be at least 1, --pictures at least 2")
    folder = Path(tempfile.mkdtemp(prefix="index-kills-"))
    result = measure(folder, count=options.count, writers=options.writers, pictures=options.pictures, seed=options.seed)
    where = ", ".join(f"{number} {name}" for name, number in sorted(result["moments"].items()))
    print(
        f"{options.writers} writers: {result['kills']} kills over {result['indexes']} indexes ({where}); "
        f"{result['lost']} pictures lost, {result['double']} double, {len(result['wrong'])} faults"
    )
    for line in result["wrong"][:20]:
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    bad = bool(result["lost"] or result["double"] or result["wrong"])
    if bad:
        print(f"what was left lies in {folder}")
    else:
        shutil.rmtree(folder)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
