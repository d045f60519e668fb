"""CopyNCE in a training loop of your own, under DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/copynce_ddp.py PICTURES --epochs 4

PICTURES is a folder (or a CSV `uuid,path`). A small timm ViT learns to match patches of two edited views of each
picture: `sample_program` draws the edits, `render_programs` their pixels, `program.trace` and `bridge` say which pixel
of one view is which of the other, and `copynce_loss` takes these tables and the patch tokens. Each process has its own
part of the pictures. The loss is the mean over a process' pairs, and DDP takes the mean of the gradients, so processes
should have equally many pairs. Every epoch has other edits, so a few pictures show no falling curve. On GPUs take nccl,
and move model and tensors there; the loss then takes its Triton kernels by itself.
"""

from __future__ import annotations

import argparse
import os

import timm
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from copynce.data import read_manifest
from copynce.losses import copynce_loss
from copynce.pixtrace import bridge, sample_program
from dali_pipelines import render_programs

SIDE, PATCH = 64, 8


class PatchTokens(torch.nn.Module):
    """Patch tokens [B, L, D] of a timm ViT, the class token left out."""

    def __init__(self) -> None:
        super().__init__()
        options = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 0}
        self.vit = timm.create_model("vit_tiny_patch16_224", global_pool="", class_token=True, **options)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.vit(pictures)[:, self.vit.num_prefix_tokens :]


def make_batch(paths: list[str], uuids: list[str], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(views float32 [2 B, 3, S, S], queries first; tables int32 [B, S, S] query -> reference, and back)."""
    views, tables = [], []
    programs = [[sample_program("descriptor", seed=s, epoch=epoch, uuid=uuid) for uuid in uuids] for s in (0, 1)]
    for of_a_side in programs:
        pixels = render_programs(paths, of_a_side, size=SIDE, pictures=paths)  # uint8 [B, S, S, 3]
        views.append(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    for path, query, reference in zip(paths, *programs, strict=True):
        with Image.open(path) as picture:
            shape = picture.height, picture.width
        q, r = (program.trace(shape, grid=(SIDE, SIDE)) for program in (query, reference))
        tables.append([torch.from_numpy(bridge(*pair).index.copy()) for pair in ((q, r), (r, q))])
    forward, backward = (torch.stack(side) for side in zip(*tables, strict=True))
    return torch.cat(views), forward, backward


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="folder or CSV of pictures")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8, help="pictures a process and step")
    given = parser.parse_args(arguments)

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    manifest = read_manifest(given.pictures)
    share = range(rank, len(manifest) - len(manifest) % world, world)  # equally many for all
    model = DistributedDataParallel(PatchTokens())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(given.epochs):
        losses = []
        for start in range(0, len(share), given.batch_size):
            mine = manifest.select(share[start : start + given.batch_size])
            views, forward, backward = make_batch([os.fspath(path) for path in mine.paths], list(mine.uuids), epoch)
            query, reference = model(views).chunk(2)  # one forward pass: DDP wants one a step
            loss = copynce_loss(query, reference, forward, backward, patch_size=PATCH, gamma=3.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        others = [torch.empty_like(weights) for _ in range(world)]
        dist.all_gather(others, weights)
        same = all(torch.equal(weights, other) for other in others)
        if rank == 0:
            print(f"epoch {epoch}: loss {mean / world:.4f}, same weights in {world} processes: {same}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
