"""The gradients of a step: forward and backward of its batches, as a training makes them and a replay repeats them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from copynce.training.distributed import World
from copynce.training.loading import DTYPES
from copynce.training.objectives.base import Objective
from dali_pipelines import PairBatch


def distributed(objective: Objective, here: World) -> nn.Module:
    """The objective, in DDP where there are several processes."""
    return objective if here.size == 1 else DistributedDataParallel(objective)


def step_seed(seed: int, step: int, rank: int) -> int:
    """What torch draws a step from: the same in every process and version, another for every step and rank."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_gradients(
    wrapped: nn.Module,
    batches: Iterable[PairBatch],
    count: int,
    *,
    seed: int,
    device: torch.device,
    precision: str,
    scale: Callable[[Tensor], Tensor],
    watch: bool = False,
) -> dict[str, Tensor]:
    """Add the mean gradient of ``count`` batches to the parameters of ``wrapped``, which is :func:`distributed`.

    ``seed``: that of the step, see :func:`step_seed`. ``precision``: fp32, bf16 or fp16. ``scale``: what the loss is
    multiplied by. ``watch``: whether the objective measures what costs something. Returns the means over the batches of
    the loss and of the objective's measures, detached. A loss that is no number makes every gradient none: then it is
    seen in their norm, and on every process.
    """
    # Seeded by step: whatever draws (stochastic depth) does so equally in a run that was resumed.
    torch.manual_seed(seed)
    dtype = getattr(torch, DTYPES[precision])
    measured: list[dict[str, Tensor]] = []
    for part, batch in enumerate(batches):
        # The ranks' gradients meet once a step, in the last backward.
        with _apart(wrapped) if part < count - 1 else nullcontext():
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss, measures = wrapped(batch.to(device), watch)
            heard = torch.where(loss.detach().isfinite(), 1.0, math.nan)
            scale(loss * heard / count).backward()
        measured.append({"loss": loss.detach(), **measures})
    return {name: torch.stack([one[name] for one in measured]).mean(0) for name in measured[0]}


def _apart(wrapped: nn.Module) -> AbstractContextManager[None]:
    """A block whose backward leaves the ranks' gradients as they are."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
