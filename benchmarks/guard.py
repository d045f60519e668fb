"""The guard of the throughput: benchmark results against a stored baseline, on whatever machine both were taken.

    pytest benchmarks --benchmark-only --benchmark-json=bench.json
    python -m benchmarks.guard bench.json benchmarks/baselines/cpu.json           exit status 1 if something got slower
    python -m benchmarks.guard bench.json benchmarks/baselines/cpu.json --write   make it the baseline

Results are files of pytest-benchmark, or of ``python -m benchmarks.kernels --gpu --json``. Each benchmark counts by its
fastest round, the figure that other work on the machine disturbs least. Machines differ, so what is judged is a
benchmark's slowdown (new over stored) relative to the median slowdown of all: a machine that does everything in twice
the time passes, a benchmark that falls behind the others does not. ``--same-machine`` judges the slowdown itself. A
benchmark that the baseline has and the results lack counts as missed; new ones are listed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

#: Times of one round vary by this much between runs on a shared machine.
SLOWDOWN = 1.3


def fastest_rounds(path: Path) -> dict[str, float]:
    """Seconds of the fastest round of each benchmark in a results file; ``ValueError`` naming a file without any."""
    try:
        found = {row["fullname"]: float(row["stats"]["min"]) for row in _read(path)["benchmarks"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file of pytest-benchmark: {error!r}") from None
    if not found:
        raise ValueError(f"{path} holds no benchmark")
    return found


def read_baseline(path: Path) -> dict[str, float]:
    """Seconds by benchmark of a stored baseline."""
    try:
        return {name: float(seconds) for name, seconds in _read(path)["seconds"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no baseline: {error!r}") from None


def write_baseline(results: Path, path: Path) -> None:
    """Store the fastest rounds of a results file, with what it says of its machine; replaces ``path`` as a whole."""
    about = _read(results)
    machine = about.get("machine_info", {})
    cpu = machine.get("cpu", {})
    stored = {
        "machine": machine.get("gpu") or f"{cpu.get('brand_raw', 'unknown')}, {cpu.get('count', '?')} cores",
        "commit": about.get("commit_info", {}).get("id"),
        "datetime": about.get("datetime"),
        "seconds": dict(sorted(fastest_rounds(results).items())),
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(stored, indent=1) + "\n")
    os.replace(temporary, path)


def slowdowns(
    results: dict[str, float], baseline: dict[str, float], *, same_machine: bool = False
) -> tuple[float, dict[str, float]]:
    """(median slowdown of all shared benchmarks, slowdown of each relative to it).

    With ``same_machine`` the first is 1. ``ValueError`` if the two share no benchmark.
    """
    raw = {name: results[name] / seconds for name, seconds in baseline.items() if name in results}
    if not raw:
        raise ValueError("results and baseline share no benchmark")
    pace = 1.0 if same_machine else statistics.median(raw.values())
    return pace, {name: ratio / pace for name, ratio in raw.items()}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("baseline", type=Path, help="stored baseline")
    parser.add_argument("--write", action="store_true", help="store the results as the baseline")
    parser.add_argument("--slowdown", type=float, default=SLOWDOWN, help=f"what is too slow (default {SLOWDOWN:g})")
    parser.add_argument("--same-machine", action="store_true", help="judge times themselves")
    given = parser.parse_args(arguments)
    try:
        if given.write:
            write_baseline(given.results, given.baseline)
            return 0
        results, baseline = fastest_rounds(given.results), read_baseline(given.baseline)
        pace, relative = slowdowns(results, baseline, same_machine=given.same_machine)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    missing = sorted(baseline.keys() - results.keys())
    slow = sorted((name for name, ratio in relative.items() if ratio > given.slowdown), key=lambda n: -relative[n])
    print(f"{len(relative)} benchmarks, in the median {pace:.2f} times the baseline's time")
    for name in sorted(results.keys() - baseline.keys()):
        print(f"new        {name}")
    for name in missing:
        print(f"missing    {name}")
    for name in slow:
        times = f"{1e3 * baseline[name]:.3g} -> {1e3 * results[name]:.3g} ms"
        print(f"slower     {name}: {relative[name]:.2f} times ({times})")
    return 1 if slow or missing else 0


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
