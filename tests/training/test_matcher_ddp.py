"""The matcher in two processes on gloo: the weights of one with the whole batch, though their pairs differ in kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from copynce.config import save_config
from copynce.training import TrainConfig, checkpoints, read_log, train

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, run_worker: Callable[..., str]
) -> list[dict[float, list[dict[str, Tensor]]]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_worker("matcher_ddp_worker.py", str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("copynce_weight", [3.0, 0.0])
def test_two_processes_have_the_weights_of_one(
    copynce_weight: float, ranks: list[dict[float, list[dict[str, Tensor]]]]
) -> None:
    start, alone, shared = ranks[0][copynce_weight]
    apart, moved = 0.0, 0.0
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=0, atol=1e-6, msg=name)
        assert torch.equal(shared[name], ranks[1][copynce_weight][2][name]), name
        asked = copynce_weight > 0 or "fusion_head" not in name
        assert asked != torch.equal(value, start[name]), name
        apart += float((shared[name] - value).double().square().sum())
        moved += float((value - start[name]).double().square().sum())
    assert apart < 1e-6 * moved  # squares


def test_two_processes_train_on_a_mixture_as_one_does(
    tiny: Callable[..., TrainConfig], pictures: Path, tmp_path: Path, run_worker: Callable[..., str]
) -> None:
    """Through the command: 2 x 5 pairs are 1 x 10 pairs, in four steps of two epochs."""
    names = sorted(path.stem for path in pictures.iterdir())
    (tmp_path / "gt.json").write_text(json.dumps({name: [names[i - 1]] for i, name in enumerate(names[:14])}))
    options = (
        "objective=matcher",
        "data.pairs=mixture",
        "data.share=0.5",
        f"data.queries={pictures}",
        f"data.references={pictures}",
        f"data.ground_truth={tmp_path / 'gt.json'}",
        "loss.copynce_weight=0",
        "optim.steps=4",
    )
    one = load_file(train(tiny(*options, "data.batch_size=10", out="one")) / "model.safetensors")
    config = tiny(*options, "data.batch_size=5", out="two")
    save_config(config, tmp_path / "two.yaml")
    printed = run_worker("launch_worker.py", str(tmp_path), json.dumps([[["train", str(tmp_path / "two.yaml")]] * 2]))
    (found,) = json.loads(printed.splitlines()[-1])  # after where the checkpoint is
    assert found["statuses"] == [0, 0], found["errors"]
    two = load_file(checkpoints(Path(config.out))[-1] / "model.safetensors")
    for name, value in one.items():  # AdamW turns a gradient near zero into a step of up to the learning rate
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=3e-5, msg=name)
    first, second = (read_log(tmp_path / out / "log.jsonl") for out in ("one", "two"))
    for before, after in zip(first, second, strict=True):
        assert after["positives"] == pytest.approx(before["positives"])
        assert after["bce"] == pytest.approx(before["bce"], rel=1e-4)
    assert all(0 < line["positives"] < 1 for line in first)
