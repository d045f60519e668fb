"""Neighbours that a run mines itself: which table a step uses, what a kill leaves, what cannot be mined."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from copynce.data import read_manifest
from copynce.errors import ConfigError, RunError, Stopped
from copynce.retrieval.describe import describe_lists
from copynce.retrieval.features import read_features
from copynce.retrieval.mining import mine
from copynce.training import TrainConfig, mined, read_events, train, trainer
from dali_pipelines import PairLoader

Tiny = Callable[..., TrainConfig]

#: Epochs of four steps; tables at the steps 0, 4 and 8.
MINED = (
    "mining.at_start=true",
    "mining.every=1",
    "mining.k=3",
    "data.batch_size=5",
    "optim.steps=10",
    "checkpoint_every=3",
    "model.drop_path=0.2",
    "device=cpu",
)


class Killed(Exception):
    pass


def table_hashes(run: Path) -> dict[str, str]:
    paths = sorted(run.glob("mined/*/made_from.json"))
    return {path.parent.name: json.loads(path.read_bytes())["sha256"] for path in paths}


def mined_at(run: Path) -> list[int]:
    return [event["step"] for event in read_events(run / "log.jsonl") if event["event"] == "neighbours mined"]


def test_a_step_uses_the_table_of_its_epoch_whatever_was_killed(
    tiny: Tiny, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[int, list[tuple[str, str]]] = {}

    class Spy(PairLoader):
        def __init__(self, batches: Any, *arguments: Any, **options: Any) -> None:
            for number, pairs in zip(batches.numbers, batches, strict=True):
                shown[number] = [(one.uuid, other.uuid) for one, other in zip(pairs[::2], pairs[1::2], strict=True)]
            super().__init__(batches, *arguments, **options)

    config = tiny(*MINED, "keep_checkpoints=9", out="whole")
    whole = Path(config.out)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "PairLoader", Spy)
        expected = load_file(train(config) / "model.safetensors")
    assert mined_at(whole) == [0, 4, 8]
    names = read_manifest(pictures).uuids
    tables = {epoch: np.load(whole / "mined" / f"epoch-{epoch:04d}" / "neighbours.npy") for epoch in range(3)}
    assert not np.array_equal(tables[0], tables[2])
    assert sorted(shown) == list(range(10))
    for step, pairs in shown.items():
        for one, other in pairs:
            assert names.index(other) in tables[step // 4][names.index(one)], step

    # What copynce extract and copynce knn make of the same weights.
    describe_lists(
        whole / "checkpoints/step-00000004/model.safetensors", {"a": read_manifest(pictures)}, tmp_path / "f"
    )
    rows = read_features(tmp_path / "f")
    mine(rows, rows, tmp_path / "knn.npy", k=3)
    assert np.array_equal(np.load(tmp_path / "knn.npy"), tables[1])

    def kill(*arguments: Any, **options: Any) -> None:
        raise Killed

    def kill_at_6(step: int) -> None:
        if step == 6:
            raise Killed

    config = tiny(*MINED, out="killed")
    run = Path(config.out)
    with monkeypatch.context() as patch:
        patch.setattr(mined, "mine", kill)  # the features are there
        with pytest.raises(Killed):
            train(config)
    assert list(run.glob("mined/epoch-0000/features/*.safetensors"))
    with pytest.raises(Killed):
        train(config, on_step=kill_at_6)
    with monkeypatch.context() as patch:
        patch.setattr(mined, "atomic_text", kill)  # the table is there, but not what it was made from
        with pytest.raises(Killed):
            train(config)
    assert (run / "mined/epoch-0002/neighbours.npy").exists()
    found = load_file(train(config) / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert table_hashes(run) == table_hashes(whole)
    assert not list(run.glob("mined/*/features"))
    assert mined_at(run) == [0, 4, 8]

    # Epochs that no checkpoint needs any more have no table; one that is needed must be as it was.
    longer = tiny(*MINED, "optim.steps=18", "keep_checkpoints=1", out="killed")
    spoilt = run / "mined/epoch-0002/neighbours.npy"
    before = spoilt.read_bytes()
    spoilt.write_bytes(before[:-1] + b"\7")
    with pytest.raises(RunError, match=r"epoch-0002/neighbours\.npy: the neighbours .* put the folder back"):
        train(longer)
    spoilt.write_bytes(before)
    train(longer)
    assert list(table_hashes(run)) == ["epoch-0000", "epoch-0004"]


def test_a_matcher_has_neighbours_of_a_descriptor(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is needed when it begins; a signal meanwhile ends it with what is done kept."""
    descriptor = Path(tiny("optim.steps=0", out="descriptor").out)
    train(tiny("optim.steps=0", out="descriptor"))
    matcher = ("objective=matcher", "mining.at_start=true", "optim.steps=2", "checkpoint_every=1", "device=cpu")
    config = tiny(*matcher, f"mining.model={descriptor}", out="matcher")
    run = Path(config.out)

    def stop(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        describe_lists(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mined, "describe_lists", stop)
        with pytest.raises(Stopped, match="SIGTERM between the steps, after step 0 of 2"):
            train(config)
    train(config)
    assert [event["event"] for event in read_events(run / "log.jsonl")] == ["stopped", "neighbours mined"]
    assert np.load(run / "mined/epoch-0000/neighbours.npy").shape == (24, 127)

    with pytest.raises(ConfigError, match=r"mining\.model=.*matcher is a matcher's, expected a descriptor's"):
        train(tiny(*matcher, f"mining.model={run}", out="other"))
    shutil.rmtree(descriptor)
    with pytest.raises(ConfigError, match=r"mining\.model: .*descriptor: expected a run folder"):
        train(tiny(*matcher, f"mining.model={descriptor}", out="other"))
    assert not (tmp_path / "other").exists()
    train(tiny(*matcher, "optim.steps=3", f"mining.model={descriptor}", out="matcher"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["mining.at_start=true", "data.neighbours=a.npy"],
            r"data\.neighbours=a\.npy are given already; leave out one",
        ),
        (["mining.every=2"], r"needs neighbours to begin with: give mining\.at_start=true, or data\.neighbours"),
        (["mining.every=0"], r"mining\.every must be at least 1"),
        (["mining.k=3"], r"mining\.k=3 needs a mining"),
        (["mining.model=x"], r"mining\.model=x mines at the start; give mining\.at_start=true too"),
        (["objective=matcher", "mining.at_start=true"], r"needs mining\.model, a descriptor that mines"),
        (
            ["objective=matcher", "mining.at_start=true", "mining.model=x", "mining.every=1"],
            r"mining\.every mines with a descriptor's weights; with objective=matcher leave it out",
        ),
        (
            ["data.pairs=supervised", "data.references=a", "data.ground_truth=b", "mining.at_start=true"],
            r"data\.train, which data\.pairs=supervised has not",
        ),
    ],
)
def test_a_mining_that_cannot_be_is_refused(tiny: Tiny, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(*overrides)
