"""The loss curves of tiny runs, under version control: catches what no test of a part does.

After a change that means to alter it (a policy, the schedule, a loss), run the test with COPYNCE_UPDATE_GOLDEN=1, look
at the difference, and say in the commit why it moved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from copynce.training import TrainConfig, read_log, train

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).with_name("golden_losses.json")
PARTS = {"descriptor": ("loss", "copynce", "info_nce", "koleo"), "matcher": ("loss", "copynce", "bce", "positives")}


@pytest.mark.parametrize("objective", PARTS)
def test_the_curve_repeats(objective: str, tiny: Callable[..., TrainConfig]) -> None:
    config = tiny(f"objective={objective}", "optim.steps=8")
    train(config)
    log = read_log(Path(config.out) / "log.jsonl")
    found = {name: [line[name] for line in log] for name in PARTS[objective]}
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("COPYNCE_UPDATE_GOLDEN"):
        golden[objective] = found
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    # Float32 sums differ between processors in the last digits, and eight steps carry that forward.
    for name, values in found.items():
        assert values == pytest.approx(golden[objective][name], rel=1e-3, abs=1e-3), name
