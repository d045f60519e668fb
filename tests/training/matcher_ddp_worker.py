"""Two processes of the matcher's DDP test: steps on half of each batch, and before that alone on all of it.

Run as ``python matcher_ddp_worker.py FOLDER``, which receives rank0.pt and rank1.pt: for each weight of CopyNCE the
model's weights at the start, after the steps alone, and after the shared steps.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from copynce.models import build_matcher
from copynce.training import MatcherLossConfig, MatcherObjective
from dali_pipelines import PairBatch

STEPS = 4


def fresh(copynce_weight: float) -> MatcherObjective:
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}
    model = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=1, backbone_options=options)
    return MatcherObjective(model, MatcherLossConfig(copynce_weight=copynce_weight)).train()


def batch(step: int, pairs: slice) -> PairBatch:
    """Of eight pairs those ``pairs``: half are copies; of the first four one is traced, of the others three or all."""
    torch.manual_seed(step)
    views, tables = torch.randn(2, 8, 3, 32, 32), torch.randint(-1, 32 * 32, (2, 8, 32, 32), dtype=torch.int32)
    positive = torch.arange(8) % 2 == 0
    traced = torch.tensor([True, False, False, False, step % 2 == 0, True, True, True])
    tables[:, ~(positive & traced)] = -1
    return PairBatch(*views[:, pairs], *tables[:, pairs], positive[pairs], traced[pairs], list("abcdefgh")[pairs])


def train(wrapped: nn.Module, pairs: slice) -> None:
    # Not AdamW, which would make a step of what rounding leaves of a gradient that is zero.
    optimiser = torch.optim.SGD([one for one in wrapped.parameters() if one.requires_grad], lr=0.05)
    for step in range(STEPS):
        total, _ = wrapped(batch(step, pairs))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[float, list[dict[str, Tensor]]] = {}
    for weight in (3.0, 0.0):
        alone = fresh(weight)
        start = {name: value.clone() for name, value in alone.model.state_dict().items()}
        train(alone, slice(None))
        found[weight] = [start, alone.model.state_dict()]
    child = os.fork()
    rank = int(child == 0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for weight, states in found.items():
        shared = fresh(weight)
        train(DistributedDataParallel(shared), slice(4 * rank, 4 * rank + 4))
        states.append(shared.model.state_dict())
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
    if child:
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
