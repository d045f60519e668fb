"""Numbers of a training, measured without making it wait."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Outcome:
    """Numbers of a step, on their way to the host.

    ``losses``: on the device, for a mean over the processes. ``read`` gives them, and the ``others``.
    """

    def __init__(self, step: int, losses: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        self.step = step
        self.losses = {name: value.detach() for name, value in losses.items()}
        values = {**others, **self.losses}
        self._names = list(values)
        numbers = torch.stack([value.detach().float() for value in values.values()])
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:
            # Memory that is not pinned would make the copy wait for all that is queued.
            host = torch.empty(numbers.shape, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._numbers = numbers

    def read(self) -> dict[str, float]:
        """The numbers, once the device has come so far."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._numbers.tolist(), strict=True))


class Pace:
    """Throughput and the share of time spent waiting for data, since the last reset."""

    def __init__(self, pictures_per_step: int) -> None:
        self._pictures = pictures_per_step
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._mark = time.perf_counter()
        self._steps = 0
        self._waited = self._spent = 0.0

    def skip(self) -> None:
        """Leave out the time since the last step (a checkpoint was written)."""
        self._mark = time.perf_counter()

    def data_ready(self) -> None:
        """A batch has arrived: what passed since the last mark was waiting."""
        now = time.perf_counter()
        self._waited += now - self._mark
        self._spent += now - self._mark
        self._mark = now

    def work_done(self) -> None:
        """What passed since the last mark was work."""
        now = time.perf_counter()
        self._spent += now - self._mark
        self._mark = now

    def step_done(self) -> None:
        """The step is finished: what passed since the last mark was work."""
        self.work_done()
        self._steps += 1

    @property
    def seconds_per_step(self) -> float:
        return self._spent / max(self._steps, 1)

    @property
    def pictures_per_second(self) -> float:
        return self._pictures * self._steps / max(self._spent, 1e-9)

    @property
    def wait_share(self) -> float:
        return self._waited / max(self._spent, 1e-9)
