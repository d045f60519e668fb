"""Training in bfloat16: chosen where the hardware has it, close to float32, and resumed to the bit.

On processors without units for bfloat16 the same runs are emulated, more slowly, hence small.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copynce.errors import TrainingError
from copynce.models import Descriptor, DescriptorConfig
from copynce.models.precision import bf16_in_hardware
from copynce.training import DescriptorLossConfig, DescriptorObjective, TrainConfig, checkpoints, read_log, train
from dali_pipelines import PairBatch

pytestmark = pytest.mark.numeric

Tiny = Callable[..., TrainConfig]
PARTS = ("loss", "copynce", "info_nce", "koleo")


def log_of(config: TrainConfig) -> list[dict]:
    return read_log(Path(config.out) / "log.jsonl")


def test_bf16_trains_close_to_fp32(tiny: Tiny) -> None:
    """bfloat16 rounds to 0.4 %, a few times over in two blocks; the two runs drift apart from step to step."""
    logs, checkpoint = {}, {}
    for precision in ("fp32", "bf16"):
        config = tiny(f"precision={precision}", "optim.steps=4", out=precision)
        checkpoint[precision] = load_file(train(config) / "model.safetensors")
        logs[precision] = log_of(config)
    for single, half in zip(logs["fp32"], logs["bf16"], strict=True):
        for part in PARTS:
            assert half[part] != single[part]
            assert half[part] == pytest.approx(single[part], rel=0.03, abs=0.03), part
    start = load_file(checkpoints(Path(tiny(out="fp32").out))[0] / "model.safetensors")
    moved = {
        name: (checkpoint["fp32"][name] - value, checkpoint["bf16"][name] - value) for name, value in start.items()
    }
    assert all(value.dtype == torch.float32 for value in checkpoint["bf16"].values() if value.is_floating_point())
    single, half = (torch.cat([move[index].flatten().double() for move in moved.values()]) for index in range(2))
    assert single.norm() > 0
    # AdamW's first steps are the signs of the gradients, mostly the same.
    assert torch.cosine_similarity(single, half, dim=0) > 0.9


def test_losses_and_gradients_of_a_bf16_step_are_float32() -> None:
    options = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    objective = DescriptorObjective(
        Descriptor(DescriptorConfig(img_size=32, dim=16, backbone_options=options)), DescriptorLossConfig()
    )
    views = torch.randn(2, 4, 3, 32, 32).bfloat16()
    table = torch.arange(32 * 32, dtype=torch.int32).view(1, 32, 32).repeat(4, 1, 1)
    every = torch.ones(4, dtype=torch.bool)
    seen = []
    objective.model.encoder.patch_embed.proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = objective(PairBatch(*views, table, table, every, every, ["a", "b", "c", "d"]))
    loss.backward()
    assert [output.dtype for output in seen] == [torch.bfloat16]  # the encoder multiplies in bfloat16
    for value in (loss, *parts.values()):
        assert value.dtype == torch.float32
        assert value != value.bfloat16()  # no rounding to bfloat16 on the way
    for parameter in filter(lambda one: one.requires_grad, objective.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_a_bf16_run_that_was_stopped_equals_one_that_was_not(tiny: Tiny) -> None:
    options = ("precision=bf16", "model.drop_path=0.2", "data.batch_size=5")
    whole_config = tiny(*options, out="whole")
    whole = load_file(train(whole_config) / "model.safetensors")

    class Killed(Exception):
        pass

    def kill(step: int) -> None:
        if step == 4:
            raise Killed

    config = tiny(*options, out="killed")
    with pytest.raises(Killed):
        train(config, on_step=kill)
    resumed = load_file(train(config) / "model.safetensors")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    for key in (*PARTS, "gradient_norm"):
        assert [line[key] for line in log_of(config)] == [line[key] for line in log_of(whole_config)], key


def test_an_fp16_run_leaves_out_what_overflows_and_goes_on_with_its_scale(tiny: Tiny) -> None:
    """Of CopyNCE alone: InfoNCE's gradient, through the statistics of four pictures, overflows from 256 times on."""
    losses = ("loss.copynce_weight=10", "loss.info_nce_weight=0", "loss.koleo_weight=0")
    options = ("precision=fp16", "model.drop_path=0.2", *losses)
    whole, config = tiny(*options, out="whole"), tiny(*options, out="killed")
    expected = load_file(train(whole) / "model.safetensors")

    class Killed(Exception):
        pass

    def kill(step: int) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(config, on_step=kill)
    found = load_file(train(config) / "model.safetensors")
    for name, value in expected.items():
        assert value.isfinite().all()
        assert torch.equal(value, found[name]), name
    for key in (*PARTS, "loss_scale", "skipped_steps"):
        assert [line[key] for line in log_of(config)] == [line[key] for line in log_of(whole)], key
    first, *_, last = log_of(whole)
    assert first["skipped_steps"] == 1
    assert 1 <= last["skipped_steps"] < 6
    assert last["loss_scale"] == 2.0 ** (16 - last["skipped_steps"])
    start = load_file(checkpoints(Path(whole.out))[0] / "model.safetensors")
    assert any(not torch.equal(value, start[name]) for name, value in expected.items() if "encoder" in name)


def test_what_no_scale_can_mend_ends_an_fp16_run(tiny: Tiny) -> None:
    with pytest.raises(TrainingError, match=r"the gradient is not finite \(.*loss_scale"):
        train(tiny("precision=fp16", "loss.koleo_weight=1e38", "optim.steps=30"))


def test_auto_takes_bf16_exactly_where_the_hardware_has_it(tiny: Tiny) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logs = {}
    for precision in ("auto", "bf16" if bf16_in_hardware(device) else "fp32"):
        config = tiny(f"precision={precision}", "optim.steps=2", out=precision)
        train(config)
        logs[precision] = [[line[part] for part in PARTS] for line in log_of(config)]
    chosen, expected = logs.values()
    assert chosen == expected


ASKED = """
import torch
from copynce.models.precision import bf16_in_hardware
print(bf16_in_hardware(torch.device("cpu")))
"""


@pytest.mark.parametrize("limit", [None, "AVX2"])
def test_the_processor_has_bf16_if_it_says_so_and_the_library_may_use_it(limit: str | None) -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("Linux tells a processor's features in /proc/cpuinfo")
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    if limit is not None:
        environment["ONEDNN_MAX_CPU_ISA"] = limit
    asked = subprocess.run(
        [sys.executable, "-c", ASKED], env=environment, check=True, capture_output=True, cwd=Path(__file__).parents[2]
    )
    has = bool({"avx512_bf16", "amx_bf16"} & set(flags.read_text().split()))
    assert asked.stdout.decode().strip() == str(has and limit is None)
