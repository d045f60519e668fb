"""The loss curve of one tiny run, under version control: catches what no test of a part does.

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
PARTS = ("loss", "copynce", "info_nce", "koleo")


def test_the_curve_repeats(tiny: Callable[..., TrainConfig]) -> None:
    config = tiny("optim.steps=8")
    train(config)
    found = {name: [line[name] for line in read_log(Path(config.out) / "log.jsonl")] for name in PARTS}
    if os.environ.get("COPYNCE_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    # Float32 sums differ between processors in the last digits, and eight steps carry that forward.
    for name in PARTS:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3), name
