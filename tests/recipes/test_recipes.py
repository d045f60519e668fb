"""Named runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from copynce.config import load_config, save_config
from copynce.errors import ConfigError
from copynce.recipes import RECIPES, named_run, sentence
from copynce.training import TrainConfig

NEEDED = {
    "descriptor": ["data.train=list.csv"],
    "matcher": ["data.train=list.csv"],
    "supervised": ["data.queries=q.csv", "data.references=r.csv", "data.ground_truth=gt.json"],
}
NEEDED["mixture"] = NEEDED["matcher"] + NEEDED["supervised"]


def config(name: str, *overrides: str) -> TrainConfig:
    run = named_run(name)
    return load_config(TrainConfig, run, ["out=run", *NEEDED[run.get("data.pairs", "descriptor")], *overrides])


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_run_is_a_whole_run_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    found = config(name)
    save_config(found, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml", []) == found
    assert sentence(name).endswith((".", "FILE."))


def test_no_two_names_are_one_run() -> None:
    assert len({repr(config(name)) for name in RECIPES}) == len(RECIPES)


def test_what_is_typed_wins_over_the_recipe() -> None:
    assert config("descriptor-vits14-112").model.img_size == 112
    assert config("descriptor-vits14-112", "model.img_size=56").model.img_size == 56


def test_a_recipe_says_only_what_differs_from_the_run_that_it_takes() -> None:
    assert config("ablation-gamma-inf").loss.gamma == math.inf
    assert RECIPES["ablation-weight-0"]({"optim.lr": 1e-3})["optim.lr"] == 1e-3
    defaults = config("descriptor", "data.threads=2")
    assert defaults == load_config(TrainConfig, None, ["out=run", "data.train=list.csv"])


def test_a_name_that_is_none_is_told_with_near_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"'descripter' is neither a file of settings nor a named run; did you mean desc"
    ):
        named_run("descripter")
