"""Batches of tables: equal to single ones, for any number of threads, beside other thread pools, in new processes."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from copynce.pixtrace import (
    ComposedView,
    EditProgram,
    Rotation,
    Swirl,
    bridge,
    sample_program,
    trace_pairs,
    trace_view,
)

GRID = (96, 80)


def views_of(count: int, edited_reference: bool = True) -> list[tuple[ComposedView, ComposedView] | None]:
    views: list[tuple[ComposedView, ComposedView] | None] = []
    for k in range(count):
        query = sample_program("phase2", seed=0, epoch=0, uuid=f"q{k}").composed((200, 300), GRID)
        if k % 5 == 3:
            views.append(None)
        elif k % 2 and edited_reference:
            views.append((query, sample_program("matcher", seed=0, epoch=0, uuid=f"r{k}").composed((200, 300), GRID)))
        else:
            views.append((query, EditProgram(()).composed((200, 300), GRID)))
    return views


def tables_of(views: list[tuple[ComposedView, ComposedView] | None], threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    # Filled with rubbish: a pixel that is not written shows.
    arrays = np.full((2, len(views), *GRID), -77, np.int32)
    trace_pairs(views, GRID, arrays[0], arrays[1], threads=threads)
    return arrays[0], arrays[1]


def test_a_batch_equals_single_bridges() -> None:
    views = views_of(20)
    views.append(
        (
            EditProgram((Swirl(0.2), Rotation(20.0))).composed((200, 300), GRID),
            EditProgram(()).composed((200, 300), GRID),
        )
    )
    forward, backward = tables_of(views)
    for pair, q, r in zip(views, forward, backward, strict=True):
        if pair is None:
            assert (q == -1).all()
            assert (r == -1).all()
            continue
        query, reference = trace_view(pair[0], GRID), trace_view(pair[1], GRID)
        assert (q == bridge(query, reference).index).mean() > 0.9999
        assert (r == bridge(reference, query).index).mean() > 0.9999


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_equal_for_any_number_of_threads(threads: int) -> None:
    """Many times, with pairs that the kernel traces beside pairs of dense maps, which it cannot."""
    swirled = EditProgram((Swirl(0.2), Rotation(20.0))).composed((200, 300), GRID)
    views = views_of(13)
    views[4] = views[9] = (swirled, EditProgram(()).composed((200, 300), GRID))
    expected = tables_of(views)
    for _ in range(50):
        for one, many in zip(expected, tables_of(views, threads), strict=True):
            assert (one == many).all()


def test_empty_and_one() -> None:
    assert tables_of([], threads=4)[0].shape == (0, *GRID)
    assert (tables_of([None], threads=4)[0] == -1).all()


def test_errors() -> None:
    view = EditProgram(()).composed((20, 30), GRID)
    good = np.empty((1, *GRID), np.int32)
    with pytest.raises(
        ValueError, match=r"query_to_reference must be a contiguous int32 array \[1, 96, 80\], got int64"
    ):
        trace_pairs([(view, view)], GRID, good.astype(np.int64), good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference_to_query must be a contiguous"):
        trace_pairs([(view, view)], GRID, good, np.empty((1, 80, 96), np.int32).swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"both views of pair 0 must be of the size of the grid \(96, 80\)"):
        trace_pairs([(view, EditProgram(()).composed((20, 30), (80, 96)))], GRID, good, good.copy())
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        trace_pairs([(view, view)], GRID, good, good.copy(), threads=0)


def test_safe_beside_torch_threads_and_other_callers() -> None:
    """Several callers at once, each with threads of its own, while torch computes in its pool."""
    import torch

    views = views_of(8)
    expected = tables_of(views)[0]
    stop = threading.Event()

    def multiply() -> None:
        a = torch.rand(200, 200)
        while not stop.is_set():
            a = torch.tanh(a @ a)

    busy = threading.Thread(target=multiply)
    busy.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: tables_of(views, 2)[0], range(8)):
                assert (found == expected).all()
    finally:
        stop.set()
        busy.join()


def _checksum(count: int) -> int:
    forward, backward = tables_of(views_of(count), threads=2)
    return int(forward.sum(dtype=np.int64) + backward.sum(dtype=np.int64))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_same_in_worker_processes(method: str) -> None:
    """After threads have run here, so that a fork meets whatever state they leave behind."""
    expected = _checksum(6)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    if method == "spawn":
        code += "import test_pixtrace_batches as t; print(t._checksum(6))"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(found.stdout) == expected
        return
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=lambda: queue.put(_checksum(6))) for _ in range(2)]
    for worker in workers:
        worker.start()
    found_sums = [queue.get() for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert found_sums == [expected, expected]


def test_processes_may_fill_the_compile_cache_together(tmp_path: Path) -> None:
    """Processes start on an empty cache at once; all must compute the same and leave a cache that the next one uses.

    One leaf with the options of all, so that the test compiles for a second and not for a minute.
    """
    code = (
        "import numba, numpy as np, sys; from copynce.pixtrace.compiled import maps, tracing;"
        f"numba.config.CACHE_DIR = {str(tmp_path)!r};"
        "f = numba.njit('void(int32[:, ::1], int32[::1])', **maps.OPTIONS)(tracing.scatter.py_func);"
        "out = np.empty(7, np.int32); f(np.array([[2, 2, -1], [0, 5, 2]], np.int32), out);"
        "print(out[1:].tolist(), sum(f.stats.cache_hits.values()))"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert {out.rsplit(" ", 1)[0] for out, _ in outputs} == {"[3, -1, 5, -1, -1, 4]"}
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.split() == ["[3,", "-1,", "5,", "-1,", "-1,", "4]", "1"]
