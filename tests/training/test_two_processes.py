"""Two processes on gloo: the weights of one with the whole batch, step after step; and what is left when one dies."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from copynce.config import save_config
from copynce.training import TrainConfig, checkpoints, read_events, read_log, train
from copynce.training.checkpoints import read_state

pytestmark = pytest.mark.numeric

Tiny = Callable[..., TrainConfig]

#: With two batches a step, 2 x 2 x 3 pairs are 2 x 6 pairs; 24 pictures are two steps an epoch.
STEPS = ("optim.steps=20", "optim.accumulate=2", "ema=0.9", "device=cpu", "checkpoint_every=20")
KINDS = {
    "descriptor": ("objective=descriptor", "optim.lr=0.01", "checkpoint_activations=true"),
    "matcher": ("objective=matcher", "optim.lr=0.2"),
}


@pytest.fixture(scope="module")
def outcomes(
    make_tiny: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory, run_worker: Callable[..., str]
) -> Any:
    """What became of two processes each, and where: {case: (outcome, run)}; the matcher's find Slurm's variables."""
    folder = tmp_path_factory.mktemp("two")
    cases: dict[str, list[list[str]]] = {}
    runs: dict[str, Path] = {}
    for case in (*KINDS, "killed"):
        config = make_tiny(folder, *KINDS.get(case, KINDS["descriptor"]), *STEPS, "data.batch_size=3", out=case)
        save_config(config, folder / f"{case}.yaml")
        both = ["train", str(folder / f"{case}.yaml")]
        cases[case] = {"killed": [both, ["killed", *both]], "matcher": [["srun", *both]] * 2}.get(case, [both, both])
        runs[case] = Path(config.out)
    printed = run_worker("launch_worker.py", str(folder), json.dumps(list(cases.values())), "sgd")
    found = json.loads(printed.splitlines()[-1])  # after where the checkpoints are
    return {case: (outcome, runs[case]) for case, outcome in zip(cases, found, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_with_the_whole_batch(kind: str, tiny: Tiny, outcomes: Any) -> None:
    """Differentiable gather, BatchNorm over all ranks, averaged gradients that meet once a step, the mean of weights.

    Clipped gradient descent (AdamW has a test of four steps), with the rounding of sums in another order alone between
    the two.
    """
    outcome, run = outcomes[kind]
    assert outcome["statuses"] == [0, 0], outcome["errors"]
    with mock.patch("torch.optim.AdamW", lambda groups, lr, betas, fused: torch.optim.SGD(groups, lr=lr, fused=fused)):
        one = train(tiny(*KINDS[kind], *STEPS, "data.batch_size=6"))
    two = checkpoints(run)[-1]
    (first, *_), (of_both, *_) = (read_log(checkpoint.parents[1] / "log.jsonl") for checkpoint in (one, two))
    for key in ("traced_patches", "prior_mass", "affinity_entropy", "patch_retrieval"):
        # Of the same pairs, of which one process has more copied patches than the other.
        assert of_both[key] == pytest.approx(first[key], rel=1e-4), key
    start = load_file(checkpoints(run)[0] / "model.safetensors")
    for expected, found in (
        (load_file(one / "model.safetensors"), load_file(two / "model.safetensors")),
        (read_state(one)["ema"]["trained"], read_state(two)["ema"]["trained"]),
    ):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
        moved = max(
            float((value - start[name]).abs().max()) for name, value in expected.items() if "running" not in name
        )
        assert moved > 3e-4


def test_another_number_of_processes_continues_and_says_so(tiny: Tiny, outcomes: Any) -> None:
    _, run = outcomes["matcher"]
    with mock.patch("torch.optim.AdamW", lambda groups, lr, betas, fused: torch.optim.SGD(groups, lr=lr, fused=fused)):
        train(tiny(*KINDS["matcher"], *STEPS, "optim.steps=21", "data.batch_size=6", f"out={run}"))
    (event,) = read_events(run / "log.jsonl")
    assert "continues after step 20 with other settings" in event["text"]
    assert "data.batch_size 3 -> 6" in event["text"]
    assert "processes 2 -> 1" in event["text"]
    assert [line["step"] for line in read_log(run / "log.jsonl")] == list(range(1, 22))


def test_a_process_that_dies_ends_the_other_with_a_sentence(outcomes: Any) -> None:
    """At once, and not when gloo's time is out."""
    outcome, run = outcomes["killed"]
    assert outcome["statuses"] == [2, -signal.SIGKILL], outcome["errors"]
    assert "process 0 has lost another one, whose own message says why" in outcome["errors"][0]
    assert "Traceback" not in outcome["errors"][0]
    assert checkpoints(run)[-1].name == "step-00000000"
