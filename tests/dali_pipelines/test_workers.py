"""Batches prepared by other processes: the same ones, broken files, errors, deaths, clean ends."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.data import read_manifest
from copynce.data.pairs import DescriptorPairs, PairSampler
from dali_pipelines import LoaderOptions, Pair, PairBatch, PairLoader
from dali_pipelines.reading import Quarantine
from dali_pipelines.workers import _LARGE, Workers

SIZE, BATCH, STEPS = 48, 6, 9


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(14):
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        shape = (150 - 6 * i, 60 + 17 * i)
        Image.fromarray(coarse).resize(shape, Image.Resampling.BICUBIC).save(folder / f"{i:02}.jpg")
    (folder / "text.jpg").write_text("hello")
    content = (folder / "00.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    tables = content.find(b"\xff\xc4")  # Huffman tables of more codes than there are: only DALI finds out
    (folder / "tables.jpg").write_bytes(content[: tables + 5] + b"\xff" * 16 + content[tables + 21 :])
    return folder


def run(pictures: Path, processes: int, told: list[str]) -> Iterator[PairBatch]:
    plan = DescriptorPairs(read_manifest(pictures), "matcher", seed=3)
    return iter(
        PairLoader(
            PairSampler(plan, BATCH, seed=3).batches(0, STEPS),
            plan.pictures.paths,
            LoaderOptions(size=SIZE, batch_size=BATCH),
            substitute=plan.substitute,
            on_broken=lambda path, reason: told.append(f"{Path(path).name}: {reason}"),
            processes=processes,
        )
    )


def children() -> int:
    return len(multiprocessing.active_children())


def test_batches_do_not_depend_on_processes(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors are kept to the end: none is overwritten when its memory serves another batch, and all memory is."""
    fetch, held = Workers.fetch, [0]

    def counted(self: Workers, index: int) -> tuple[object, Callable[[], None]]:
        found, release = fetch(self, index)
        held[0] += 1
        return found, lambda: (release(), held.__setitem__(0, held[0] - 1))  # type: ignore[func-returns-value]

    monkeypatch.setattr(Workers, "fetch", counted)
    told: list[list[str]] = [[], [], []]
    alone, one, three = (list(run(pictures, n, told[k])) for k, n in enumerate((0, 1, 3)))
    assert len(alone) == len(one) == len(three) == STEPS
    for expected, *others in zip(alone, one, three, strict=True):
        for found in others:
            assert found.uuids == expected.uuids
            for name in (field.name for field in dataclasses.fields(PairBatch) if field.name != "uuids"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name
    # Each broken file once, though several processes meet it, and DALI finds one that they do not.
    assert len({tuple(sorted(lines)) for lines in told}) == 1
    assert [line.split(":")[0] for line in sorted(told[0])] == ["cut.jpg", "tables.jpg", "text.jpg"]
    assert "tables.jpg: the header is fine but the picture cannot be decoded" in told[0]
    assert held == [0], "blocks of batches that failed inside of DALI come back too"
    assert children() == 0


def test_leaving_early_ends_the_processes(pictures: Path) -> None:
    batches = run(pictures, 2, [])
    next(batches)
    assert children() == 2
    batches.close()  # type: ignore[attr-defined]
    assert children() == 0


def test_a_process_that_dies_ends_the_stream_with_a_sentence(pictures: Path) -> None:
    batches = run(pictures, 2, [])
    next(batches)
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a process that prepared batches died \(exit code -9"):
        list(batches)
    assert children() == 0


@dataclass
class Faulty(Sequence[list[Pair]]):
    """Batches of which the third cannot be made."""

    batches: Sequence[list[Pair]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, at: int) -> list[Pair]:  # type: ignore[override]
        if at == 2:
            raise KeyError("the sampler is out of order")
        return self.batches[at]


def test_an_error_arrives_after_the_good_batches_and_tells_its_story(pictures: Path) -> None:
    plan = DescriptorPairs(read_manifest(pictures), "matcher", seed=3)
    loader = PairLoader(
        Faulty(PairSampler(plan, BATCH, seed=3).batches(0, STEPS)),
        plan.pictures.paths,
        LoaderOptions(size=SIZE, batch_size=BATCH),
        substitute=plan.substitute,
        on_broken=lambda path, reason: None,
        processes=2,
    )
    seen = []
    with pytest.raises(KeyError, match="out of order") as caught:
        seen.extend(loader)
    assert len(seen) == 2
    assert "__getitem__" in "".join(caught.value.__notes__)


def test_wrong_settings_are_named(pictures: Path) -> None:

    def make(batches: Iterable[Sequence[Pair]], processes: int) -> PairLoader:
        options = LoaderOptions(size=8, batch_size=2)
        return PairLoader(
            batches, [], options, substitute=lambda p, k: p, on_broken=lambda p, r: None, processes=processes
        )

    with pytest.raises(ValueError, match="processes must be at least 0, got -1"):
        make([], processes=-1)
    with pytest.raises(ValueError, match="with processes, batches must be a sequence, got list_iterator"):
        make(iter([]), processes=1)
    with pytest.raises(ValueError, match=r"batches and substitute must be picklable: .*lambda"):
        list(make([[]], processes=1))
    assert children() == 0


class Numbers:
    """A preparation of arrays inside and outside of the arena, large, small, not contiguous, shared."""

    def start(self, report: object) -> None: ...

    def leave_out(self, broken: dict[str, str]) -> None: ...

    def batch(self, index: int, empty: object) -> object:
        if index == 3:
            return None
        inside = empty((index + 1, 5000), np.float32)  # type: ignore[operator]
        inside[:] = index
        outside = np.arange(index * 100_000)
        return inside, outside, outside[::7], [outside, np.full(3, index)], np.zeros((0, 4)), b"x" * _LARGE


def test_arrays_arrive_as_they_were() -> None:
    workers = Workers(Numbers(), 2, 9, Quarantine(None))
    try:
        for index in range(9):
            found, release = workers.fetch(index)
            if index == 3:
                assert found is None
            else:
                inside, outside, strided, (again, small), nothing, text = found
                expected = np.arange(index * 100_000)
                np.testing.assert_array_equal(inside, np.full((index + 1, 5000), index, np.float32))
                np.testing.assert_array_equal(outside, expected)
                np.testing.assert_array_equal(again, expected)
                np.testing.assert_array_equal(strided, expected[::7])
                assert small.tolist() == [index] * 3
                assert nothing.shape == (0, 4)
                assert text == b"x" * _LARGE
                del inside, outside, strided, again
            release()
        with pytest.raises(IndexError, match="there are 9 batches, got 9"):
            workers.fetch(9)
    finally:
        workers.close()


def test_workers_end_when_their_owner_is_killed(pictures: Path, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import sys, multiprocessing\n"
        "from test_workers import run\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    batches = run(Path({str(pictures)!r}), 2, [])\n"
        "    next(batches)\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    input()\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    owner = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2
    owner.kill()
    owner.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until, "a worker outlives its owner"
        time.sleep(0.1)


def test_signals_for_the_owner_do_not_end_its_workers(pictures: Path) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole group; the owner decides, from its workers' first moment on."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    batches = run(pictures, 2, [])
    next(batches)
    for child in multiprocessing.active_children():
        for number in signals:
            os.kill(child.pid or 0, number)
    assert len(list(batches)) == STEPS - 1

    workers = Workers(Numbers(), 1, 2, Quarantine(None))
    try:
        (child,) = multiprocessing.active_children()
        for number in signals:
            os.kill(child.pid or 0, number)  # it has hardly begun to import
        assert workers.fetch(0)[0] is not None
    finally:
        workers.close()


SCRIPT = """
import os, sys
print("begun", flush=True)
from test_workers import run
from pathlib import Path
def main():
    batches = run(Path(sys.argv[1]), 1, [])
    print("pairs", len(next(batches).uuids), flush=True)
    batches.close()
"""


@pytest.mark.parametrize(
    ("ending", "complaint"),
    [
        ("main()", r"script\.py, line 10: with worker processes, what a script runs must stand in a block"),
        ("try:\n    main()\nfinally:\n    pass", "script.py, line 11: "),
        ("if __name__ == '__main__':\n    main()", None),
        ("try:\n    if __name__ == '__main__':\n        main()\nfinally:\n    pass", None),
    ],
)
def test_a_script_that_would_run_again_in_each_worker_is_told_so_at_once(
    pictures: Path, tmp_path: Path, ending: str, complaint: str | None
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + ending + "\n")
    path = os.pathsep.join([str(Path(__file__).parent), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, str(pictures)],
        capture_output=True,
        text=True,
        timeout=900,  # it may have to compile
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    if complaint is None:
        assert (done.returncode, f"pairs {BATCH}" in done.stdout) == (0, True), done.stderr
    else:
        assert done.returncode == 1
        assert re.search(complaint, done.stderr.splitlines()[-1])
        assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]
        assert done.stdout == "begun\n", "nothing began again"
