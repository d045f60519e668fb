"""What ``copynce train --dry-run`` says: figures against those counted by hand, and against the training itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from copynce.cli import main
from copynce.errors import ConfigError
from copynce.models import build_descriptor, build_matcher
from copynce.models.training_block import TrainingBlock
from copynce.training import TrainConfig
from copynce.training.distributed import World
from copynce.training.dry_run import dry_run
from copynce.training.gpus import find_gpus
from copynce.training.schedule import run_schedule
from copynce.training.signals import StopRequest
from copynce.training.step_cost import step_cost
from copynce.training.trainer import Trainer


def vit_macs(tokens: int, width: int, blocks: int) -> int:
    """Multiplications of transformer blocks: products with 12 C x C weights a token, and the two of attention."""
    return blocks * (12 * tokens * width**2 + 2 * tokens**2 * width)


def test_flop_are_those_counted_by_hand() -> None:
    model, patches, width, dim = build_descriptor(), 196, 384, 512
    embed, head = patches * 768 * width, 2048 * width + 2048 * dim
    cost = step_cost(model, 4, half=True)
    products = vit_macs(patches + 1, width, 12) + embed
    assert products == pytest.approx(4.6e9, rel=0.002)
    assert cost.forward_flop / 4 == pytest.approx(2 * products, rel=0.001)
    assert cost.forward_flop / 4 - 2 * products <= 2 * head
    # Backward is twice that, but for the patch embedding, which is frozen.
    assert cost.flop == pytest.approx(3 * cost.forward_flop - 4 * 4 * embed, rel=0.001)


def test_a_matchers_flop_are_those_counted_by_hand() -> None:
    shape = {"patch_size": 8, "embed_dim": 48, "num_heads": 2}
    model = build_matcher(img_size=32, backbone_options=shape, encoder_blocks=2, fusion_blocks=1)
    tokens = 17
    a_pair = 2 * (16 * 192 * 48 + vit_macs(tokens, 48, 2)) + vit_macs(1 + 2 * tokens, 48, 1) + 48
    assert step_cost(model, 6, half=True).forward_flop == 3 * 2 * a_pair


def test_what_backward_keeps_is_what_a_real_step_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    # The estimate is for a GPU, where blocks are timm's.
    monkeypatch.setattr(TrainingBlock, "_trains_on_processor", lambda block, tokens: False)
    shape = {"patch_size": 8, "embed_dim": 48, "num_heads": 2, "depth": 2}
    model = build_descriptor(img_size=32, dim=16, backbone_options=shape).train()
    kept: dict[int, torch.UntypedStorage] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(8, 3, 32, 32), sides=2)
    real = sum(storage.nbytes() for storage in kept.values())
    assert step_cost(model, 8, half=False).saved == pytest.approx(real, rel=0.02)
    assert step_cost(model, 8, half=True).saved < 0.9 * real


@pytest.mark.parametrize("objective", ["descriptor", "matcher"])
def test_a_dry_run_opens_all_and_writes_nothing(
    objective: str, tiny: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    neighbours = np.full((24, 3), -1, np.int64)
    neighbours[:12] = (np.arange(12)[:, None] + [0, 1, 2]) % 24
    np.save(tmp_path / "knn.npy", neighbours)
    config = tiny(f"objective={objective}", f"data.neighbours={tmp_path / 'knn.npy'}", "optim.epochs=5")
    found = dry_run(config, gpus="A100:2", seconds=0.1)
    text = "\n".join(found.lines)
    assert not Path(config.out).exists()
    assert found.cost.pictures == (16 if objective == "descriptor" else 8)
    assert found.wanted == pytest.approx(2 * 0.4 * 19.5e12 * found.cost.pictures / found.cost.flop)
    assert found.cores >= found.wanted * found.rate.core_seconds > 0
    assert not found.fed
    assert found.rate.rate > 0
    assert "12 of 24 pictures have some, these 2.0 in the mean" in text
    assert "24 in " in text
    assert "0 broken" in text

    with StopRequest() as stop:
        trainer = Trainer(config, World(0, 1, torch.device("cpu")), stop)
    schedule = run_schedule(config.optim, 4, 6)
    assert schedule.total == trainer._total
    assert [schedule.rate(i) for i in range(6)] == [trainer._rate(i) for i in range(6)]
    assert f"{schedule.rate(0):.4g}" in text


def test_broken_pictures_are_counted(pictures: Path, tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for path in sorted(pictures.glob("*"))[:5]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("x")
    found = dry_run(tiny(train=folder), seconds=0.1)
    text = "\n".join(found.lines)
    assert "1 broken (the first: " in text
    assert "1 other files left out" in text
    assert "fill no step" in text  # of 8 GPUs


def test_the_command_says_it(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "model.backbone_options={patch_size: 8, embed_dim: 24, num_heads: 2, depth: 1}"
    words = ["data.batch_size=4", "data.threads=1", "model.img_size=32", "model.dim=16", shape, "device=cpu"]
    where = [f"data.train={pictures}", f"out={tmp_path / 'run'}"]
    assert main(["train", "descriptor", *words, *where, "--dry-run", "--seconds", "0.1", "--gpus", "H100:4"]) == 0
    printed = capsys.readouterr().out
    assert "will 4 x H100 be fed?" in printed
    assert "989 TFLOP/s in bf16 at 40%" in printed
    assert not (tmp_path / "run").exists()


def test_gpus_by_the_names_of_drivers() -> None:
    assert str(find_gpus("NVIDIA A100-SXM4-80GB:8")) == "8 x A100"
    assert str(find_gpus("NVIDIA H100 PCIe")) == "1 x H100 PCIE"
    assert str(find_gpus("NVIDIA L40S:2")) == "2 x L40S"
    assert str(find_gpus("NVIDIA A10G")) == "1 x A10G"
    for text in ("A100:0", "B", "A100:x", "GeForce 8800"):
        with pytest.raises(ConfigError, match="--gpus must be NAME:COUNT"):
            find_gpus(text)


def test_blocks_computed_again_keep_less_and_cost_a_forward_more() -> None:
    shape = {"patch_size": 8, "embed_dim": 48, "num_heads": 2}
    descriptor = build_descriptor(img_size=32, dim=16, backbone_options=shape | {"depth": 4})
    matcher = build_matcher(img_size=32, backbone_options=shape, encoder_blocks=3, fusion_blocks=1)
    for model in (descriptor, matcher):
        plain, again = (step_cost(model, 8, half=False, checkpointed=checkpointed) for checkpointed in (False, True))
        assert again.flop == plain.flop + plain.forward_flop
        inputs = 8 * 4 * 48 * (17 * 4 if model is descriptor else 17 * 3 + 35 // 2)
        assert again.saved == inputs + plain.saved // 4 < plain.saved


def test_settings_of_a_step_are_in_it(tiny: Callable[..., TrainConfig]) -> None:
    settings = ["optim.accumulate=2", "precision=fp16", "ema=0.9", "checkpoint_activations=true"]
    found = dry_run(tiny(*settings), gpus="V100:1", seconds=0.1)
    text = "\n".join(found.lines)
    for part in ("2 of them a step", "125 TFLOP/s in fp16", "the weights' mean", "8, 16 "):
        assert part in text
    assert "DDP" not in text
    with pytest.raises(ConfigError, match="precision=bf16: V100 does not multiply it; use precision=fp16 or fp32"):
        dry_run(tiny("precision=bf16"), gpus="V100:1")
