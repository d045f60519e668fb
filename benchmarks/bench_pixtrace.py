"""What the coordinate tables cost, beside copying one.

    pytest benchmarks/bench_pixtrace.py     # pytest-benchmark's table; --benchmark-json to keep it
    python benchmarks/bench_pixtrace.py     # ratios to the copy, all taken in turn in one run, and the bars

The unit c is ``numpy.copyto`` of an int32 224 x 224 array. Where a copy's source and target lie at nearly the same
place within a memory page, some processors take over ten times as long; the unit is the fast case.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from copynce.pixtrace import (
    ComposedView,
    CoordinateTable,
    Crop,
    EditProgram,
    HorizontalFlip,
    Pad,
    Resize,
    Rotation,
    Tilt,
    bridge,
    patch_counts,
    patch_overlap,
    sample_program,
    trace,
    trace_pairs,
)

GRID = (224, 224)
SOURCE = (480, 640)
PAIRS = 96
_pool = ThreadPoolExecutor(2)

_rotation = Rotation(25.0, 10.0).absolute(400, 500, GRID)[0]
_tilt = Tilt(((0.1, 0.2), (0.3, 0.1), (0.0, 0.2), (0.2, 0.2))).absolute(400, 500, GRID)[0]
PROGRAMS = {
    "affine": EditProgram((Crop(20, 30, 400, 500), HorizontalFlip(), _rotation, Pad(90, 70, 90, 70), Resize(300, 300))),
    "projective": EditProgram((Crop(20, 30, 400, 500), HorizontalFlip(), _rotation, _tilt, Pad(90, 70, 90, 70))),
}
STEPWISE = (HorizontalFlip(), Rotation(25.0).absolute(*SOURCE, GRID)[0], Pad(128, 96, 128, 96), Resize(*GRID))

#: Bars in units of c: (name, bar, stretch).
BARS = {
    "trace (affine)": (15.0, 6.0),
    "trace (projective)": (15.0, 6.0),
    "reverse (scatter)": (6.0, 4.0),
    "overlap counts": (20.0, 10.0),
    "pair": (70.0, 30.0),
}


def copy_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Source and target of the unit, in one block and half a page apart within their pages."""
    block = np.zeros(2 * 224 * 224 + 512, np.int32)
    return block[: 224 * 224].reshape(GRID), block[-224 * 224 :].reshape(GRID)


def whole_pair(query: EditProgram, reference: EditProgram) -> tuple[np.ndarray, np.ndarray]:
    """Both programs composed and traced, bridged, the bridge reversed, both overlaps counted."""
    q, r = query.trace(SOURCE, GRID), reference.trace(SOURCE, GRID)
    query_to_reference = bridge(q, r)
    return patch_counts(query_to_reference), patch_counts(query_to_reference.reverse())


def batch() -> list[tuple[ComposedView, ComposedView] | None]:
    """The descriptor's training pairs: an edited query, the plain reference."""
    plain = EditProgram(()).composed(SOURCE, GRID)
    return [
        (sample_program("descriptor", seed=0, epoch=0, uuid=str(k)).composed(SOURCE, GRID), plain) for k in range(PAIRS)
    ]


def steps() -> dict[str, Callable[[], object]]:
    """Every timed step by name; outputs are checked here, before any clock starts."""
    source, target = copy_arrays()
    affine, projective = PROGRAMS["affine"], PROGRAMS["projective"]
    table = affine.trace(SOURCE, GRID)
    twin = trace((*affine.edits, Resize(*GRID)), SOURCE, GRID, fused=False)
    both = (table.index >= 0) & (twin.index >= 0)
    off = np.abs(table.coordinates() - twin.coordinates())[:, both].max(axis=0)
    assert (off <= 1).mean() > 0.99
    scattered = CoordinateTable(table.index, GRID)
    assert patch_counts(table).sum() == (table.index >= 0).sum()
    views = batch()
    large = affine.composed(SOURCE, (2240, 2240))
    drawn = np.empty((2, 2240, 2240), np.int32)

    def trace_large(k: int) -> None:
        large.trace((2240, 2240), drawn[k])

    forward, backward = np.empty((2, PAIRS, *GRID), np.int32)
    return {
        "copy": lambda: np.copyto(target, source),
        "compose": lambda: projective.composed(SOURCE, GRID),
        "trace (affine)": lambda: affine.trace(SOURCE, GRID),
        "trace (projective)": lambda: projective.trace(SOURCE, GRID),
        "reverse (scatter)": scattered.reverse,
        "reverse (forward map)": table.reverse,
        "bridge": lambda: bridge(table, table),
        "overlap counts": lambda: patch_counts(table),
        "patch overlap": lambda: patch_overlap(table),
        "pair": lambda: whole_pair(affine, projective),
        "sample a program": lambda: sample_program("descriptor", seed=0, epoch=0, uuid="T000000"),
        "fused, 640 x 480": lambda: trace(STEPWISE, SOURCE, GRID),
        "released, 640 x 480": lambda: trace(STEPWISE, SOURCE, GRID, mode="released"),
        "step by step, 640 x 480": lambda: trace(STEPWISE, SOURCE, GRID, fused=False),
        "2240 x 2240, 1 thread": lambda: trace_large(0),
        "the same on each of 2 threads": lambda: list(_pool.map(trace_large, range(2))),
        f"batch of {PAIRS}, 1 thread": lambda: trace_pairs(views, GRID, forward, backward),
        f"batch of {PAIRS}, 2 threads": lambda: trace_pairs(views, GRID, forward, backward, threads=2),
    }


STEPS = steps()


@pytest.mark.parametrize("name", STEPS)
def test_step(benchmark: Callable[[Callable[[], object]], object], name: str) -> None:
    benchmark(STEPS[name])


def measure(rounds: int = 15) -> dict[str, tuple[float, float]]:
    """(median, fastest) seconds of every step, taken in turn so that a busy moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(rounds):
        for name, step in STEPS.items():
            step()
            repeats = 1 if name.startswith(("step", "batch", "released", "2240", "the same")) else 20
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(found), min(found)) for name, found in times.items()}


def main() -> None:
    found = measure()
    unit = found["copy"]
    print(f"{'step':28} {'median':>11} {'fastest':>11}   in copies: median, fastest (bar, stretch)")
    for name, (median, fastest) in found.items():
        bars = "({:g}, {:g})".format(*BARS[name]) if name in BARS else ""
        copies = f"{median / unit[0]:8.1f} {fastest / unit[1]:8.1f}"
        print(f"{name:28} {1e6 * median:8.1f} us {1e6 * fastest:8.1f} us   {copies}  {bars}")
    one, two = found[f"batch of {PAIRS}, 1 thread"], found[f"batch of {PAIRS}, 2 threads"]
    alone, both = found["2240 x 2240, 1 thread"], found["the same on each of 2 threads"]
    for k, kind in enumerate(("median", "fastest")):
        twin = found["step by step, 640 x 480"][k] / found["fused, 640 x 480"][k]
        print(
            f"{kind}: fused over step by step {twin:.0f}x (bar 300x); two threads over one {one[k] / two[k]:.2f}x "
            f"(bar 1.8x, stretch 1.95x; with nothing to share this machine gives {2 * alone[k] / both[k]:.2f}x); "
            f"{1e6 * one[k] / PAIRS:.0f} us a pair in a batch"
        )


if __name__ == "__main__":
    main()
