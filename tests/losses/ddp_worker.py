"""One of two processes of the DDP test: the loss's registered operator, twice in one step, inside of DDP.

Run as ``python ddp_worker.py RANK FOLDER BACKEND``; FOLDER receives rank0.pt and rank1.pt. Each process also does the
step on the whole batch without DDP, so that both sides of the comparison come from the same implementation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from copynce.losses import copynce_loss


class TwoLosses(nn.Module):
    """Tokens of a linear layer under two losses, of the tokens themselves and of a second layer's."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, query: Tensor, reference: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        tokens = [self.first(side) for side in (query, reference)]
        loss = copynce_loss(*tokens, forward, backward, patch_size=2, gamma=3, backend=self.backend)
        tokens = [self.second(side) for side in tokens]
        return loss + copynce_loss(*tokens, forward, backward, patch_size=2, prior="paper", backend=self.backend)


def main(rank: int, folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights and pictures in both processes
    model = TwoLosses(backend)
    tokens = [torch.randn(4, 9, 5) for _ in range(2)]
    tables = [torch.randint(-1, 36, (4, 6, 6), dtype=torch.int32) for _ in range(2)]
    model(*tokens, *tables).backward()
    whole = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)
    wrapped = DistributedDataParallel(model)
    wrapped(*(tensor[half] for tensor in (*tokens, *tables))).backward()
    shared = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save((whole, shared), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
