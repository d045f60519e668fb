"""Meetings of processes: the slow are waited for, the dead are not. Threads stand for the processes."""

from __future__ import annotations

import threading
import time

import pytest
from torch.distributed import HashStore

from copynce.errors import RunError
from copynce.training import meeting
from copynce.training.meeting import Meetings


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "BEAT", 0.02)
    monkeypatch.setattr(meeting, "SILENCE", 0.3)


def test_a_slow_process_is_waited_for_at_every_meeting() -> None:
    store, order = HashStore(), list[str]()

    def slow() -> None:
        with Meetings(store, 1, 2) as meetings:
            for number in range(2):
                time.sleep(0.5)  # longer than a silent one is waited for
                order.append(f"slow {number}")
                meetings.meet()

    other = threading.Thread(target=slow)
    other.start()
    with Meetings(store, 0, 2) as meetings:
        for number in range(2):
            meetings.meet()
            order.append(f"waited {number}")
    other.join()
    assert order == ["slow 0", "waited 0", "slow 1", "waited 1"]


def test_a_process_that_ended_before_a_meeting_fails_it_at_once() -> None:
    store = HashStore()
    with Meetings(store, 1, 2):
        pass
    begin = time.monotonic()
    with pytest.raises(RunError, match="process 1 has ended, so 0 cannot go on"), Meetings(store, 0, 2) as meetings:
        meetings.meet()
    assert time.monotonic() - begin < 0.2


def test_a_process_that_was_killed_fails_a_meeting_in_a_bounded_time() -> None:
    silent = pytest.raises(RunError, match=r"process 1 has given no sign of life for 0\.3 s")
    with silent, Meetings(HashStore(), 0, 2) as meetings:
        meetings.meet()
