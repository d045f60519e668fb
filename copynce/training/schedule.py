"""Learning rates (PROTOCOLS 10)."""

from __future__ import annotations

import math
from collections.abc import Callable


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
