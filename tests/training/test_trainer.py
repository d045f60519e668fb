from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from copynce.data import DataError
from copynce.models import load_checkpoint
from copynce.training import ConfigError, RunError, TrainConfig, TrainingError, checkpoints, find_model, read_log, train
from copynce.training.config import save_config

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
    expected = "loss copynce info_nce koleo lr pictures_per_second data_wait_share epoch broken_pictures"
    assert set(expected.split()) <= log[-1].keys()
    assert list((run / "tensorboard").iterdir())
    assert load_checkpoint(last / "model.safetensors").img_size == 32
    total = 5 * log[0]["copynce"] + log[0]["info_nce"] + 5 * log[0]["koleo"]
    assert log[0]["loss"] == pytest.approx(total, rel=1e-5)


def test_resumed_equals_uninterrupted(tiny: Tiny) -> None:
    """Killed after 4 of 6 steps, in the middle of the second epoch... and continued from the checkpoint of step 3."""
    options = ("model.drop_path=0.2", "data.batch_size=5")
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


def test_without_copynce_its_value_is_still_measured(tiny: Tiny) -> None:
    config = tiny("loss.copynce_weight=0", "optim.steps=2")
    train(config)
    log = read_log(Path(config.out) / "log.jsonl")
    assert log[0]["copynce"] > 0
    assert log[0]["loss"] == pytest.approx(log[0]["info_nce"] + 5 * log[0]["koleo"], rel=1e-5)


def test_a_gradient_that_is_no_number_ends_the_run(tiny: Tiny, tmp_path: Path) -> None:
    start = train(tiny("optim.steps=0", out="start"))
    broken = weights(start)
    broken["encoder.blocks.1.mlp.fc2.bias"][0] = float("inf")
    backbone = {n.removeprefix("encoder."): v for n, v in broken.items() if n.startswith("encoder.")}
    save_file(backbone, tmp_path / "broken.safetensors")
    with pytest.raises(TrainingError, match=r"step 0: the gradient is not finite .*step-00000000"):
        train(tiny(f"weights={tmp_path / 'broken.safetensors'}", out="nan"))


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


def test_two_processes_equal_one_with_the_whole_batch(tiny: Tiny) -> None:
    """Differentiable gather, BatchNorm over all ranks, averaged gradients: gloo with 2 x 4 pairs is 1 x 8 pairs."""
    one = train(tiny("data.batch_size=8", "optim.steps=3", out="one"))
    config = tiny("optim.steps=3", out="two")
    Path(config.out).parent.mkdir(exist_ok=True)
    save_config(config, Path(config.out).parent / "two.yaml")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-port=0",
            "--standalone",
            "-m",
            "copynce.cli",
            "train",
            str(Path(config.out).parent / "two.yaml"),
        ],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    expected, found = weights(one), weights(checkpoints(Path(config.out))[-1])
    # The global batch holds the same pairs in another order, so sums round differently; AdamW turns a gradient near
    # zero into a step of up to the learning rate (4e-5 here), which bounds what rounding can do to a weight.
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_bf16_trains_close_to_fp32(tiny: Tiny) -> None:
    """The encoder's autocast; losses stay float32. bfloat16 rounds to 0.4 %, a few times over in two blocks."""
    losses = {}
    for precision in ("fp32", "bf16"):
        config = tiny(f"precision={precision}", "optim.steps=2", out=precision)
        train(config)
        losses[precision] = [line["loss"] for line in read_log(Path(config.out) / "log.jsonl")]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_gpu_without_a_gpu_is_named(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="device=gpu needs a CUDA device"):
        train(tiny("device=gpu"))
