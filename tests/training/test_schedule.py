from __future__ import annotations

import json
from pathlib import Path

import pytest

from copynce.training.schedule import cosine_schedule, scaled_lr


def test_equals_the_released_schedule(oracle: Path) -> None:
    for case in json.loads((oracle / "lr_schedule.json").read_text()).values():
        lr = scaled_lr(case["base_lr"], case["batch_per_gpu"] * case["gpus"])
        assert lr == pytest.approx(case["lr_after_scaling"], rel=1e-12)
        steps = case["steps_per_epoch"]
        at = cosine_schedule(
            lr, total=steps * case["epochs"], warmup=steps * case["warmup_epochs"], min_lr=case["min_lr"]
        )
        assert [at(step) for step in range(len(case["lr_used_at_step"]))] == pytest.approx(
            case["lr_used_at_step"], rel=1e-12
        )


def test_without_warm_up_it_starts_at_the_top() -> None:
    at = cosine_schedule(1.0, total=10, warmup=0, min_lr=0.1)
    assert at(0) == 1.0
    assert at(10) == pytest.approx(0.1)


@pytest.mark.parametrize(("steps", "last"), [(30 * 1302, 3.4e-6), (30 * 3906, 3.4e-6)])
def test_last_step_stays_above_the_floor(steps: int, last: float) -> None:
    at = cosine_schedule(5.196e-4, total=steps, warmup=steps // 30, min_lr=2e-6)
    assert at(steps - 1) == pytest.approx(last, rel=0.05)
