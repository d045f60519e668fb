"""The process group: what a launcher may say in the environment, and processes of which one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from copynce.errors import ConfigError
from copynce.training.distributed import Launch, _first_host, choose_device, launch

SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}
TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def announce(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in TWO | SRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_is_alone_unless_a_launcher_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, {"RANK": "3", "LOCAL_RANK": "3"})
    assert launch() == Launch(0, 1, 0)
    announce(monkeypatch, {"WORLD_SIZE": "1"})
    assert launch() == Launch(0, 1, 0)
    announce(monkeypatch, TWO)
    assert launch() == Launch(1, 2, 1, "127.0.0.1:29500")


def test_a_task_of_srun_is_a_process_of_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, SRUN)
    here = launch()
    assert (here.rank, here.size, here.local_rank, here.by_srun) == (11, 16, 3, True)
    host, port = here.place.split(":")
    assert host == "gpu003"
    assert 12000 <= int(port) < 32000
    announce(monkeypatch, {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert launch().place == here.place
    announce(monkeypatch, {**SRUN, "SLURM_STEP_ID": "1"})
    assert launch().place != here.place
    announce(monkeypatch, {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert launch().place == "10.0.0.1:29500"
    announce(monkeypatch, {**SRUN, **TWO})  # srun torchrun ...
    assert launch() == Launch(1, 2, 1, "127.0.0.1:29500")
    announce(monkeypatch, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"})
    assert launch() == Launch(0, 1, 0)
    announce(monkeypatch, {name: value for name, value in SRUN.items() if "STEP" not in name})  # the batch script
    assert launch() == Launch(0, 1, 0)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu7", "gpu7"), ("a1,b2", "a1"), ("gpu[007,9-11],a1", "gpu007"), ("r[2-3]n[04-06].x", "r2n04.x"), ("", "")],
)
def test_the_first_machine_of_slurms_list(hosts: str, first: str) -> None:
    assert _first_host(hosts) == first


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_PROCID", "16", r"has SLURM_STEP_NUM_TASKS='16'.* so SLURM_PROCID must be .* to 15, got '16'; .*srun"),
        ("SLURM_LOCALID", "", r"SLURM_LOCALID must be a whole number from 0 to 15, got ''"),
        ("SLURM_STEP_NODELIST", "", r"SLURM_STEP_NODELIST must be the machines' names, got ''"),
    ],
)
def test_half_of_what_srun_says_is_one_sentence(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, {**SRUN, name: value})
    with pytest.raises(ConfigError, match=message):
        launch()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"WORLD_SIZE": ""}, r"WORLD_SIZE must be a whole number of at least 1, got ''"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE must be .*, got 'two'"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE must be .*, got '0'"),
        ({"WORLD_SIZE": "1"}, r"RANK must be a whole number from 0 to 0, got '1'"),
        ({"RANK": "2"}, r"RANK must be a whole number from 0 to 1, got '2'"),
        ({"RANK": None}, r"RANK must be .*, got none; start with torchrun, or unset WORLD_SIZE"),
        ({"RANK": "-1"}, r"RANK must be .*, got '-1'"),
        ({"LOCAL_RANK": "x"}, r"LOCAL_RANK must be .*, got 'x'"),
        ({"MASTER_ADDR": None}, r"MASTER_ADDR must be the first machine's name, got none"),
        ({"MASTER_PORT": None}, r"MASTER_PORT must be .*, got none"),
        ({"MASTER_PORT": "99999"}, r"MASTER_PORT must be a whole number from 0 to 65535, got '99999'"),
    ],
)
def test_an_environment_that_says_half_of_it_is_one_sentence(
    changed: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, {name: value for name, value in {**TWO, **changed}.items() if value is not None})
    with pytest.raises(ConfigError, match=message):
        launch()


def test_more_processes_than_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, TWO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=1, but 1 GPUs are visible"):
        choose_device("auto")
    assert choose_device("cpu").type == "cpu"
    announce(monkeypatch, SRUN)  # --gpus-per-task=1: each sees one, its own
    assert choose_device("gpu") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"SLURM_LOCALID=3, but 2 GPUs are visible"):
        choose_device("gpu")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of two processes each, by the name of the case."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "empty").mkdir()
    right = ["train", "device=cpu", f"out={folder / 'run'}", "data.train=nowhere"]
    wrong = [*right, "optim.lr=1,5"]
    cases = {
        "first": [wrong, right],
        "second": [right, wrong],
        "both": [wrong, wrong],
        "data of the second": [[*right, f"data.train={folder / 'empty'}"], [*right, f"data.train={folder / 'absent'}"]],
    }
    found = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("launch_worker.py")),
            str(folder),
            json.dumps(list(cases.values())),
        ],
        check=True,
        timeout=900,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert not (folder / "run").exists()
    return dict(zip(cases, json.loads(found.stdout), strict=True))


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("first", "optim.lr must be a number, got '1,5'"),
        ("second", "optim.lr must be a number, got '1,5'"),
        ("both", "optim.lr must be a number, got '1,5'"),
        ("data of the second", "no picture in this folder"),
    ],
)
def test_what_is_wrong_on_one_process_ends_all_with_one_sentence(
    case: str, sentence: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    found = outcomes[case]
    assert found["statuses"] == [2, 2]
    text = "".join(found["errors"])
    assert text.count("copynce train: ") == 1
    assert sentence in text
    assert "Traceback" not in text
    assert found["seconds"] < 50  # not the time that a process waits for others who never come
