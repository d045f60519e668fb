"""A training step on a processor against that of the released algorithm, in one run.

    python -m benchmarks.step [--pairs 16] [--size 224] [--threads N] [--rounds 5] [--json step.json]

ViT-S/16: forward of both sides, losses, backward, clipping, AdamW, on one batch that is there already. ``released``: as
PROTOCOLS describes it, in plain PyTorch: float32, a forward pass for each side, timm's blocks with fused attention,
CopyNCE from its equation, AdamW a parameter at a time. Against it ours in float32 and, where the processor has bf16
products, in bf16. Each is a process of its own that takes a step when asked, one after the other, `--rounds` times;
printed are the medians, their ratios, and of ours the share of the matrix products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WAYS = ("released", "fp32", "bf16")
"""What is measured: the released step, and ours in two precisions."""


def released_step(pairs: int, size: int) -> Callable[[], Any]:
    import torch
    from timm.models.vision_transformer import Block

    from copynce.losses import INITIAL_LOG_SCALE, copynce_loss, info_nce, koleo
    from copynce.models import build_descriptor

    torch.manual_seed(0)
    model = build_descriptor(img_size=size).train()
    for block in model.encoder.blocks:
        block.__class__ = Block
    log_scale = torch.nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
    optimizer = torch.optim.AdamW([*model.parameters(), log_scale], lr=1e-5, weight_decay=0.04)
    batch = _batch(pairs, size, "fp32")

    def step() -> torch.Tensor:
        (query, query_tokens), (reference, reference_tokens) = model(batch.query), model(batch.reference)
        assert query_tokens is not None
        assert reference_tokens is not None
        tables = batch.query_to_reference, batch.reference_to_query
        copynce = copynce_loss(query_tokens, reference_tokens, *tables, patch_size=16, gamma=3.0, backend="reference")
        loss = 5 * copynce + info_nce(query, reference, log_scale) + 5 * koleo(query, reference)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        return loss.detach()

    return step


def our_step(pairs: int, size: int, precision: str) -> Callable[[], Any]:
    from benchmarks.gpu_parts import Step
    from copynce.models.memory import keep_heap

    keep_heap()
    return Step(_config(pairs, size, precision), _batch(pairs, size, precision))


def _batch(pairs: int, size: int, precision: str) -> Any:
    import torch

    from benchmarks.gpu_parts import fixed_batch

    torch.manual_seed(1)
    return fixed_batch(_config(pairs, size, precision))


def _config(pairs: int, size: int, precision: str) -> Any:
    from copynce.training import TrainConfig, load_config

    chosen = [f"precision={precision}", f"model.img_size={size}", f"data.batch_size={pairs}", "device=cpu"]
    return load_config(TrainConfig, None, [*chosen, "out=nowhere", "data.train=nothing"])


def product_share(step: Callable[[], Any]) -> float:
    """Of a step's time the share of its matrix products."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    rows = seen.key_averages()
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution")
    return sum(row.self_cpu_time_total for row in rows if row.key in products) / sum(
        row.self_cpu_time_total for row in rows
    )


def serve(way: str, pairs: int, size: int, threads: int) -> None:
    """Take a step for each line that comes in, and print its seconds; for the line `share` the products' share."""
    import torch

    torch.set_num_threads(threads)
    step = released_step(pairs, size) if way == "released" else our_step(pairs, size, way)
    for _ in range(2):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        value = product_share(step) if line.strip() == "share" else (step(), time.perf_counter() - start)[1]
        print(value, flush=True)


def measure(pairs: int, size: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each way: `step`, median `seconds`, `ratio` to the released step, `products` (share)."""
    from copynce.processor import multiplies_bfloat16

    ways = [way for way in WAYS if way != "bf16" or multiplies_bfloat16()]
    arguments = ["--pairs", pairs, "--size", size, "--threads", threads]
    servers = {
        way: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step", "--serve", way, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in ways
    }
    try:
        for server in servers.values():
            _answer(server)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, server in servers.items():
                seconds[way].append(float(_answer(server, "step")))
        shares = {way: float(_answer(server, "share")) for way, server in servers.items()}
    finally:
        for server in servers.values():
            server.kill()
            server.communicate()
    medians = {way: statistics.median(seconds[way]) for way in ways}
    return [
        {
            "step": way,
            "seconds": round(medians[way], 4),
            "range": [round(min(seconds[way]), 4), round(max(seconds[way]), 4)],
            "ratio": round(medians["released"] / medians[way], 3),
            "products": round(shares[way], 3),
        }
        for way in ways
    ]


def _answer(server: subprocess.Popen[str], line: str | None = None) -> str:
    assert server.stdin is not None
    assert server.stdout is not None
    if line is not None:
        server.stdin.write(line + "\n")
        server.stdin.flush()
    answer = server.stdout.readline().strip()
    if not answer:
        raise SystemExit(f"benchmarks.step: a step ended with status {server.wait()}; its error stands above")
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.serve:
        serve(given.serve, given.pairs, given.size, given.threads)
        return 0
    rows = measure(given.pairs, given.size, given.threads, given.rounds)
    for row in rows:
        print(json.dumps(row))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
