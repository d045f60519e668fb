"""Where a run's numbers go, and those that only a GPU has, with both pretended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from copynce.errors import ConfigError
from copynce.training import TrainConfig, read_log, train, trainer
from copynce.training.step_cost import step_cost

Tiny = Callable[..., TrainConfig]


class FakeRun:
    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.finished = options, list[dict[str, float]](), False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_what_the_log_gets_and_a_run_that_continues_keeps_its_id(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(**options))
        return runs[-1]

    fake = ModuleType("wandb")
    fake.init, fake.Error = init, RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    # A processor with a peak, as if it were a GPU.
    monkeypatch.setattr(trainer, "peak_flops", lambda device, precision: 1e12)
    config = tiny("wandb=copies", "optim.steps=2")
    train(config)
    train(tiny("wandb=copies", "optim.steps=3"))
    log = read_log(Path(config.out) / "log.jsonl")
    assert [line for run in runs for line in run.logged] == log
    assert all(run.finished for run in runs)
    assert {run.options["id"] for run in runs} == {(Path(config.out) / "wandb-id.txt").read_text().strip()}
    first = runs[0].options
    assert (first["project"], first["name"], first["resume"]) == ("copies", "run", "allow")
    assert first["config"]["optim"]["steps"] == 2
    cost = step_cost(trainer.make_objective(config).model, 8, half=False)
    for line in log:
        assert line["mfu"] == pytest.approx(line["pictures_per_second"] * cost.flop / 8 / 1e12)


def test_wandb_that_is_not_there_is_told_before_anything_is_made(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # a folder that it left
    with pytest.raises(ConfigError, match=r"needs the package wandb.*pip install 'copynce\[wandb\]'"):
        train(tiny("wandb=copies"))
    assert not Path(tiny().out).exists()
