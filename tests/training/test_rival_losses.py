"""A few training steps with the rivals of CopyNCE: they run, their part of the loss is their own, and it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from copynce.errors import ConfigError
from copynce.training import TrainConfig, read_log, train


@pytest.mark.parametrize(("target", "form"), [("feature", "cosine"), ("both", "nce")])
def test_a_rival_trains(tiny: Callable[..., TrainConfig], target: str, form: str) -> None:
    logs = []
    for overrides in ([f"loss.target={target}", f"loss.form={form}", "loss.neighbours=2"], []):
        config = tiny("optim.steps=2", *overrides, out=f"run{len(overrides)}")
        train(config)
        logs.append(read_log(Path(config.out) / "log.jsonl"))
    rival, own = logs
    assert rival[0]["copynce"] != own[0]["copynce"]
    assert rival[0]["info_nce"] == own[0]["info_nce"]  # the same first batch and weights
    assert rival[1]["info_nce"] != own[1]["info_nce"]  # another step was taken
    assert all(line["gradient_norm"] > 0 for line in rival)


def test_neighbours_must_be_positive(tiny: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match=r"loss\.neighbours must be at least 1, got 0"):
        tiny("loss.neighbours=0")
