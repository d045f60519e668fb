"""One command for some minutes on a machine with GPUs: what is worth most first, each part in its own time box.

    python -m benchmarks.gpu --budget 480 [--out gpu-report] [--parts step profile] [--device cpu]

Each part is a process group that is killed when its box has ended; what it measured until then stays. A box is the
part's share of the time that is left, so that a part that ends early gives its rest to those after it. Pictures are
made and Numba's code is compiled beside the kernels' parts, which need neither. As each part ends, ``OUT/report.json``
and ``OUT/report.md`` are written anew, with a table of its rows, or how it failed; ``OUT/NAME.log`` is what it printed.
No part ends another. The exit status is the number of parts that failed or were cut off. It needs the extra ``[dev]``,
no data and nothing compiled before; a second run on the machine finds its code compiled.

``--device cpu`` runs what needs no GPU: a step of ViT-S/16 and its profile, the loader, trainings with workers, two
processes on gloo.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copynce.files import atomic_text
from copynce.provenance import processor_name, running_commit

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """``seconds`` of a budget of eight minutes for what Python does with ``arguments``, in which {out}, {device} and
    {seconds} stand for the call's. ``gpus`` must be there. ``after``: the part beside the others whose end it needs."""

    name: str
    seconds: float
    about: str
    arguments: tuple[str, ...]
    gpus: int = 0
    after: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The beginning of the names of its files."""
        return self.name.replace(" ", "-")


def _measured(name: str) -> tuple[str, ...]:
    # Not a main module, which every worker of a loader would import, torch and all.
    code = "import sys; from benchmarks.gpu_parts import main; main(*sys.argv[1:])"
    return "-c", code, name, "{out}", "{device}", "{seconds}"


def _tests(*arguments: str) -> tuple[str, ...]:
    # Most of their time Triton and Numba compile, a case on one core.
    workers = str(max(2, min(12, (os.cpu_count() or 1) - 2)))
    options = "-vv", "--tb=short", "-p", "no:cacheprovider", "-n", workers, "--maxprocesses", workers
    return "-m", "pytest", *options, *arguments


#: Made beside the others, from the beginning on.
BESIDE = Part("pictures", 120, "pictures made, Numba's code compiled", _measured("pictures"))
PARTS = (
    Part(
        "kernel cases",
        55,
        "every case of the Triton kernels against its twin",
        _tests(*(f"tests/kernels/triton/cases_{name}.py" for name in ("copynce", "loss", "patch_overlap"))),
        gpus=1,
        environment={"TRITON_INTERPRET": "0"},
    ),
    Part("kernel times", 75, "kernels against bytes and FLOP, repeatability", _measured("kernel times"), gpus=1),
    Part("step", 60, "a training step on one batch: eager, compiled, a CUDA graph", _measured("step")),
    Part("profile", 25, "where the time of an eager step goes", _measured("profile")),
    Part("training", 110, "whole trainings with 0, 2, 4, 8 workers", _measured("training"), after="pictures"),
    Part("loader", 45, "the loader alone with 0, 2, 4, 8 workers", _measured("loader"), after="pictures"),
    Part(
        "pixels",
        70,
        "the pipeline's suite with its pictures rendered on the GPU",
        _tests(
            "tests/dali_pipelines/test_graph.py::test_cpu_and_gpu_render_the_same",
            "tests/dali_pipelines/test_coordinates.py",
            "tests/dali_pipelines/test_photometric.py",
        ),
        gpus=1,
        after="pictures",
        environment={"COPYNCE_DEVICE": "gpu"},
    ),
    Part("two processes", 40, "NCCL against one process: losses and rates", _measured("two processes"), 2, "pictures"),
)


@dataclass(frozen=True)
class Result:
    """What became of a part: ``status`` is "done" or says why not; ``rows`` are what it has measured, ``tail`` the end
    of its log."""

    name: str
    about: str
    status: str
    seconds: float
    rows: list[dict[str, Any]]
    tail: list[str]

    @property
    def failed(self) -> bool:
        return self.status != "done" and not self.status.startswith("left out")


class Running:
    """A part that has been started, in a process group of its own."""

    def __init__(self, part: Part, out: Path, device: str, seconds: float) -> None:
        self.part, self._log, self._rows = part, out / f"{part.file_name}.log", out / f"{part.file_name}.jsonl"
        self._rows.unlink(missing_ok=True)
        names = {"{out}": str(out), "{device}": device, "{seconds}": f"{seconds:.1f}"}
        self._started = time.monotonic()
        self._seconds = seconds
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *(names.get(argument, argument) for argument in part.arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
            )

    def finish(self) -> Result:
        """Wait until it ends, or its box does."""
        left = self._started + self._seconds - time.monotonic()
        try:
            code = self._process.wait(max(left, 0.0))
            status = "done" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            status = f"cut off after {self._seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and what it has left behind
        self._process.wait()
        seconds = time.monotonic() - self._started
        text = self._log.read_text(errors="replace")
        rows = _rows(self._rows) or _outcomes(text)
        return Result(self.part.name, self.part.about, status, seconds, rows, text.splitlines()[-25:])


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, the last of which a kill may have cut short."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _outcomes(text: str) -> list[dict[str, Any]]:
    """How many tests of pytest's verbose log have passed, failed, ...: a row; none where there is no test."""
    words = [word for line in text.splitlines() if line.startswith("[gw") for word in line.split()[:4]]
    counts = {name.lower(): words.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    return [counts] if any(counts.values()) else []


def run_parts(
    parts: Sequence[Part],
    out: Path,
    budget: float,
    *,
    device: str,
    gpus: int,
    beside: Part | None = None,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Run the parts one after the other within ``budget`` seconds; the report in ``out`` grows with each.

    ``beside``: one that is started with the first, and ended before the first that needs it.
    """
    end = time.monotonic() + budget
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []

    def note(result: Result) -> None:
        results.append(result)
        write_report(out, results, budget)
        say(f"{result.name}: {result.status}, {result.seconds:.0f} s, {len(result.rows)} rows")

    for part in parts:
        if part.gpus > gpus:
            note(Result(part.name, part.about, f"left out: it needs {part.gpus} GPUs, {gpus} are here", 0.0, [], []))
    able = [part for part in parts if part.gpus <= gpus]
    waiting: Running | None = None
    if beside is not None and any(part.after == beside.name for part in able):
        share = beside.seconds / sum(part.seconds for part in (beside, *able))
        waiting = Running(beside, out, device, budget * share)
    for index, part in enumerate(able):
        if waiting is not None and part.after == waiting.part.name:
            note(waiting.finish())
            waiting = None
        share = part.seconds / sum(later.seconds for later in able[index:])
        note(Running(part, out, device, max(end - time.monotonic(), 0.0) * share).finish())
    return results


def write_report(out: Path, results: Sequence[Result], budget: float) -> None:
    """``report.json`` and ``report.md``: machine, commit, and each part's rows."""
    about = {
        "commit": running_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "gpus": _gpus(),
        "budget_seconds": budget,
    }
    with atomic_text(out / "report.json") as file:
        json.dump({**about, "parts": [vars(result) for result in results]}, file, indent=1)
    lines = ["# Measured", "", *(f"- {name}: {value}" for name, value in about.items())]
    for result in results:
        lines += ["", f"## {result.name}: {result.about}", "", f"{result.status}, {result.seconds:.0f} s"]
        lines += _table(result.rows)
        if result.failed and result.tail:
            lines += ["", "```", *result.tail, "```"]
    with atomic_text(out / "report.md") as file:
        file.write("\n".join(lines) + "\n")


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables in Markdown: rows that have the same columns, one below the other."""
    lines: list[str] = []
    before: list[str] = []
    for row in rows:
        if list(row) != before:
            before = list(row)
            lines += ["", f"| {' | '.join(before)} |", "|" + " --- |" * len(before)]
        lines.append(f"| {' | '.join(_cell(value) for value in row.values())} |")
    return lines


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)
    return text.replace("|", "/").replace("\n", " ")


@functools.cache
def _gpus() -> list[str]:
    """Name, driver and memory of each GPU that this process may use."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    names = found.stdout.strip().splitlines() if found.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([one for one in visible.split(",") if one.strip()])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; returns the number of parts that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all (default: %(default)g)")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-report"), help="folder of the report (default: %(default)s)"
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: what needs no GPU")
    options = parser.parse_args(arguments)
    if options.budget <= 0:
        parser.error(f"--budget must be above 0, got {options.budget:g}")
    gpus = len(_gpus()) if options.device == "gpu" else 0
    parts = [part for part in PARTS if part.name in options.parts]
    if options.device == "cpu":  # whose two processes are on gloo
        parts = [part for part in parts if part.gpus != 1]
        gpus = 2
    elif not gpus:
        parser.error("no GPU is here (nvidia-smi tells none); --device cpu runs what needs none")
    found = run_parts(parts, options.out.resolve(), options.budget, device=options.device, gpus=gpus, beside=BESIDE)
    print(f"report: {options.out / 'report.md'}")
    return sum(result.failed for result in found)


if __name__ == "__main__":
    sys.exit(main())
