"""A step whose loss or gradient is no number: no weight moves, the step is kept, and its replay says where it began."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from copynce.cli import main
from copynce.config import save_config
from copynce.errors import ConfigError, RunError, TrainingError
from copynce.training import DescriptorObjective, TrainConfig, checkpoints, read_events, train
from copynce.training.first_fault import FirstFault
from copynce.training.replay import replay
from dali_pipelines import PairBatch

Tiny = Callable[..., TrainConfig]


def poisoned(tiny: Tiny, folder: Path) -> Path:
    """A file of weights with a number from which infinities follow."""
    start = train(tiny("optim.steps=0", out="start"))
    found = load_file(start / "model.safetensors")
    found["encoder.blocks.1.mlp.fc2.bias"][0] = 3e38
    encoder = {name.removeprefix("encoder."): value for name, value in found.items() if name.startswith("encoder.")}
    save_file(encoder, folder / "poisoned.safetensors")
    return folder / "poisoned.safetensors"


def test_a_step_that_fails_is_kept_and_its_replay_names_the_layer(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(f"weights={poisoned(tiny, tmp_path)}", "optim.accumulate=2", out="nan")
    kept = Path(config.out) / "failed-step-00000000" / "step.json"
    with pytest.raises(TrainingError, match=r"step 0: the gradient is not finite .*--replay .*step-00000000"):
        train(config)
    told = json.loads(kept.read_text())
    assert told["processes"][0]["numbers"]["loss"] == "nan"
    batches = told["processes"][0]["batches"]
    assert [len(batch) for batch in batches] == [4, 4]
    assert {"uuid", "positive", "traced", "query", "query_program"} <= batches[0][0].keys()
    assert [event["event"] for event in read_events(Path(config.out) / "log.jsonl")] == ["weights", "not finite"]

    capsys.readouterr()
    assert main(["train", "--replay", str(kept), "threads=1"]) == 0
    lines = capsys.readouterr().out
    assert "the first that holds what is no number is that of heads.linear_head.bn, BatchNorm" in lines
    assert "pictures            all hold numbers" in lines
    assert "no number: copynce, info_nce, koleo" in lines
    with pytest.raises(ConfigError, match=r"repeats a step as it was, got optim\.lr; leave that out"):
        replay(kept, ["optim.lr=1"])
    # What was at fault is mended: the same batch gives numbers.
    mended = load_file(kept.parent / "weights.safetensors")
    mended["model.encoder.blocks.1.mlp.fc2.bias"][0] = 0
    save_file(mended, kept.parent / "weights.safetensors")
    found = replay(kept)
    assert not found.repeats
    assert "it does not repeat" in found.lines[-1]


def test_no_weight_moves_although_it_is_noticed_a_step_later(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [0], DescriptorObjective.forward

    def failing(self: DescriptorObjective, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, measures = forward(self, *arguments)
        calls[0] += 1
        return loss + (torch.inf if calls[0] == 3 else 0), measures  # whose gradient is a number

    monkeypatch.setattr(DescriptorObjective, "forward", failing)
    config = tiny("checkpoint_every=2", "log_every=100")
    with pytest.raises(TrainingError, match=r"step 2: .*loss inf.*, and no weight has moved"):
        train(config)
    assert calls == [4]
    before = load_file(checkpoints(Path(config.out))[-1] / "model.safetensors")
    after = load_file(Path(config.out) / "failed-step-00000002" / "weights.safetensors")
    assert checkpoints(Path(config.out))[-1].name == "step-00000002"
    for name, value in before.items():
        if ".bn." not in name:  # its statistics are of the pictures it saw
            assert torch.equal(value, after[f"model.{name}"]), name


def test_the_replay_of_two_processes_takes_two(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(f"weights={poisoned(tiny, tmp_path)}", "data.batch_size=2", out="two")
    save_config(config, tmp_path / "two.yaml")
    kept = f"{config.out}/failed-step-00000000/step.json"
    cases = [[["train", str(tmp_path / "two.yaml")]] * 2, [["train", "--replay", kept]] * 2]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launch_worker.py")), str(tmp_path), json.dumps(cases)],
        check=True,
        capture_output=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    failed, again = json.loads(done.stdout.splitlines()[-1])
    assert failed["statuses"] == [3, 3], failed["errors"]
    assert sum(text.count("the gradient is not finite") for text in failed["errors"]) == 1
    assert again["statuses"] == [0, 0], again["errors"]
    told = json.loads(Path(kept).read_text())["processes"]
    assert len({pair["uuid"] for process in told for pair in process["batches"][0]}) == 4
    lines = done.stdout.decode()
    assert lines.index("process 0") < lines.index("process 1")
    assert lines.count("that of heads.linear_head.bn") == 2
    with pytest.raises(RunError, match="2 processes made this step, here is 1; start as many"):
        replay(kept)


def test_a_picture_that_is_no_number_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    views, tables, every = torch.randn(2, 3, 3, 2, 2), torch.zeros(2, 3, 2, 2, dtype=torch.int32), [True] * 3
    views[1, 2, 0, 0, 0] = torch.inf
    batch = PairBatch(*views, *tables, torch.tensor(every), torch.tensor(every), list("abc"))
    with FirstFault(model) as search:
        for one in search.watched([batch]):
            model(torch.cat([one.query, one.reference])).sum().backward()
    assert search.pictures == ["reference of c"]
    assert (
        search.output == "that of 0, Flatten: 1 of 72 values, in reference of c; the largest number that goes in is inf"
    )
    assert search.gradient is None


def test_a_gradient_that_alone_is_no_number_is_named() -> None:
    class Root(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return (values * 0).sqrt()  # whose slope is infinity times 0

    model = nn.Sequential(nn.Linear(2, 2, bias=False), Root())
    nn.init.ones_(model[0].weight)
    views, every = torch.ones(2, 1, 3, 2, 2), torch.ones(1, dtype=torch.bool)
    batch = PairBatch(*views, *torch.zeros(2, 1, 2, 2, dtype=torch.int32), every, every, ["a"])
    with FirstFault(model) as search:
        for _ in search.watched([batch]):
            model(-torch.ones(1, 2)).sum().backward()
    assert search.output is None
    assert search.gradient == "that of 0, Linear: 2 of 2 values"


def test_what_is_no_failed_step_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"step\.json cannot be read .* expected RUN/failed-step-NUMBER"):
        replay(tmp_path / "step.json")
    (tmp_path / "step.json").write_text("{}")
    with pytest.raises(RunError, match="tells of no failed step"):
        replay(tmp_path / "step.json")
