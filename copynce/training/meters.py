"""Numbers of a training, measured without making it wait."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from copynce.training.distributed import World


class Outcome:
    """Numbers of a step, on their way to the host.

    ``measures``: on the device, scalars and sums with what they are sums over, for a mean over the processes. ``read``
    gives the scalars of them, and the ``others``. ``uuids``: of the pairs shown, a list a batch.
    """

    def __init__(
        self, step: int, measures: dict[str, Tensor], others: dict[str, Tensor], uuids: Sequence[Sequence[str]] = ()
    ) -> None:
        self.step = step
        self.uuids = uuids
        self.measures = {name: value.detach() for name, value in measures.items()}
        values = {**others, **{name: value for name, value in self.measures.items() if value.ndim == 0}}
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


def means_over_ranks(measures: Mapping[str, Tensor], here: World) -> dict[str, float]:
    """The mean of each scalar over the processes, and of each sum with what it is a sum over, [2], the quotient of all
    processes together; without those that are sums over nothing."""
    widths = [value.numel() for value in measures.values()]
    means = here.mean(torch.cat([value.detach().float().flatten() for value in measures.values()]))
    found = {}
    for name, part in zip(measures, means.cpu().split(widths), strict=True):
        total, *count = part.tolist()
        if not count or count[0] > 0:
            found[name] = total / count[0] if count else total
    return found


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process had taken at once so far: of the GPU where it is on one, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
