"""Evaluations while training: they change nothing of it, the best checkpoint stays, two processes share them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from copynce.config import save_config
from copynce.data import open_pictures
from copynce.errors import ConfigError, Stopped
from copynce.evaluation.descriptor import evaluate_descriptor
from copynce.evaluation.protocols import Evaluation, evaluate
from copynce.models import load_checkpoint
from copynce.models.weight_files import file_of
from copynce.training import TrainConfig, checkpoints, evaluations, find_model, read_events, read_log, train
from copynce.training.checkpoints import best_checkpoint
from copynce.training.log import RunLog

Tiny = Callable[..., TrainConfig]


@pytest.fixture
def split(pictures: Path, tmp_path: Path) -> tuple[str, ...]:
    """Every second picture "copies" the one before it in the list."""
    names = sorted(path.stem for path in pictures.iterdir())
    (tmp_path / "gt.json").write_text(json.dumps({name: [names[i - 1]] for i, name in enumerate(names) if i % 2}))
    truth = f"evaluate.ground_truth={tmp_path / 'gt.json'}"
    return (f"evaluate.queries={pictures}", f"evaluate.references={pictures}", truth)


def evaluated(run: Path) -> dict[int, dict[str, Any]]:
    found = [event for event in read_events(run / "log.jsonl") if event["event"] == "evaluation"]
    assert len({event["step"] for event in found}) == len(found)
    return {event["step"]: event for event in found}


def test_training_is_the_same_and_the_best_checkpoint_stays(
    tiny: Tiny, split: tuple[str, ...], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("optim.steps=8", "checkpoint_every=9", "model.drop_path=0.2", "ema=0.5", "optim.lr=0.01", "device=cpu")
    alone = train(tiny(*options, out="alone"))
    drawn: dict[str, list[int]] = {}

    def draw(log: RunLog, step: int, values: dict[str, float]) -> None:
        for name in values:
            drawn.setdefault(name, []).append(step)

    def stop(*arguments: Any, progress: Callable[[str, int, int], None], **settings: Any) -> Evaluation:
        def tell(role: str, done: int, total: int) -> None:
            if role == "reference" and arguments[-1].name == "step-00000006":
                os.kill(os.getpid(), signal.SIGTERM)
            progress(role, done, total)

        return evaluate(*arguments, progress=tell, **settings)

    config = tiny(*options, *split, "evaluate.every=2", "keep_checkpoints=1", out="run")
    run = Path(config.out)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "draw", draw)
        patch.setattr(evaluations, "evaluate", stop)
        with pytest.raises(Stopped, match=r"between the steps, after step 6 of 8, saved as .*step-00000006"):
            train(config)
    # What was described before the signal is not described again.
    kept = {path: path.stat().st_mtime_ns for path in run.glob("evaluations/step-00000006/features/*.safetensors")}
    assert len(kept) == 1
    times: dict[Path, int] = {}

    def look(*arguments: Any, **settings: Any) -> Evaluation:
        found = evaluate(*arguments, **settings)
        times.update((path, path.stat().st_mtime_ns) for path in kept if path.parents[1] == arguments[-1])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(evaluations, "evaluate", look)
        last = train(config)
    assert times == kept
    for name, value in load_file(alone / "model.safetensors").items():
        assert torch.equal(load_file(last / "model.safetensors")[name], value), name
    first, second = (read_log(folder.parents[1] / "log.jsonl") for folder in (alone, last))
    assert [line["loss"] for line in second] == [line["loss"] for line in first]

    found = evaluated(run)
    assert list(found) == [2, 4, 6, 8]
    assert drawn["evaluation/uap"] == [2, 4]
    best = max(found, key=lambda step: found[step]["uap"])
    assert [step for step in found if found[step]["best"]][-1] == best
    folder = best_checkpoint(run)
    assert folder is not None
    assert folder.name == f"step-{best:08d}"
    assert {folder, last} <= set(checkpoints(run)) <= {run / "checkpoints/step-00000000", folder, last}
    assert not list(run.glob("evaluations/*/features"))
    mark = run / "checkpoints/best"
    assert mark.is_file()
    told = json.loads(mark.read_text())
    assert (told["checkpoint"], told["uap"]) == (folder.name, found[best]["uap"])
    # The documented name, and the number that copynce eval gives: of the mean weights, which the file holds.
    file = find_model(mark)
    assert file == folder / "model.safetensors"
    assert file_of(mark) == file
    model_split = open_pictures(pictures, pictures, ground_truth=tmp_path / "gt.json")
    metrics = evaluate_descriptor(load_checkpoint(file), model_split, tmp_path / "eval")
    assert metrics["uap"] == found[best]["uap"]

    # One that counts as none, having no evaluation, gives way at once; a link, as runs of before have it, too.
    mark.unlink()
    mark.symlink_to(checkpoints(run)[0].name)
    assert best_checkpoint(run) == checkpoints(run)[0]
    last = train(tiny(*options, *split, "evaluate.every=2", "keep_checkpoints=1", "optim.steps=10", out="run"))
    found = evaluated(run)
    better = max((8, 10), key=lambda step: found[step]["uap"])
    assert best_checkpoint(run) == run / f"checkpoints/step-{better:08d}"
    assert not mark.is_symlink()
    assert last == run / "checkpoints/step-00000010"


def test_a_matcher_is_evaluated_on_pairs_that_are_given(
    tiny: Tiny, split: tuple[str, ...], pictures: Path, tmp_path: Path
) -> None:
    names = sorted(path.stem for path in pictures.iterdir())
    rows = [f"{query},{reference}" for i, query in enumerate(names) for reference in (names[i - 1], names[i - 2])]
    (tmp_path / "pairs.csv").write_text("\n".join(["query_id,reference_id", *rows]))
    options = (
        "objective=matcher",
        *split,
        "evaluate.every_epochs=1",
        "data.batch_size=8",
        "optim.steps=4",
        "device=cpu",
    )
    with pytest.raises(ConfigError, match=r"needs evaluate\.candidates=FILE, the pairs to score"):
        tiny(*options)
    config = tiny(*options, f"evaluate.candidates={tmp_path / 'pairs.csv'}")
    train(config)
    found = evaluated(Path(config.out))
    assert list(found) == [3, 4]
    assert 0 < found[3]["uap"] < 1
    assert not list(Path(config.out).glob("evaluations/*/scores"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.every=5"], r"evaluate\.every needs pictures: evaluate\.dataset=FOLDER"),
        (["evaluate.dataset=x"], r"evaluate\.dataset needs evaluate\.every=STEPS or evaluate\.every_epochs"),
        (["evaluate.every=5", "evaluate.every_epochs=1", "evaluate.dataset=x"], "leave out one"),
        (["evaluate.every=5", "evaluate.dataset=x", "evaluate.queries=y"], r"evaluate\.dataset=x has its own"),
        (
            ["evaluate.every=5", "evaluate.dataset=x", "evaluate.candidates=y"],
            r"is for objective=matcher; leave it out",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(tiny: Tiny, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(*overrides)


def test_a_split_without_ground_truth_is_refused_before_anything_is_written(tiny: Tiny, split: tuple[str, ...]) -> None:
    config = tiny(*split[:2], "evaluate.every=1")
    with pytest.raises(ConfigError, match=r"has no ground truth .* give evaluate\.ground_truth=FILE"):
        train(config)
    assert not Path(config.out).exists()


def test_two_processes_mine_and_evaluate_together(
    tiny: Tiny, split: tuple[str, ...], tmp_path: Path, run_worker: Callable[..., str]
) -> None:
    """2 x 5 items are 1 x 10: the same table from the same first weights, and each event once."""
    options = ("mining.at_start=true", "evaluate.every=2", "device=cpu", "optim.steps=2", *split)
    one = Path(train(tiny(*options, "data.batch_size=10", out="one")).parents[1])
    config = tiny(*options, "data.batch_size=5", out="two")
    save_config(config, tmp_path / "two.yaml")
    printed = run_worker("launch_worker.py", str(tmp_path), json.dumps([[["train", str(tmp_path / "two.yaml")]] * 2]))
    (found,) = json.loads(printed.splitlines()[-1])
    assert found["statuses"] == [0, 0], found["errors"]
    tables = [(run / "mined/epoch-0000/neighbours.npy").read_bytes() for run in (one, Path(config.out))]
    assert tables[0] == tables[1]
    for run in (one, Path(config.out)):
        events = [(event["event"], event["step"]) for event in read_events(run / "log.jsonl")]
        assert events == [("neighbours mined", 0), ("evaluation", 2)]
        assert best_checkpoint(run) is not None
    first, second = evaluated(one), evaluated(Path(config.out))
    for step, event in first.items():
        assert second[step]["uap"] == pytest.approx(event["uap"], abs=0.05)  # weights differ by rounding
