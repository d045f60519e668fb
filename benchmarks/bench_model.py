"""Descriptor on the CPU: evaluation forward, and a training step's forward and backward, in pictures per second.

`pictures_per_s` and `gflop_per_s` stand beside each time; `gemm_gflop_per_s`, one large float32 matrix product with as
many threads, is what the processor gives at most. The output's shape and length are checked before the clock starts.

    pytest benchmarks/bench_model.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from copynce.models import Descriptor, build_descriptor

BATCH = 32  # pictures, both sides together
BACKBONE = "vit_small_patch14_dinov2"


@pytest.fixture(params=[1, 2], ids=["threads1", "threads2"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gemm_gflop_per_s() -> float:
    """Of the largest product of a block at 112 px, the best of five."""
    left, right = torch.randn(BATCH * 65, 384), torch.randn(384, 1536)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * left.shape[0] * 384 * 1536 / min(seconds[1:]) / 1e9


def evaluate(model: Descriptor, images: torch.Tensor) -> None:
    with torch.inference_mode():
        model(images)


def step(model: Descriptor, images: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    descriptor, tokens = model(images, sides=2)
    (descriptor.sum() + tokens.square().mean()).backward()


@pytest.mark.parametrize("size", [112, 168])
@pytest.mark.parametrize("mode", ["forward", "full"])
def test_descriptor(benchmark, threads: int, size: int, mode: str) -> None:  # type: ignore[no-untyped-def]
    model = build_descriptor(BACKBONE, img_size=size)
    images = torch.randn(BATCH, 3, size, size)
    run = evaluate if mode == "forward" else step
    model.train(mode == "full")
    descriptor, tokens = model(images[:4], sides=2)
    assert tokens.shape == (4, (size // 14) ** 2, 384)
    torch.testing.assert_close(descriptor.norm(dim=1), torch.ones(4))
    with FlopCounterMode(display=False) as counter:
        run(model, images)
    benchmark.pedantic(run, args=(model, images), rounds=3, warmup_rounds=1)
    benchmark.extra_info["gemm_gflop_per_s"] = round(gemm_gflop_per_s(), 1)
    benchmark.extra_info["torch"] = torch.__version__
    if benchmark.enabled:
        median = benchmark.stats.stats.median
        benchmark.extra_info["pictures_per_s"] = round(BATCH / median, 2)
        benchmark.extra_info["gflop_per_s"] = round(counter.get_total_flops() / median / 1e9, 1)
