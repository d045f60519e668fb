from __future__ import annotations

from pathlib import Path

import pytest

from copynce.config import build_config, load_config, save_config
from copynce.errors import ConfigError
from copynce.training.config import TrainConfig

REQUIRED = ["out=run", "data.train=list.csv"]


def test_file_and_overrides_make_one_typed_config(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {train: a.csv, batch_size: 8}\nout: run\noptim: {lr: 1.0e-4, betas: [0.8, 0.9]}\n")
    config = load_config(TrainConfig, file, ["data.batch_size=16", "model.backbone_options.depth=2", "optim.steps=3"])
    assert config.data.batch_size == 16
    assert config.data.train == "a.csv"
    assert config.optim.lr == pytest.approx(1e-4)
    assert config.optim.betas == (0.8, 0.9)
    assert config.optim.steps == 3
    assert config.model.backbone_options == {"depth": 2}
    assert config.loss.gamma == 3.0  # not named: the released value


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    config = load_config(TrainConfig, None, [*REQUIRED, "model.dim=64", "weights=w.safetensors"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml", []) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"unknown setting optim\.learning_rate; did you mean"),
        ("data.batchsize=4", r"unknown setting data\.batchsize; did you mean data\.batch_size"),
        ("batch_size=4", r"unknown setting batch_size; did you mean .*data\.batch_size"),
        ("lr=4", r"unknown setting lr; did you mean .*optim\.lr"),
        ("data.batch_size=many", r"data\.batch_size: .*'many'"),
        ("data.batch_size=1", r"data\.batch_size must be at least 2, got 1"),
        ("data.plan=pairs", r"data\.plan: .*pairs"),
        ("data.plan=supervised", r"data\.references must be given with data\.plan=supervised, got None"),
        ("data.references=r.csv", r"data\.references must be none with data\.plan=descriptor, got 'r\.csv'"),
        ("data.ground_truth=gt.json", r"data\.ground_truth must be none with data\.plan=descriptor, got 'gt\.json'"),
        ("data.neighbour_columns=7", r"data\.neighbour_columns needs a file of neighbours, data\.neighbours=FILE"),
        ("data.neighbour_columns=0", r"data\.neighbour_columns must be at least 1, got 0"),
        ("data.augment_probability=0.5", r"data\.augment_probability must be 0 with data\.plan=descriptor, got 0\.5"),
        ("data.augment_probability=2", r"data\.augment_probability must be in \[0, 1\], got 2"),
        ("loss.prior=papr", r"loss\.prior: .*papr"),
        ("loss.temperature=0.02", r"loss\.temperature must be above 0\.025"),
        ("model.head=pool", r"head"),
        ("optim=3", r"optim must be a mapping"),
        ("nonsense", r"key=value, got 'nonsense'"),
    ],
)
def test_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, None, [*REQUIRED, override])


def test_the_supervised_plan_takes_no_neighbours() -> None:
    supervised = [*REQUIRED, "data.plan=supervised", "data.references=r.csv", "data.ground_truth=gt.json"]
    assert load_config(TrainConfig, None, [*supervised, "data.augment_probability=0.5"]).data.references == "r.csv"
    with pytest.raises(ConfigError, match=r"data\.neighbours must be none with data\.plan=supervised, got 'knn\.npy'"):
        load_config(TrainConfig, None, [*supervised, "data.neighbours=knn.npy"])


def test_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.train must be given"):
        load_config(TrainConfig, None, ["out=run"])


def test_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config(TrainConfig, tmp_path / "none.yaml", [])
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not a YAML file"):
        load_config(TrainConfig, tmp_path / "bad.yaml", [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a YAML mapping"):
        load_config(TrainConfig, tmp_path / "list.yaml", [])


def test_shipped_configs_are_valid() -> None:
    folder = Path(__file__).parents[2] / "scripts" / "configs"
    found = sorted(folder.glob("*.yaml"))
    assert found
    for file in found:
        load_config(TrainConfig, file, REQUIRED)


def test_plain_values_build_a_config() -> None:
    assert build_config(TrainConfig, {"out": "run", "data": {"train": "x"}}).out == "run"
