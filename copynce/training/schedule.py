"""Learning rates (PROTOCOLS 10)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from copynce.training.config import OptimConfig


def scaled_lr(base: float, items: int) -> float:
    """base * sqrt(items / 1024), ``items`` being those of all processes in one step."""
    return base * math.sqrt(items / 1024)


def cosine_schedule(lr: float, *, total: int, warmup: int, min_lr: float) -> Callable[[int], float]:
    """Learning rate of step 0 ... total - 1: linear warm-up from 0.01 lr, then a cosine towards ``min_lr``.

    As released, the cosine's clock starts after the warm-up but keeps the full length, so the last step stays a little
    above ``min_lr``.
    """

    def at(step: int) -> float:
        if step < warmup:
            return lr * (0.01 + 0.99 * step / warmup)
        return min_lr + 0.5 * (lr - min_lr) * (1.0 + math.cos(math.pi * (step - warmup) / total))

    return at


@dataclass(frozen=True)
class Schedule:
    """A run's ``total`` steps, of which ``warmup`` are warm-up, and the learning ``rate(step)``."""

    total: int
    warmup: int
    rate: Callable[[int], float]


def run_schedule(optim: OptimConfig, items: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a run with ``items`` of all processes in a step."""
    total = optim.epochs * steps_per_epoch if optim.steps is None else optim.steps
    warmup = min(round(optim.warmup_epochs * steps_per_epoch), math.ceil(total / 10))
    rate = cosine_schedule(scaled_lr(optim.lr, items), total=max(total, 1), warmup=warmup, min_lr=optim.min_lr)
    return Schedule(total, warmup, rate)
