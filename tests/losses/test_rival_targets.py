"""The paper's rivals (FeatNN, LocNN, both; cosine and NCE) against loops written from their definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from copynce.losses import CopyNCELoss, copynce_loss

pytestmark = pytest.mark.numeric

RIVALS = ["feature", "location", "both"]
SHAPES = [  # query pixels, reference pixels, patch size
    pytest.param((12, 12), (12, 12), 4, id="square"),
    pytest.param((6, 15), (9, 3), 3, id="odd-and-lq-is-not-lr"),
    pytest.param((4, 4), (8, 12), 4, id="one-query-patch"),
    pytest.param((2, 2), (2, 2), 2, id="one-patch"),
]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def make_batch(shape: tuple[int, int], target_shape: tuple[int, int], patch_size: int) -> Batch:
    """Three pairs: tables of noise with holes (whole patches among them), noise without holes, no copy at all."""
    tables = []
    for own, other in ((shape, target_shape), (target_shape, shape)):
        table = torch.randint(0, math.prod(other), (3, *own), dtype=torch.int32)
        table[0][torch.rand(own) < 0.4] = -1
        table[0, :patch_size, :patch_size] = -1
        table[2] = -1
        tables.append(table)
    tokens = [torch.randn(3, math.prod(side // patch_size for side in own), 6) for own in (shape, target_shape)]
    return tokens[0], tokens[1], tables[0], tables[1]


def loop_weights(
    own: Tensor, other: Tensor, table: Tensor, other_shape: tuple[int, int], patch_size: int, target: str, k: int
) -> Tensor:
    """Weights [L, M] of one direction of one pair, by the definition, in float64."""
    columns, other_columns = table.shape[1] // patch_size, other_shape[1] // patch_size
    weights = torch.zeros(len(own), len(other), dtype=torch.float64)
    k = min(k, len(other))
    for i in range(len(own)):
        top, left = i // columns * patch_size, i % columns * patch_size
        entries = [e for e in table[top : top + patch_size, left : left + patch_size].flatten().tolist() if e >= 0]
        if not entries:
            continue
        y = sum(e // other_shape[1] + 0.5 for e in entries) / len(entries)
        x = sum(e % other_shape[1] + 0.5 for e in entries) / len(entries)
        near, alike = [], []
        for j in range(len(other)):
            centre = ((j // other_columns + 0.5) * patch_size, (j % other_columns + 0.5) * patch_size)
            near.append((math.dist(centre, (y, x)), j))
            alike.append((-float(F.cosine_similarity(own[i], other[j], dim=0)), j))
        for kind, ranking in (("feature", alike), ("location", near)):
            if target in (kind, "both"):
                for _, j in sorted(ranking)[:k]:
                    weights[i, j] += (0.5 if target == "both" else 1) / k
    return weights


def loop_loss(batch: Batch, patch_size: int, target: str, k: int, form: str, prior: str, active: Tensor) -> float:
    total = 0.0
    for query, reference, forward, backward, flag in zip(*batch, active.tolist(), strict=True):
        for own, other, table, reverse in (
            (query, reference, forward, backward),
            (reference, query, backward, forward),
        ):
            own, other = own.double(), other.double()
            weights = loop_weights(own, other, table, tuple(reverse.shape), patch_size, target, k)
            cosines = F.normalize(own, dim=1) @ F.normalize(other, dim=1).T
            pull = 1 - cosines if form == "cosine" else -(16 * cosines).log_softmax(1)
            averaged = len(own) if prior == "released" else max(int(weights.any(1).sum()), 1)
            total += flag * float((weights * pull).sum()) / averaged / 2
    return total / max(int(active.sum()), 1)


@pytest.mark.parametrize("prior", ["released", "paper"])
@pytest.mark.parametrize("form", ["nce", "cosine"])
@pytest.mark.parametrize("neighbours", [1, 4])
@pytest.mark.parametrize("target", RIVALS)
@pytest.mark.parametrize(("shape", "target_shape", "patch_size"), SHAPES)
def test_equals_loops_of_the_definition(
    shape: tuple[int, int],
    target_shape: tuple[int, int],
    patch_size: int,
    target: str,
    neighbours: int,
    form: str,
    prior: str,
) -> None:
    batch = make_batch(shape, target_shape, patch_size)
    settings = {"target": target, "form": form, "prior": prior}
    for active in (torch.tensor([True, True, True]), torch.tensor([True, False, False])):
        expected = loop_loss(batch, patch_size, target, neighbours, form, prior, active)
        for dtype in (torch.float64, torch.float32):  # the twin, and the fused path of the CPU
            tokens = batch[0].to(dtype), batch[1].to(dtype)
            loss = copynce_loss(
                *tokens, *batch[2:], patch_size=patch_size, neighbours=neighbours, active=active, **settings
            )
            assert loss.dtype == dtype
            assert float(loss) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 2e-6, abs=1e-6)


@pytest.mark.parametrize("form", ["nce", "cosine"])
@pytest.mark.parametrize("target", ["overlap", *RIVALS])
def test_gradients(target: str, form: str) -> None:
    batch = make_batch((9, 6), (6, 6), 3)
    tokens = [side.double().requires_grad_() for side in batch[:2]]
    settings = {"patch_size": 3, "target": target, "form": form, "neighbours": 2, "gamma": 2.0}
    active = torch.tensor([True, True, False])
    assert torch.autograd.gradcheck(lambda q, r: copynce_loss(q, r, *batch[2:], active=active, **settings), tokens)
    fused = [side.float().requires_grad_() for side in batch[:2]]
    exact = torch.autograd.grad(copynce_loss(*tokens, *batch[2:], active=active, **settings), tokens)
    found = torch.autograd.grad(copynce_loss(*fused, *batch[2:], active=active, **settings), fused)
    for gradient, expected in zip(found, exact, strict=True):
        assert (gradient - expected).norm() < 2e-6 * expected.norm()
        assert not gradient[2].any()


@pytest.mark.parametrize("form", ["nce", "cosine"])
@pytest.mark.parametrize("prior", ["released", "paper"])
@pytest.mark.parametrize("target", RIVALS)
def test_no_copy_is_exactly_zero(target: str, prior: str, form: str) -> None:
    query, reference = (torch.randn(2, 9, 5).requires_grad_() for _ in "qr")
    table = torch.full((2, 12, 12), -1, dtype=torch.int32)
    loss = copynce_loss(query, reference, table, table, patch_size=4, target=target, prior=prior, form=form)
    loss.backward()
    assert loss.item() == 0
    assert not query.grad.any()
    assert not reference.grad.any()


def test_a_shift_by_one_patch_is_found_by_location_and_by_feature() -> None:
    table = torch.full((1, 8, 8), -1, dtype=torch.int32)
    reverse = table.clone()
    index = torch.arange(64, dtype=torch.int32).view(8, 8)
    table[0, :, :6], reverse[0, :, 2:] = index[:, 2:], index[:, :6]
    reference = torch.eye(16)[None]
    query = reference.view(1, 4, 4, 16).roll(-1, 2).flatten(1, 2)
    for target in RIVALS:
        # 12 of 16 patches are copied; their target is the same token, and the other 15 are orthogonal to it.
        loss = copynce_loss(query, reference, table, reverse, patch_size=2, target=target)
        assert float(loss) == pytest.approx(12 / 16 * (math.log(math.exp(16) + 15) - 16), rel=1e-4, abs=1e-7)
        assert float(copynce_loss(query, -reference, table, reverse, patch_size=2, form="cosine")) == 1.5


@pytest.mark.parametrize("target", ["overlap", *RIVALS])
def test_cosine_of_equal_and_opposite_tokens(target: str) -> None:
    table = torch.arange(16, dtype=torch.int32).view(1, 4, 4)
    tokens = torch.ones(1, 4, 3)
    for sign, expected in ((2.0, 0.0), (-2.0, 2.0)):
        loss = copynce_loss(tokens, sign * tokens, table, table, patch_size=2, target=target, form="cosine")
        assert float(loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["nce", "cosine"])
@pytest.mark.parametrize("target", RIVALS)
def test_inactive_pairs_do_not_count(target: str, form: str) -> None:
    batch = make_batch((8, 8), (8, 8), 4)
    batch[0][1], batch[1][1] = torch.nan, torch.inf
    active = torch.tensor([True, False, True])
    loss = copynce_loss(*batch, patch_size=4, target=target, form=form, active=active)
    kept = [tensor[active] for tensor in batch]
    assert float(loss) == pytest.approx(float(copynce_loss(*kept, patch_size=4, target=target, form=form)), rel=1e-6)
    empty = [tensor[:0] for tensor in batch]
    assert float(copynce_loss(*empty, patch_size=4, target=target, form=form)) == 0


def test_compiles_without_a_graph_break_and_serves_as_a_module() -> None:
    batch = make_batch((8, 8), (8, 8), 4)
    module = CopyNCELoss(patch_size=4, target="both", neighbours=2)
    assert "target='both', neighbours=2, form='nce'" in repr(module)
    eager = copynce_loss(*batch, patch_size=4, target="both", neighbours=2)
    assert torch.equal(module(*batch), eager)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*batch), eager)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("target", "nearest", ValueError, r"target must be one of 'overlap', 'feature', .*got 'nearest'"),
        ("form", "kl", ValueError, r"form must be one of 'nce', 'cosine', got 'kl'"),
        ("neighbours", 0, ValueError, r"neighbours must be at least 1, got 0"),
        ("neighbours", 1.0, TypeError, r"neighbours must be an int, got float"),
        ("backend", "cpu", ValueError, r"form='cosine' needs backend 'auto' or 'reference', got 'cpu'"),
    ],
)
def test_bad_arguments_say_what_is_wrong(name: str, value: object, error: type[Exception], match: str) -> None:
    batch = make_batch((8, 8), (8, 8), 4)
    with pytest.raises(error, match=match):
        copynce_loss(*batch, **{"patch_size": 4, "form": "cosine", name: value})


def test_index_outside_of_the_other_picture() -> None:
    batch = make_batch((8, 8), (8, 8), 4)
    batch[2][0, 0, 0] = 64
    with pytest.raises(ValueError, match=r"query_to_reference must hold -1 or a pixel index below 64"):
        copynce_loss(*batch, patch_size=4, target="location")
