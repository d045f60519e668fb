"""The guard of throughput and kernels: results against a stored baseline of the same machine.

    pytest benchmarks --benchmark-only --benchmark-json=bench.json      or one file of benchmarks
    python -m benchmarks.guard bench.json benchmarks/baselines/cpu.json
    python -m benchmarks.guard bench.json benchmarks/baselines/cpu.json --write     make it the baseline

    python -m benchmarks.kernels --aot --json before.json               then change a kernel, and
    python -m benchmarks.kernels --aot --json after.json
    python -m benchmarks.guard after.json before.json

Times come from pytest-benchmark, or from ``python -m benchmarks.kernels --gpu --json``. Each benchmark counts by its
fastest round, the figure that other work on the machine disturbs least. Times of another processor say nothing: a
baseline counts where model, number of cores and instruction sets (or the GPU) are the same. There a benchmark is slower
if its time is, or if it falls behind the others (its slowdown over the median slowdown of all). Only files of
benchmarks that ran are compared: of those, a benchmark that the baseline has and the results lack is missing; new ones
are listed. ``--write`` replaces those files' part in a baseline of the same machine.

What kernels compile to (``--aot``) depends on the compiler alone: registers, shared memory and instructions of each
kernel that changed stand side by side, and what is worse is named.

Exit status: 0 nothing worse, 1 something slower, worse or missing, 2 files that cannot be read, 3 a baseline of another
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

#: Times of one round vary by this much between runs on a shared machine.
SLOWDOWN = 1.3
#: Of a compiled kernel: what is worse if it grows, and what is worse if none is left.
COSTS = ("registers", "shared", "instructions", "stack", "local", "overwritten")
USES = ("mma", "wgmma", "cp_async", "vector_loads")
KERNEL = ("kernel", "arch", "patches", "channels", "gamma", "dtype")

Machine = dict[str, Any]


class Slowdowns(NamedTuple):
    """New time over stored time."""

    pace: float  # median of all
    each: dict[str, float]


def fastest_rounds(path: Path) -> dict[str, float]:
    """Seconds of the fastest round of each benchmark in a results file; ``ValueError`` naming a file without any."""
    try:
        found = {row["fullname"]: float(row["stats"]["min"]) for row in _read(path)["benchmarks"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file of pytest-benchmark: {error!r}") from None
    if not found:
        raise ValueError(f"{path} holds no benchmark")
    return found


def machine_of(path: Path) -> Machine:
    """What a results file says of the machine that its times depend on."""
    about = _read(path).get("machine_info", {})
    if "gpu" in about:
        return {"gpu": about["gpu"]}
    cpu = about.get("cpu", {})
    known = {"processor": cpu.get("brand_raw"), "family": cpu.get("family"), "model": cpu.get("model")}
    flags = " ".join(sorted(cpu.get("flags", ())))
    return {key: value for key, value in {**known, "cores": cpu.get("count"), "flags": flags}.items() if value}


def read_baseline(path: Path) -> dict[str, float]:
    """Seconds by benchmark of a stored baseline."""
    try:
        return {name: float(seconds) for name, seconds in _read(path)["seconds"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no baseline: {error!r}") from None


def other_machine(results: Path, baseline: Path) -> str | None:
    """Why a baseline says nothing about results, None if it does: all that it tells of its machine must be the same."""
    here, there = machine_of(results), _read(baseline).get("machine")
    if not isinstance(there, dict) or not there:
        return f"{baseline} does not say which machine it is of"
    different = [key for key in there if here.get(key) != there[key]]
    if not different:
        return None
    if different == ["flags"]:
        flags = [set(machine["flags"].split()) if "flags" in machine else set() for machine in (there, here)]
        return f"{baseline} is of a machine with other instruction sets: {', '.join(sorted(flags[0] ^ flags[1]))}"
    shown = [
        ", ".join(f"{key} {machine.get(key, '?')}" for key in different if key != "flags") for machine in (there, here)
    ]
    return f"{baseline} is of another machine: {shown[0]}; these results: {shown[1]}"


def write_baseline(results: Path, path: Path) -> None:
    """Store the fastest rounds of a results file with its machine; what an old baseline of the same machine has of
    other files of benchmarks stays. ``path`` is replaced as a whole."""
    about, new = _read(results), fastest_rounds(results)
    kept = read_baseline(path) if path.exists() and other_machine(results, path) is None else {}
    suites = {_suite(name) for name in new}
    stored = {
        "machine": machine_of(results),
        "commit": about.get("commit_info", {}).get("id"),
        "datetime": about.get("datetime"),
        "seconds": dict(sorted({**{n: s for n, s in kept.items() if _suite(n) not in suites}, **new}.items())),
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(stored, indent=1) + "\n")
    os.replace(temporary, path)


def slowdowns(results: dict[str, float], baseline: dict[str, float]) -> Slowdowns:
    """Slowdowns of the benchmarks that both have; ``ValueError`` if there is none."""
    each = {name: results[name] / seconds for name, seconds in baseline.items() if name in results}
    if not each:
        raise ValueError("results and baseline share no benchmark")
    return Slowdowns(statistics.median(each.values()), each)


def compare_times(results_path: Path, baseline_path: Path, slowdown: float) -> int:
    """Print how times differ; the exit status."""
    results, baseline = fastest_rounds(results_path), read_baseline(baseline_path)
    if (why := other_machine(results_path, baseline_path)) is not None:
        print(f"no baseline: {why}; make one here with --write", file=sys.stderr)
        return 3
    suites = {_suite(name) for name in results}
    baseline = {name: seconds for name, seconds in baseline.items() if _suite(name) in suites}
    pace, each = slowdowns(results, baseline)
    worse = {name: max(ratio, ratio / pace) for name, ratio in each.items()}
    slow = sorted((name for name in worse if worse[name] > slowdown), key=lambda name: -worse[name])
    missing = sorted(baseline.keys() - results.keys())
    print(f"{len(each)} benchmarks, in the median {pace:.2f} times the baseline's time")
    if pace > slowdown:
        print("everything is slower: repeat it on the idle machine before you look for a cause")
    for name in sorted(results.keys() - baseline.keys()):
        print(f"new        {name}")
    for name in missing:
        print(f"missing    {name}")
    for name in slow:
        times = f"{1e3 * baseline[name]:.3g} -> {1e3 * results[name]:.3g} ms"
        behind = f", {each[name] / pace:.2f} of the others" if each[name] / pace > slowdown else ""
        print(f"slower     {name}: {each[name]:.2f} times{behind} ({times})")
    return 1 if slow or missing else 0


def compare_kernels(after: Path, before: Path) -> int:
    """Print what kernels compiled to before and after, where it differs; the exit status."""
    new, old = _kernels(after), _kernels(before)
    worse: list[str] = []
    versions = [_read(path).get("versions", {}).get("triton") for path in (before, after)]
    if versions[0] != versions[1]:
        print(f"compiled by Triton {versions[0]} before, by {versions[1]} now")
    changed = [key for key in new if key in old and _numbers(new[key]) != _numbers(old[key])]
    names = [_kernel_name(key) for key in changed]
    width = max(map(len, names), default=0)
    for key, name in zip(changed, names, strict=True):
        pairs = {field: (old[key].get(field), new[key].get(field)) for field in (*COSTS, *USES)}
        shown = [
            f"{field} {f'{was:,}' if was == now else _change(was, now)}"
            for field, (was, now) in pairs.items()
            if was != now or (field in COSTS[:3] and was is not None)
        ]
        print(f"{name.ljust(width)}   {'   '.join(shown)}")
        for field, (was, now) in pairs.items():
            if was is not None and now is not None and (now > was if field in COSTS else was and not now):
                worse.append(f"{name}: {field} {_change(was, now)}")
    for field in ("bytes", "triton_launches", "aten_operators"):
        was, now = _counts(before, field), _counts(after, field)
        worse += [f"{name}: {_change(was[name], now[name])}" for name in now if name in was and now[name] > was[name]]
    print(f"{len(new.keys() & old.keys())} kernels in both, {len(changed)} changed")
    missing = [_kernel_name(key) for key in old if key not in new]
    for title, lines in (
        ("new", [_kernel_name(key) for key in new if key not in old]),
        ("missing", missing),
        ("worse", worse),
        ("bar", missed := _read(after).get("missed", [])),
    ):
        for line in lines:
            print(f"{title.ljust(10)} {line}")
    return 1 if missing or worse or missed else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of pytest-benchmark or of benchmarks.kernels")
    parser.add_argument("baseline", type=Path, help="stored baseline, or the JSON of --aot before a change")
    parser.add_argument("--write", action="store_true", help="store the times as the baseline")
    parser.add_argument("--slowdown", type=float, default=SLOWDOWN, help=f"what is too slow (default {SLOWDOWN:g})")
    given = parser.parse_args(arguments)
    try:
        if "kernels" in _read(given.results):
            if given.write:
                raise ValueError(f"{given.results} is its own baseline: keep the file")
            return compare_kernels(given.results, given.baseline)
        if given.write:
            write_baseline(given.results, given.baseline)
            return 0
        return compare_times(given.results, given.baseline, given.slowdown)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _suite(name: str) -> str:
    """The file of a benchmark; times of a GPU are one suite."""
    return name.rpartition("::")[0]


def _kernels(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    try:
        return {tuple(row[field] for field in KERNEL): row for row in _read(path)["kernels"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of benchmarks.kernels --aot --json: {error!r}") from None


def _numbers(row: dict[str, Any]) -> list[Any]:
    return [row.get(field) for field in (*COSTS, *USES)]


def _kernel_name(key: Iterable[Any]) -> str:
    kernel, arch, patches, channels, gamma, dtype = key
    return f"{kernel} sm_{arch} L={patches} D={channels} gamma={gamma:g} {dtype}"


def _counts(path: Path, field: str) -> dict[str, float]:
    found = _read(path).get(field, {})
    if isinstance(found, dict):
        return {f"bytes of {name}": number for name, number in found.items()}
    return {field: len(found) if isinstance(found, list) else found}


def _change(was: float | None, now: float | None) -> str:
    return " -> ".join("?" if number is None else f"{number:,.0f}" for number in (was, now))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


if __name__ == "__main__":
    sys.exit(main())
