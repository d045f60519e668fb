"""CopyNCE on the CPU: the fused path against the plain PyTorch twin and against the three matrix products inside.

Each shape is checked against the twin before it is timed. ``forward`` is without gradients, ``full`` is forward and
backward; ``gemm-floor`` is the ``torch.bmm`` of the same sizes alone (one forward, three in full), the least that any
implementation computes. ``peak_mib`` beside each time is the most memory of one call beyond its inputs (Linux).

    pytest benchmarks/bench_copynce_loss.py
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from copynce.losses import copynce_loss
from copynce.losses.copynce import Backend

Batch = tuple[Tensor, Tensor, Tensor, Tensor]

SHAPES = [  # pairs, pixels of a side, patch size, channels
    pytest.param(64, 224, 16, 384, id="B64-L196-D384"),
    pytest.param(16, 336, 16, 384, id="B16-L441-D384"),
]


def make_batch(pairs: int, side: int, patch_size: int, channels: int) -> Batch:
    """Related tokens with gradients, and tables of random crops with some rows covered, reversed by scatter."""
    generator = torch.Generator().manual_seed(0)
    patches = (side // patch_size) ** 2
    query = torch.randn(pairs, patches, channels, generator=generator)
    reference = query + torch.randn(pairs, patches, channels, generator=generator)
    forward = torch.empty(pairs, side, side, dtype=torch.int32)
    backward = torch.full_like(forward, -1)
    for table, reverse in zip(forward, backward, strict=True):
        zoom, top, left, covered = torch.rand(4, generator=generator).tolist()
        zoom = 0.4 + 0.6 * zoom
        rows = ((torch.arange(side) + top * side * (1 / zoom - 1)) * zoom).long()
        columns = ((torch.arange(side) + left * side * (1 / zoom - 1)) * zoom).long()
        table.copy_(rows[:, None] * side + columns)
        table[: int(covered * side / 3)] = -1
        pixels = torch.nonzero(table.flatten() >= 0)[:, 0]
        reverse.view(-1)[table.flatten()[pixels].long()] = pixels.int()
    return query.requires_grad_(), reference.requires_grad_(), forward, backward


def full(batch: Batch, patch_size: int, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
    query, reference = batch[:2]
    loss = copynce_loss(*batch, patch_size=patch_size, gamma=3.0, backend=backend)
    of_query, of_reference = torch.autograd.grad(loss, (query, reference))
    return loss.detach(), of_query, of_reference


def forward(batch: Batch, patch_size: int, backend: Backend) -> Tensor:
    with torch.no_grad():
        return copynce_loss(*batch, patch_size=patch_size, gamma=3.0, backend=backend)


def peak_mib(call: Callable[[], object]) -> float | None:
    """Most resident memory of one call beyond what was resident before it, in MiB; None where Linux does not tell."""
    if not sys.platform.startswith("linux"):
        return None

    def status(key: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(key))

    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not be reused unseen
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = status("VmRSS:")
    result = call()
    most = status("VmHWM:")
    del result
    return round((most - before) / 1024, 1)


@pytest.mark.parametrize(("pairs", "side", "patch_size", "channels"), SHAPES)
@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("provider", ["reference", "cpu", "gemm-floor"])
def bench_copynce_loss(
    benchmark: BenchmarkFixture, provider: str, mode: str, pairs: int, side: int, patch_size: int, channels: int
) -> None:
    batch = make_batch(pairs, side, patch_size, channels)
    query, reference = (tokens.detach() for tokens in batch[:2])
    expected = full(batch, patch_size, "reference")
    for value, exact in zip(full(batch, patch_size, "cpu"), expected, strict=True):
        assert (value - exact).norm() <= 2e-6 * exact.norm()

    def floor() -> None:
        affinity = torch.bmm(query, reference.mT)
        if mode == "full":
            torch.bmm(affinity, reference)
            torch.bmm(affinity.mT, query)

    def loss() -> object:
        backend: Backend = "reference" if provider == "reference" else "cpu"
        return (full if mode == "full" else forward)(batch, patch_size, backend)

    call = floor if provider == "gemm-floor" else loss
    benchmark.extra_info.update(peak_mib=peak_mib(call), threads=torch.get_num_threads(), torch=torch.__version__)
    benchmark.group = f"copynce_loss {mode} B{pairs} L{(side // patch_size) ** 2} D{channels}"
    benchmark.pedantic(call, rounds=7, warmup_rounds=2)
