"""What is watched of patches, against loops in float64 over the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from copynce.losses.settings import CopyNCESettings
from copynce.models import Descriptor, DescriptorConfig, build_matcher
from copynce.training import DescriptorLossConfig, DescriptorObjective, MatcherLossConfig, MatcherObjective
from copynce.training.objectives.base import Objective
from copynce.training.objectives.patches import watch_patches
from dali_pipelines import PairBatch

pytestmark = pytest.mark.numeric

NAMES = {"traced_patches", "prior_mass", "affinity_entropy", "affinity_entropy_uncopied", "patch_retrieval"}


def watched_by_loops(query: Tensor, reference: Tensor, batch: PairBatch, settings: CopyNCESettings) -> dict[str, list]:
    found = {name: [0.0, 0] for name in NAMES}

    def add(name: str, value: float) -> None:
        found[name][0] += value
        found[name][1] += 1

    size, gamma = settings.patch_size, settings.gamma
    (height, width), other_width = batch.query_to_reference.shape[1:], batch.reference_to_query.shape[2]
    for pair in range(len(query)):
        if not (batch.positive[pair] and batch.traced[pair]):
            continue
        table = batch.query_to_reference[pair].tolist()
        for i in range(query.shape[1]):
            top, left = i // (width // size) * size, i % (width // size) * size
            counts = [0] * reference.shape[1]
            for y in range(top, top + size):
                for x in range(left, left + size):
                    if table[y][x] >= 0:
                        row, column = divmod(table[y][x], other_width)
                        counts[row // size * (other_width // size) + column // size] += 1
            outside, inside = size**2 - sum(counts), sum(n**gamma for n in counts)
            total = inside + outside**gamma if settings.prior == "released" else inside
            copied = sum(counts) > 0
            cosines = [
                float(query[pair, i].double() @ one.double() / query[pair, i].double().norm() / one.double().norm())
                for one in reference[pair]
            ]
            powers = [math.exp(cosine / settings.temperature) for cosine in cosines]
            shares = [power / sum(powers) for power in powers]
            entropy = -sum(share * math.log(share) for share in shares)
            add("traced_patches", copied)
            add("prior_mass", inside / total if total else 0.0)
            add("affinity_entropy" if copied else "affinity_entropy_uncopied", entropy)
            if copied:
                add("patch_retrieval", counts[cosines.index(max(cosines))] > 0)
    assert height // size * (width // size) == query.shape[1]
    return found


@pytest.mark.parametrize(("gamma", "prior"), [(1.0, "released"), (3.0, "paper")])
def test_numbers_equal_their_plain_twin(gamma: float, prior: str) -> None:
    """Of 18 pairs (more than are looked at together) of pictures of 4 x 6 and 6 x 2 pixels, some of them no copies."""
    torch.manual_seed(1)
    pairs, settings = 18, CopyNCESettings(patch_size=2, gamma=gamma, prior=prior)
    query, reference = torch.randn(pairs, 6, 5), torch.randn(pairs, 3, 5)
    tables = torch.randint(-12, 12, (pairs, 4, 6), dtype=torch.int32).clamp_min(-1)
    back = torch.randint(-24, 24, (pairs, 6, 2), dtype=torch.int32).clamp_min(-1)
    tables[:4, :2, :4] = -1  # two patches that are not copied
    positive, traced = torch.ones(2, pairs, dtype=torch.bool)
    positive[3] = traced[5] = False
    query[5] = math.nan
    batch = PairBatch(query, reference, tables, back, positive, traced, [str(i) for i in range(pairs)])
    found, expected = watch_patches(query, reference, batch, settings), watched_by_loops(*batch_of(batch), settings)
    assert found.keys() == expected.keys() == NAMES
    for name, value in found.items():
        assert value.tolist() == pytest.approx(expected[name], rel=1e-5), name
        assert value[1] > 0
    assert 0 < found["patch_retrieval"][0] < found["patch_retrieval"][1]


def batch_of(batch: PairBatch) -> tuple[Tensor, Tensor, PairBatch]:
    return batch.query, batch.reference, batch


def objectives() -> list[Objective]:
    shape = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}
    descriptor = DescriptorConfig(img_size=32, dim=16, backbone_options={**shape, "depth": 1})
    matcher = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=1, backbone_options=shape)
    return [
        DescriptorObjective(Descriptor(descriptor), DescriptorLossConfig()),
        MatcherObjective(matcher, MatcherLossConfig()),
    ]


def test_an_objective_watches_when_asked_and_computes_the_same_loss() -> None:
    torch.manual_seed(0)
    views, every = torch.randn(2, 4, 3, 32, 32), torch.ones(4, dtype=torch.bool)
    table = torch.arange(32 * 32, dtype=torch.int32).view(1, 32, 32).repeat(4, 1, 1)
    batch = PairBatch(*views, table, table, every, every, list("abcd"))
    for objective in objectives():
        losses = []
        for watch in (False, True):
            loss, measures = objective(batch, watch)
            assert (measures.keys() >= NAMES) == watch
            assert not any(value.requires_grad for value in measures.values())
            losses.append(loss.item())
        assert losses[0] == losses[1]
        assert measures["traced_patches"].tolist() == [64, 64]
        assert measures["prior_mass"].tolist() == [64, 64]
