"""The matcher's training: losses and gradients against their plain twins, and what a run of it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from copynce.errors import ConfigError
from copynce.kernels.copynce.reference import copynce_reference
from copynce.models import Matcher, build_matcher, load_checkpoint
from copynce.training import MatcherLossConfig, MatcherObjective, TrainConfig, checkpoints, read_events, read_log, train
from dali_pipelines import PairBatch

pytestmark = pytest.mark.numeric

Tiny = Callable[..., TrainConfig]


def matcher() -> Matcher:
    return build_matcher(
        img_size=32,
        encoder_blocks=1,
        fusion_blocks=2,
        backbone_options={"patch_size": 8, "embed_dim": 24, "num_heads": 2},
    )


def batch() -> PairBatch:
    """Two copies, one of them not traced, and three negative pairs."""
    tables = torch.randint(-1, 32 * 32, (2, 5, 32, 32), dtype=torch.int32)
    tables[:, 1:] = -1
    positive, traced = torch.tensor([True, True, False, False, False]), torch.tensor([True, False, True, True, True])
    return PairBatch(*torch.randn(2, 5, 3, 32, 32), *tables, positive, traced, list("abcde"))


class Given(nn.Module):
    """In a matcher's place: gives these logits, and tokens of one patch a side."""

    patch_size = 32

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.heads = nn.ModuleDict({"fusion_head": nn.Identity()})

    def with_tokens(self, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = query.flatten(1)[:, None]
        return self.logits, tokens, tokens


def test_bce_and_its_gradient_equal_the_released_ones(oracle: Path) -> None:
    expected = json.loads((oracle / "losses.json").read_text())["bce"]
    with np.load(oracle / "losses.npz") as file:
        logits, truth, gradient = (torch.from_numpy(file[f"bce/{name}"]) for name in ("preds", "cls_gt", "grad"))
    model = Given(logits.squeeze(1))
    views, tables = torch.randn(2, 8, 3, 32, 32), torch.full((2, 8, 32, 32), -1, dtype=torch.int32)
    every = torch.ones(8, dtype=torch.bool)
    pairs = PairBatch(*views, *tables, truth.flatten() > 0.5, every, list("abcdefgh"))
    total, measures = MatcherObjective(model, MatcherLossConfig())(pairs)
    total.backward()
    assert measures["bce"].item() == pytest.approx(expected, rel=1e-6)
    assert measures["copynce"].item() == 0
    torch.testing.assert_close(model.logits.grad, gradient.squeeze(1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.0, 1.0), (2.0, 0.0)])
def test_loss_and_gradients_equal_their_plain_twin(weights: tuple[float, float]) -> None:
    """The equations of PROTOCOLS 8.1 and 8.4 in float64, on what the model gives in float32."""
    model, pairs = matcher(), batch()
    copynce_weight, bce_weight = weights
    objective = MatcherObjective(model, MatcherLossConfig(copynce_weight=copynce_weight, bce_weight=bce_weight))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert ("heads.fusion_head.norm.weight" in trained) == (copynce_weight > 0)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(trained, found, strict=True))

    total, measures = objective(pairs)
    found = gradients(total)
    logits, *tokens = model.with_tokens(pairs.query, pairs.reference)
    logits = logits.double()
    bce = (F.softplus(logits) - logits * pairs.positive).mean()
    tables = pairs.query_to_reference, pairs.reference_to_query
    copynce = copynce_reference(
        *(side.double() for side in tokens),
        *tables,
        pairs.traced,
        patch_size=8,
        temperature=1 / 16,
        gamma=1.0,
        prior="released",
    )
    assert measures["bce"].item() == pytest.approx(bce.item(), rel=1e-5)
    assert measures["copynce"].item() == pytest.approx(copynce.item(), rel=1e-5)
    right = ((logits > 0) == pairs.positive).sum().item()
    assert measures["accuracy"].item() == pytest.approx(right / 5)
    assert measures["positives"].item() == pytest.approx(0.4)
    expected = copynce_weight * copynce + bce_weight * bce
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


def test_an_untraced_pair_leaves_copynces_mean_and_a_negative_one_stays_in_it() -> None:
    objective, pairs = MatcherObjective(matcher(), MatcherLossConfig()), batch()
    before = objective(pairs)[1]["copynce"].item()
    pairs.traced[2] = False
    assert objective(pairs)[1]["copynce"].item() == pytest.approx(before * 4 / 3, rel=1e-5)
    pairs.traced[:] = False
    assert objective(pairs)[1]["copynce"].item() == 0


@pytest.mark.parametrize("others", [1, 3, 9])
def test_other_references_of_the_batch_are_negatives(others: int) -> None:
    model, pairs = matcher(), batch()
    pairs.uuids[2] = "a"  # its reference shows what the first query copies
    objective = MatcherObjective(model, MatcherLossConfig(copynce_weight=0.0, batch_negatives=others))
    total, measures = objective(pairs)
    found = torch.autograd.grad(total, model.fusion.cls_token)[0]
    rows = [
        (i, (i + shift) % 5)
        for shift in [0, 1, -1, 2, -2][: others + 1]
        for i in range(5)
        if shift == 0 or pairs.uuids[i] != pairs.uuids[(i + shift) % 5]
    ]
    queries, references = (list(side) for side in zip(*rows, strict=True))
    logits = model(pairs.query[queries], pairs.reference[references]).double()
    truth = torch.tensor([i == j and bool(pairs.positive[i]) for i, j in rows])
    expected = (F.softplus(logits) - logits * truth).mean()
    assert measures["bce"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert measures["positives"].item() == pytest.approx(truth.double().mean().item())
    assert measures["accuracy"].item() == pytest.approx(((logits > 0) == truth).double().mean().item())
    torch.testing.assert_close(found, torch.autograd.grad(expected, model.fusion.cls_token)[0], rtol=1e-4, atol=1e-6)


def test_copies_alone_need_negatives_of_the_batch(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"or copies and loss\.batch_negatives"):
        tiny("objective=matcher", "data.pairs=descriptor")
    config = tiny("objective=matcher", "data.pairs=descriptor", "loss.batch_negatives=2", "optim.steps=1")
    train(config)


def test_a_frozen_encoder_keeps_its_weights_and_the_fusion_learns(tiny: Tiny) -> None:
    config = tiny("objective=matcher", "model.freeze_encoder=true", "optim.steps=1")
    last = train(config)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoints(Path(config.out))[0], last))
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved == {name for name in after if not name.startswith("encoder.")}
    assert load_checkpoint(last).config.freeze_encoder


def test_a_run_learns_from_its_pairs_and_a_second_stage_begins_with_it(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("objective=matcher", "optim.steps=3", "data.batch_size=8")
    last = train(config)
    assert isinstance(load_checkpoint(config.out), Matcher)
    log = read_log(tmp_path / "run" / "log.jsonl")
    for line in log:
        assert line["loss"] == pytest.approx(3 * line["copynce"] + line["bce"], rel=1e-5)
        assert line["positives"] * 8 in range(9)
    assert 0 < sum(line["positives"] for line in log) < 2

    first = load_file(last / "model.safetensors")
    options = ("objective=matcher", "optim.steps=1", "optim.lr=1e-4", "loss.copynce_weight=0")
    second = train(tiny(*options, f"weights={config.out}", out="second"))
    (event,) = read_events(tmp_path / "second" / "log.jsonl")
    assert "the encoder is taken" in event["text"]
    start = load_file(checkpoints(tmp_path / "second")[0] / "model.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in start.items())
    moved = {name for name, value in load_file(second / "model.safetensors").items() if not value.equal(start[name])}
    assert moved == {name for name in start if "fusion_head" not in name}  # nothing asks that head but CopyNCE


def test_a_matcher_begins_with_a_descriptor_but_for_what_its_losses_learnt(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("optim.steps=0", "model.freeze_patch_embed=false", out="descriptor"))
    start = train(tiny("objective=matcher", "optim.steps=0", f"weights={tmp_path / 'descriptor'}"))
    assert "temperature" not in read_events(tmp_path / "run" / "log.jsonl")[0]["text"]
    encoder = load_file(tmp_path / "descriptor" / "checkpoints" / "step-00000000" / "model.safetensors")
    name = "encoder.patch_embed.proj.weight"
    assert load_file(start / "model.safetensors")[name].equal(encoder[name])
