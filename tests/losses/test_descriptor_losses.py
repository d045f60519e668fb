"""InfoNCE and KoLeo: the released code's values, closed forms, gradients, and gathers over two processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import copynce
from copynce.losses import INITIAL_LOG_SCALE, info_nce, koleo

pytestmark = pytest.mark.numeric


def released(oracle: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    expected = json.loads((oracle / "losses.json").read_text())["allpos"]
    with np.load(oracle / "losses.npz") as file:
        return expected, {name.removeprefix("allpos/"): torch.from_numpy(file[name]) for name in file}


def test_info_nce_equals_the_released_one(oracle: Path) -> None:
    expected, arrays = released(oracle)
    assert expected["log_scale"] == INITIAL_LOG_SCALE
    query, reference = arrays["que_feat"].requires_grad_(), arrays["ref_feat"].requires_grad_()
    log_scale = torch.tensor(INITIAL_LOG_SCALE, requires_grad=True)
    loss = info_nce(query, reference, log_scale)
    loss.backward()
    assert loss.item() == pytest.approx(expected["infonce"], rel=1e-6)
    assert log_scale.grad.item() == pytest.approx(expected["infonce_grad_log_scale"], rel=1e-5)
    torch.testing.assert_close(query.grad, arrays["infonce_grad_que"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(reference.grad, arrays["infonce_grad_ref"], rtol=1e-4, atol=1e-7)


def test_koleo_equals_the_released_one(oracle: Path) -> None:
    expected, arrays = released(oracle)
    query, reference = arrays["que_feat"].requires_grad_(), arrays["ref_feat"].requires_grad_()
    loss = koleo(query, reference)
    loss.backward()
    assert loss.item() == pytest.approx(expected["koleo"], rel=1e-6)
    torch.testing.assert_close(query.grad, arrays["koleo_grad_que"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(reference.grad, arrays["koleo_grad_ref"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_info_nce_of_identical_orthogonal_pairs(pairs: int) -> None:
    # Each row sees its positive at cosine 1, itself at -1 and 2 B - 2 columns at 0.
    features = torch.eye(pairs, 8)
    scale = 3.0
    loss = info_nce(features * 4, features, torch.tensor(math.log(scale)))
    expected = math.log(math.exp(scale) + math.exp(-scale) + 2 * pairs - 2) - scale
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_koleo_of_orthogonal_pairs_and_of_duplicates() -> None:
    features = torch.eye(3, 8)
    assert float(koleo(features, features)) == pytest.approx(-math.log(2) / 2)
    duplicates = features[[0, 0]].clone().requires_grad_()
    loss = koleo(duplicates, duplicates.detach())
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-6) / 2, rel=1e-6)  # clamped: a finite loss without a gradient
    assert torch.equal(duplicates.grad, torch.zeros_like(duplicates))


def plain_info_nce(query: Tensor, reference: Tensor, log_scale: Tensor) -> Tensor:
    """The equation as it is written, in the features' dtype."""
    features = F.normalize(torch.cat((query, reference)), dim=-1)
    count = len(features)
    cosines = (features @ features.T).masked_fill(torch.eye(count, dtype=torch.bool), -1)
    return F.cross_entropy(cosines * log_scale.exp(), torch.arange(count).roll(count // 2))


def value_and_gradients(loss_of: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, ...]:
    arguments = tuple(argument.clone().requires_grad_() for argument in arguments)
    loss = loss_of(*arguments)
    loss.backward()
    return loss.detach(), *(argument.grad for argument in arguments)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the expected tensor's length."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def signs(*rows: str) -> Tensor:
    """Features of 16 numbers +1 or -1: any machine multiplies them exactly, however it orders its sums."""
    return torch.tensor([[1.0 if sign == "+" else -1.0 for sign in row] for row in rows])


# Nearest to each is its positive, or an equal column: the first pair and the second are the same picture.
EXACT_QUERIES = signs("++++++++++++++++", "++++++++++++++++", "+-+-+-+-+-+-+-+-", "++--++--++--++--")
EXACT_REFERENCES = signs("++++++++++++++++", "++++++++++++++++", "+-+-+-+-+-+-+-++", "++--++--++--++--")


@pytest.mark.parametrize("log_scale", [-1000.0, -100.0, -30.0, 0.0, 3.2, 4.6, 80.0, 88.0])
def test_info_nce_follows_its_float64_twin_at_any_scale(log_scale: float) -> None:
    query = torch.randn(12, 32)
    reference = query + 0.8 * torch.randn(12, 32)
    reference[3] = query[5]  # a wrong column is nearest
    arguments = query, reference, torch.tensor(log_scale)
    exact = value_and_gradients(plain_info_nce, *(argument.double() for argument in arguments))
    plain = value_and_gradients(plain_info_nce, *arguments)
    for found, expected, usual in zip(value_and_gradients(info_nce, *arguments), exact, plain, strict=True):
        assert found.isfinite().all()
        usual_error = distance(usual, expected) if usual.isfinite().all() else 0.0
        smallest = 1e-44 * expected.numel() ** 0.5 / float(expected.norm().clamp_min(1e-300))
        assert distance(found, expected) <= max(2 * usual_error, 2e-6) + smallest


@pytest.mark.parametrize("log_scale", [-1000.0, 20.0, 80.0, 89.0, 100.0, 200.0, 1000.0, 3e38])
def test_equal_columns_share_whatever_the_scale(log_scale: float) -> None:
    """By hand; float64 would drown in the digits that cancel. Large: four rows choose between three equal columns and
    four have theirs alone, and equal columns pull in equal ways. Small: each row chooses between all eight."""
    loss, *gradients = value_and_gradients(info_nce, EXACT_QUERIES, EXACT_REFERENCES, torch.tensor(log_scale))
    assert loss.item() == pytest.approx(math.log(3) / 2 if log_scale > 0 else math.log(8), rel=1e-6)
    assert not any(gradient.any() for gradient in gradients)


def test_a_loss_below_float32s_rounding_of_1_keeps_its_digits() -> None:
    arguments = torch.eye(3, 8) * 2, torch.eye(3, 8), torch.tensor(math.log(60.0))
    exact = value_and_gradients(plain_info_nce, *(argument.double() for argument in arguments))
    exact_loss = 4 * math.exp(-60)  # where float64 itself rounds 1 + x to 1
    loss, *gradients = value_and_gradients(info_nce, *arguments)
    assert loss.item() == pytest.approx(exact_loss, rel=1e-5)
    assert gradients[2].item() == pytest.approx(-60 * exact_loss, rel=1e-5)
    for found, expected in zip(gradients[:2], exact[1:3], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-30)
        assert found.abs().max() > 1e-26


def test_a_wrong_nearest_column_beyond_float32_is_an_infinite_loss() -> None:
    swapped = EXACT_REFERENCES[[0, 1, 3, 2]]
    positive = torch.tensor([True, True, False, False])
    assert info_nce(EXACT_QUERIES, swapped, torch.tensor(100.0)) == math.inf
    # Only of rows that count.
    loss, *gradients = value_and_gradients(
        lambda query, reference, scale: info_nce(query, reference, scale, positive=positive),
        EXACT_QUERIES,
        swapped,
        torch.tensor(100.0),
    )
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("positive", [None, [True, False, True, False]])
def test_gradcheck(positive: list[bool] | None) -> None:
    query, reference = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    log_scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    flags = None if positive is None else torch.tensor(positive)
    assert torch.autograd.gradcheck(lambda q, r, s: info_nce(q, r, s, positive=flags), (query, reference, log_scale))
    assert torch.autograd.gradcheck(lambda q, r: koleo(q, r, positive=flags), (query, reference))


def test_all_positive_pairs_are_the_default() -> None:
    query, reference, log_scale = torch.randn(5, 8), torch.randn(5, 8), torch.tensor(3.2)
    every = torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(
        info_nce(query, reference, log_scale, positive=every), info_nce(query, reference, log_scale)
    )
    torch.testing.assert_close(koleo(query, reference, positive=every), koleo(query, reference))


def test_only_positive_pairs_are_matches() -> None:
    """By hand: rows of positive pairs only, all features as columns; KoLeo leaves out no column of a negative pair."""
    query, reference = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    positive = torch.tensor([True, False, False, True])
    features = F.normalize(torch.cat((query, reference)), dim=-1)
    matches, distances = [], []
    for i in range(8):
        cosines = features @ features[i]
        partner = (i + 4) % 8
        columns = [j for j in range(8) if j != i]
        if positive[i % 4]:
            logits = 2.5 * cosines
            logits[i] = -2.5
            matches.append(logits.logsumexp(0) - logits[partner])
            columns.remove(partner)
        distances.append((2 - 2 * cosines[columns].max()).sqrt().log())
    loss = info_nce(query, reference, torch.tensor(math.log(2.5), dtype=torch.float64), positive=positive)
    torch.testing.assert_close(loss, torch.stack(matches).mean())
    torch.testing.assert_close(koleo(query, reference, positive=positive), -torch.stack(distances).mean())


def test_a_negative_pair_is_not_pulled_together() -> None:
    """A step down the gradient brings the views of the positive pair closer and those of the negative pair apart."""
    query, reference = (F.normalize(torch.randn(2, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    query[1] = F.normalize(reference[1] + 0.3 * query[1], dim=-1)  # a hard negative: nearly alike
    positive = torch.tensor([True, False])
    for loss_of, moved in (
        (lambda q, r: info_nce(q, r, torch.tensor(2.0, dtype=torch.float64), positive=positive), [1, 0]),
        (lambda q, r: koleo(q, r, positive=positive), [0, -1]),
    ):
        q, r = query.clone().requires_grad_(), reference.clone().requires_grad_()
        loss_of(q, r).backward()
        before = F.cosine_similarity(query, reference)
        after = F.cosine_similarity(query - 1e-3 * q.grad, reference - 1e-3 * r.grad)
        for pair, sign in enumerate(moved):
            if sign:
                assert (after - before)[pair] * sign > 1e-6, (pair, after - before)


def test_without_a_positive_pair_info_nce_is_zero() -> None:
    query, reference = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    log_scale = torch.tensor(3.2, requires_grad=True)
    loss = info_nce(query, reference, log_scale, positive=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    for tensor in (query, reference, log_scale):
        assert tensor.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("positive", "error", "match"),
    [
        ([True, False], TypeError, r"positive must be a bool tensor, got list"),
        (torch.ones(2), TypeError, r"positive must be a bool tensor, got torch\.float32 \[2\]"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"positive must be \[2\] on cpu, .* got \[3\] on cpu"),
    ],
)
def test_bad_flags_say_what_is_wrong(positive: object, error: type[Exception], match: str) -> None:
    features = torch.randn(2, 3)
    with pytest.raises(error, match=match):
        info_nce(features, features, torch.tensor(1.0), positive=positive)
    with pytest.raises(error, match=match):
        koleo(features, features, positive=positive)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    query, reference = torch.randn(6, 16).to(dtype), torch.randn(6, 16).to(dtype)
    log_scale = torch.tensor(3.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = info_nce(query, reference, log_scale), koleo(query, reference)
    expected = info_nce(query.float(), reference.float(), log_scale), koleo(query.float(), reference.float())
    for loss, value in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32
        assert torch.equal(loss, value)


@pytest.mark.parametrize(
    ("query", "reference", "settings", "error", "match"),
    [
        ([1.0], torch.zeros(2, 3), {}, TypeError, r"query must be a torch\.Tensor, got list"),
        (torch.zeros(2, 3), torch.zeros(2, 4), {}, ValueError, r"one shape \[B, D\].*\[2, 3\] and \[2, 4\]"),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3).int(), {}, TypeError, r"one floating dtype, got torch\.int32"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"gather": "all"}, ValueError, r"one of 'differentiable', .* got 'all'"),
    ],
)
def test_bad_arguments_say_what_is_wrong(
    query: object, reference: Tensor, settings: dict[str, str], error: type[Exception], match: str
) -> None:
    for call in (
        lambda: info_nce(query, reference, torch.tensor(1.0), **settings),
        lambda: koleo(query, reference, **settings),
    ):
        with pytest.raises(error, match=match):
            call()


def test_bad_log_scale_and_single_pair() -> None:
    features = torch.randn(1, 3)
    with pytest.raises(TypeError, match=r"log_scale must be a floating scalar tensor, got float"):
        info_nce(features, features, 3.2)
    with pytest.raises(TypeError, match=r"log_scale must be a floating scalar tensor, got torch\.float32 \[1\]"):
        info_nce(features, features, torch.ones(1))
    with pytest.raises(ValueError, match=r"at least 2 pairs over all ranks"):
        koleo(features, features)


def test_gather_of_two_processes_equals_one_batch(tmp_path: Path) -> None:
    batch = {name: torch.randn(6, 5, dtype=torch.float64) for name in ("query", "reference")}
    batch["positive"] = torch.tensor([True, False, False, True, True, True])  # ranks: one and three
    torch.save(batch, tmp_path / "batch.pt")
    root = str(Path(copynce.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    worker = str(Path(__file__).with_name("gather_worker.py"))
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]

    for name in ("info_nce", "koleo", "info_nce of some", "koleo of some"):
        positive = batch["positive"] if name.endswith("some") else None
        log_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        query, reference = (batch[side].clone().requires_grad_() for side in ("query", "reference"))
        if name.startswith("info_nce"):
            loss = info_nce(query, reference, log_scale, positive=positive)
        else:
            loss = koleo(query, reference, positive=positive)
        loss.backward()
        # Gradients are averaged over ranks in training, so each rank's are twice those of the mean of both losses.
        both = [rank["differentiable", name] for rank in ranks]
        torch.testing.assert_close((both[0][0] + both[1][0]) / 2, loss.detach())
        torch.testing.assert_close(torch.cat([rank[1] for rank in both]) / 2, query.grad)
        torch.testing.assert_close(torch.cat([rank[2] for rank in both]) / 2, reference.grad)
        if name.startswith("info_nce"):
            torch.testing.assert_close((both[0][3] + both[1][3]) / 2, log_scale.grad)
        if positive is not None:
            continue

        # "local_gradient": the same values, and each rank's gradient is that of its own rows with the other's constant.
        for index, rank in enumerate(ranks):
            torch.testing.assert_close(rank["local_gradient", name][0], rank["differentiable", name][0])
            expected = local_gradients(batch, index, name)
            for value, gradient in zip(rank["local_gradient", name][1:3], expected, strict=True):
                torch.testing.assert_close(value, gradient)


def local_gradients(batch: dict[str, Tensor], rank: int, name: str) -> tuple[Tensor, Tensor]:
    """Gradients of one rank's rows, written out anew: own features vary, the other rank's are constants."""
    own, other = slice(3 * rank, 3 * rank + 3), slice(3 - 3 * rank, 6 - 3 * rank)
    query, reference = (batch[side][own].clone().requires_grad_() for side in ("query", "reference"))
    rows = F.normalize(torch.cat((query, reference)), dim=-1)
    constants = F.normalize(torch.cat((batch["query"][other], batch["reference"][other])), dim=-1)
    cosines = rows @ torch.cat((rows, constants)).T
    total = torch.zeros((), dtype=torch.float64)
    for row in range(6):
        positive = (row + 3) % 6
        others = torch.tensor([column for column in range(12) if column not in (row, positive)])
        if name == "info_nce":
            logits = cosines[row] * math.exp(2)
            own_term = torch.tensor(-math.exp(2), dtype=torch.float64).reshape(1)
            terms = torch.cat((logits[others], logits[[positive]], own_term))
            total = total + terms.logsumexp(0) - logits[positive]
        else:
            total = total - (2 - 2 * cosines[row][others].max()).sqrt().log()
    (total / 6).backward()
    return query.grad, reference.grad
