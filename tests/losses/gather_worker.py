"""One rank of the two-process gather test: losses and gradients of its half of a batch, saved for the test to compare.

Run as ``python gather_worker.py RANK FOLDER``; FOLDER holds batch.pt and receives rank0.pt and rank1.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from copynce.losses import info_nce, koleo


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batch = torch.load(folder / "batch.pt")
    half = len(batch["query"]) // 2
    results = {}
    for gather in ("differentiable", "local_gradient"):
        for loss_name in ("info_nce", "koleo", "info_nce of some", "koleo of some"):
            query, reference = (
                batch[name][rank * half : (rank + 1) * half].clone().requires_grad_() for name in ("query", "reference")
            )
            log_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
            positive = batch["positive"][rank * half : (rank + 1) * half] if loss_name.endswith("some") else None
            if loss_name.startswith("info_nce"):
                loss = info_nce(query, reference, log_scale, positive=positive, gather=gather)
            else:
                loss = koleo(query, reference, positive=positive, gather=gather)
            loss.backward()
            results[gather, loss_name] = (loss.detach(), query.grad, reference.grad, log_scale.grad)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
