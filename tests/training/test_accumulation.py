"""Several batches a step: what they equal, what they do not, and what the log has of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from copynce.errors import RunError
from copynce.training import TrainConfig, checkpoints, read_events, read_log, train

pytestmark = pytest.mark.numeric

Tiny = Callable[..., TrainConfig]


def log_of(config: TrainConfig) -> list[dict[str, float]]:
    return read_log(Path(config.out) / "log.jsonl")


LOSSES = "loss", "copynce", "bce"
PATCHES = "traced_patches", "prior_mass", "affinity_entropy", "patch_retrieval"


def test_batches_of_a_matchers_step_equal_one_as_large(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(groups: Any, lr: float, betas: tuple[float, float], fused: bool) -> torch.optim.SGD:
        """In AdamW's place, which would make a step of what rounding leaves of a gradient that is zero."""
        return torch.optim.SGD(groups, lr=lr, fused=fused)

    monkeypatch.setattr(torch.optim, "AdamW", plain)
    options = ("objective=matcher", "optim.lr=0.5", "optim.steps=3")
    whole, parts = (
        tiny(*options, *changed, out=changed[0])
        for changed in (("data.batch_size=12",), ("data.batch_size=4", "optim.accumulate=3"))
    )
    expected, found = (load_file(train(config) / "model.safetensors") for config in (whole, parts))
    start = load_file(checkpoints(Path(whole.out))[0] / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    assert max(float((value - start[name]).abs().max()) for name, value in expected.items()) > 0.01
    assert log_of(parts)[0].keys() == log_of(whole)[0].keys()
    for one, other in zip(log_of(parts), log_of(whole), strict=True):
        for key in (*LOSSES, "accuracy", "positives", "lr", "gradient_norm", "epoch", *PATCHES):
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7), key


def test_a_run_may_divide_its_steps_otherwise_but_not_make_them_larger(tiny: Tiny) -> None:
    train(tiny("data.batch_size=8", "optim.steps=1"))
    with pytest.raises(RunError, match="items=8, got 16"):
        train(tiny("data.batch_size=8", "optim.accumulate=2", "optim.steps=2"))
    config = tiny("data.batch_size=4", "optim.accumulate=2", "optim.steps=2")
    train(config)
    (event,) = read_events(Path(config.out) / "log.jsonl")
    assert "optim.accumulate 1 -> 2" in event["text"]
    assert "InfoNCE and KoLeo compare the pairs of another number" in event["text"]
    first, second = log_of(config)
    assert second["epoch"] == pytest.approx(2 * first["epoch"])
