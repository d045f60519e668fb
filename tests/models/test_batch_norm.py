"""BatchNorm over the rows of all ranks, in two real processes that hold different numbers of rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from copynce.models.layers import BatchNorm

ROWS = (5, 3)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows far from zero, and an upstream gradient for them."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 4, generator=generator) + 50, torch.randn(8, 4, generator=generator)


def run(layer: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
        layer.bias.copy_(torch.arange(4.0))
    x = x.clone().requires_grad_()
    y = layer.train()(x)
    y.backward(upstream)
    return {
        "y": y.detach(),
        "x": x.grad,
        "weight_grad": layer.weight.grad,
        "bias_grad": layer.bias.grad,
    } | layer.state_dict()


def as_rank(rank: int, rendezvous: str) -> dict[str, torch.Tensor]:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        x, upstream = (part.split(ROWS)[rank] for part in inputs())
        return run(BatchNorm(4), x, upstream)
    finally:
        dist.destroy_process_group()


def test_one_process_is_plain_batch_norm() -> None:
    ours, plain = run(BatchNorm(4), *inputs()), run(torch.nn.BatchNorm1d(4), *inputs())
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=0)


def test_two_processes_equal_one_with_all_rows(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    rendezvous, out = str(tmp_path / "rendezvous"), str(tmp_path / "second.pt")
    other = subprocess.Popen([sys.executable, __file__, rendezvous, out], env=environment)
    try:
        first = as_rank(0, rendezvous)
        assert other.wait(timeout=120) == 0
    finally:
        other.kill()
    second = torch.load(out, weights_only=True)
    expected = run(torch.nn.BatchNorm1d(4), *inputs())
    # Rows around 50: float32 leaves 4e-6 of each.
    close = {"rtol": 1e-4, "atol": 2e-5}
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), expected[name], **close)
    for name in ("weight_grad", "bias_grad"):  # of each rank's own rows; DDP sums them
        torch.testing.assert_close(first[name] + second[name], expected[name], **close)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(first[name], expected[name], **close)
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


if __name__ == "__main__":
    torch.save(as_rank(1, sys.argv[1]), sys.argv[2])
