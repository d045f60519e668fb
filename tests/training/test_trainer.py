from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from copynce.config import save_config
from copynce.errors import ConfigError, DataError, RunError
from copynce.models import Descriptor, DescriptorConfig, load_checkpoint
from copynce.training import (
    DescriptorLossConfig,
    DescriptorObjective,
    TrainConfig,
    checkpoints,
    find_model,
    read_log,
    train,
)
from dali_pipelines import PairBatch

Tiny = Callable[..., TrainConfig]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_a_run_leaves_config_log_and_checkpoints(tiny: Tiny) -> None:
    config = tiny("tensorboard=true")
    last = train(config)
    run = Path(config.out)
    assert [folder.name for folder in checkpoints(run)] == ["step-00000000", "step-00000003", "step-00000006"]
    assert last == checkpoints(run)[-1]
    assert find_model(run) == last / "model.safetensors"
    log = read_log(run / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    expected = "loss copynce info_nce koleo lr pictures_per_second data_wait_share epoch broken_pictures temperature"
    expected += " traced_patches prior_mass affinity_entropy affinity_entropy_uncopied patch_retrieval peak_memory_gib"
    assert set(expected.split()) <= log[-1].keys()
    assert list((run / "tensorboard").iterdir())
    assert load_checkpoint(last / "model.safetensors").img_size == 32
    total = 5 * log[0]["copynce"] + log[0]["info_nce"] + 5 * log[0]["koleo"]
    assert log[0]["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "changed",
    [(), ("objective=matcher",), ("optim.accumulate=2", "ema=0.9", "checkpoint_activations=true")],
    ids=["descriptor", "matcher", "options"],
)
def test_resumed_equals_uninterrupted(tiny: Tiny, changed: tuple[str, ...]) -> None:
    """Killed after 4 of 6 steps, and continued from the checkpoint of step 3, which lies in the midst of an epoch."""
    options = (*changed, "model.drop_path=0.2", "data.batch_size=5")
    whole = train(tiny(*options, out="whole"))

    class Killed(Exception):
        pass

    def kill(step: int) -> None:
        if step == 4:
            raise Killed

    config = tiny(*options, out="killed")
    with pytest.raises(Killed):
        train(config, on_step=kill)
    resumed = train(config)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    first, second = (read_log(folder.parents[1] / "log.jsonl") for folder in (whole, resumed))
    assert [line["step"] for line in second] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in second] == [line["loss"] for line in first]


@pytest.fixture
def neighbours(tmp_path: Path) -> str:
    """A file of neighbours of the 24 pictures."""
    np.save(tmp_path / "neighbours.npy", (np.arange(24)[:, None] + np.arange(6)) % 24)
    return str(tmp_path / "neighbours.npy")


_KILLED = """
import os, signal, sys
from copynce.training import TrainConfig, load_config, train

def kill(step):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

train(load_config(TrainConfig, sys.argv[1], []), on_step=kill)
"""


def test_a_killed_process_continues_in_the_middle_of_an_epoch(tiny: Tiny, neighbours: str, tmp_path: Path) -> None:
    """SIGKILL after step 7 of 10; the newest checkpoint, of step 5, lies in the second of epochs of four steps."""
    options = (
        f"data.neighbours={neighbours}",
        "data.batch_size=5",
        "optim.steps=10",
        "checkpoint_every=5",
        "model.drop_path=0.2",
    )
    whole = train(tiny(*options, out="whole"))
    config = tiny(*options, out="killed")
    save_config(config, tmp_path / "killed.yaml")
    died = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "killed.yaml")],
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert died.returncode == -signal.SIGKILL
    run = Path(config.out)
    assert checkpoints(run)[-1].name == "step-00000005"
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2, 3, 4, 5, 6, 7]

    resumed = train(tiny(*options, "data.threads=2", "data.processes=2", out="killed"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    first, second = (read_log(folder.parents[1] / "log.jsonl") for folder in (whole, resumed))
    assert [line["step"] for line in second] == list(range(1, 11))
    for key in ("loss", "copynce", "info_nce", "koleo", "lr", "gradient_norm", "epoch"):
        assert [line[key] for line in second] == [line[key] for line in first], key


def test_two_pairs_an_item_count_as_one_for_the_learning_rate(tiny: Tiny, neighbours: str) -> None:
    logs = {}
    for name, options in (("alone", ()), ("neighbours", (f"data.neighbours={neighbours}",))):
        config = tiny("optim.steps=2", *options, out=name)
        train(config)
        logs[name] = read_log(Path(config.out) / "log.jsonl")
    assert [line["lr"] for line in logs["neighbours"]] == [line["lr"] for line in logs["alone"]]
    assert logs["neighbours"][0]["epoch"] == logs["alone"][0]["epoch"]
    assert logs["neighbours"][0]["loss"] != logs["alone"][0]["loss"]
    # InfoNCE of an untrained model is near the log of its columns: 4 items are 8 features, or 16.
    assert logs["neighbours"][0]["info_nce"] > logs["alone"][0]["info_nce"] + 0.3


def test_supervised_pairs_train_without_tables(tiny: Tiny, pictures: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in pictures.iterdir())
    (tmp_path / "gt.json").write_text(json.dumps({name: [names[i - 1]] for i, name in enumerate(names[:20])}))
    pairs = ("data.pairs=supervised", f"data.references={pictures}", f"data.ground_truth={tmp_path / 'gt.json'}")
    config = tiny(*pairs, "data.augment_probability=0.5", "optim.steps=5")
    train(config)
    log = read_log(Path(config.out) / "log.jsonl")
    assert [line["copynce"] for line in log] == [0.0] * 5
    assert all(line["info_nce"] > 0 for line in log)
    assert log[-1]["epoch"] == 1.0  # twenty queries copy something


def test_positives_and_traces_choose_what_the_losses_see() -> None:
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    config = DescriptorConfig(img_size=32, dim=16, backbone_options=options)
    objective = DescriptorObjective(Descriptor(config), DescriptorLossConfig())
    query, reference = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    table = torch.arange(32 * 32, dtype=torch.int32).view(1, 32, 32).repeat(4, 1, 1)
    table[3] = -1

    def parts(positive: list[bool], traced: list[bool]) -> dict[str, float]:
        flags = torch.tensor(positive), torch.tensor(traced)
        found = objective(PairBatch(query, reference, table, table, *flags, ["a", "b", "c", "d"]))[1]
        return {name: value.item() for name, value in found.items()}

    every, none = [True] * 4, [False] * 4
    everything = parts(every, every)
    assert parts(none, every)["info_nce"] == 0
    assert parts(none, every)["copynce"] == everything["copynce"]
    assert parts(every, none)["copynce"] == 0
    assert parts(every, none)["info_nce"] == everything["info_nce"]
    # An untraced pair leaves the mean of CopyNCE, one that is traced to nothing stays in it.
    assert parts(every, [True] * 3 + [False])["copynce"] == pytest.approx(everything["copynce"] * 4 / 3, rel=1e-5)


def test_a_finished_run_is_left_alone(tiny: Tiny) -> None:
    config = tiny("optim.steps=1")
    last = train(config)
    stamp = (last / "model.safetensors").stat().st_mtime_ns
    assert train(config) == last
    assert (last / "model.safetensors").stat().st_mtime_ns == stamp


def test_zero_steps_write_the_starting_model(tiny: Tiny, tmp_path: Path) -> None:
    start = train(tiny("optim.steps=0", out="start"))
    backbone = {
        name.removeprefix("encoder."): value for name, value in weights(start).items() if name.startswith("encoder.")
    }
    save_file(backbone, tmp_path / "backbone.safetensors")
    again = train(tiny("optim.steps=0", "seed=7", f"weights={tmp_path / 'backbone.safetensors'}", out="again"))
    assert torch.equal(weights(again)["encoder.blocks.0.attn.qkv.weight"], backbone["blocks.0.attn.qkv.weight"])


def test_resume_never_refuses_a_used_folder(tiny: Tiny) -> None:
    train(tiny("optim.steps=1"))
    with pytest.raises(RunError, match="already holds step-00000001"):
        train(tiny("optim.steps=2", "resume=never"))


def test_resume_with_another_batch_is_refused(tiny: Tiny) -> None:
    train(tiny("optim.steps=1"))
    with pytest.raises(RunError, match="items=4, got 6"):
        train(tiny("optim.steps=2", "data.batch_size=6"))


def test_resume_with_another_plan_is_refused(tiny: Tiny, neighbours: str) -> None:
    train(tiny("optim.steps=1"))
    with pytest.raises(RunError, match=r"data\.neighbours was None, got .*neighbours\.npy"):
        train(tiny("optim.steps=2", f"data.neighbours={neighbours}"))


def test_without_copynce_its_value_is_still_measured(tiny: Tiny) -> None:
    config = tiny("loss.copynce_weight=0", "optim.steps=2")
    train(config)
    log = read_log(Path(config.out) / "log.jsonl")
    assert log[0]["copynce"] > 0
    assert log[0]["loss"] == pytest.approx(log[0]["info_nce"] + 5 * log[0]["koleo"], rel=1e-5)


def test_too_few_pictures_are_named(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="got 24 pictures in all"):
        train(tiny("data.batch_size=30"))


def test_broken_pictures_are_replaced_and_listed_odd_ones_are_used(tiny: Tiny, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    victims = sorted(folder.iterdir())[:3]
    victims[0].write_bytes(victims[0].read_bytes()[:700])
    victims[1].write_bytes(b"")
    victims[2].write_text("not a picture")
    with Image.open(sorted(folder.iterdir())[5]) as opened:
        picture = opened.convert("RGB")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "rgba.png")
    picture.resize((1, 1)).save(folder / "one.png")
    Image.fromarray(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) * 12).save(folder / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=turned)

    config = tiny("data.batch_size=6", "optim.steps=10", train=folder)  # two epochs: every picture is met
    train(config)
    listed = [json.loads(line) for line in (Path(config.out) / "broken.jsonl").read_text().splitlines()]
    assert {Path(entry["path"]).name for entry in listed} == {victim.name for victim in victims}
    assert all(entry["reason"] for entry in listed)
    assert read_log(Path(config.out) / "log.jsonl")[-1]["broken_pictures"] == 3


def test_shards_train_as_their_files_do(tiny: Tiny, pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.iterdir())
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            for path in files[12 * shard : 12 * shard + 12]:
                tar.add(path, path.name)
    logs = []
    for name, train_on in (("files", pictures), ("shards", tmp_path / "shards")):
        config = tiny("optim.steps=3", out=name, train=train_on)
        train(config)
        logs.append(read_log(Path(config.out) / "log.jsonl"))
    assert [line["loss"] for line in logs[1]] == [line["loss"] for line in logs[0]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_gpu_without_a_gpu_is_named(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="device=gpu needs a CUDA device"):
        train(tiny("device=gpu"))


def test_a_resnet_trains_on_the_cells_of_its_last_stage(tiny: Tiny) -> None:
    options = "{layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}"
    config = tiny("model.backbone=resnet18", f"model.backbone_options={options}", "model.img_size=64", "optim.steps=2")
    last = train(config)
    log = read_log(Path(config.out) / "log.jsonl")
    assert all(line["copynce"] > 0 and line["gradient_norm"] > 0 for line in log)
    before, after = (weights(folder) for folder in (checkpoints(Path(config.out))[0], last))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"encoder.conv1.weight", "encoder.layer4.0.conv2.weight", "encoder.bn1.running_mean"} <= moved
    assert load_checkpoint(last).patch_size == 32
