"""Groups against a twin that compares all pairs of all groups in each step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from copynce.copies.groups import complete_groups


def obvious(count: int, known: dict[tuple[int, int], float], threshold: float) -> list[list[int]]:
    groups = [[place] for place in range(count)]
    while True:
        links = {
            (a, b): min(known.get((min(i, j), max(i, j)), 0.0) for i in groups[a] for j in groups[b])
            for a, b in itertools.combinations(range(len(groups)), 2)
        }
        if not links or max(links.values()) < threshold:
            return [group for group in groups if len(group) > 1]
        a, b = max(links, key=lambda pair: links[pair])  # the first of the highest
        groups[a] = sorted(groups[a] + groups[b])
        del groups[b]


@pytest.mark.parametrize("levels", [3, 1000])  # many equal probabilities, or hardly any
def test_groups_as_all_pairs_of_all_groups_tell(levels: int) -> None:
    rng = np.random.default_rng(levels)
    seen = 0
    for _ in range(60):
        count = int(rng.integers(2, 14))
        pairs = np.array(list(itertools.combinations(range(count), 2)))
        pairs = pairs[rng.random(len(pairs)) < rng.choice([0.3, 0.7, 1.0])]
        pairs = rng.permutation(pairs) if len(pairs) else pairs.reshape(0, 2)
        probabilities = 1 - rng.integers(0, levels, len(pairs)) / levels / 2
        known = dict(zip(map(tuple, pairs.tolist()), probabilities.tolist(), strict=True))
        flipped = np.where(rng.random((len(pairs), 1)) < 0.5, pairs, pairs[:, ::-1])
        found = complete_groups(count, flipped, probabilities, 0.7)
        assert found == obvious(count, known, 0.7)
        for group in found:
            assert all(known[pair] >= 0.7 for pair in itertools.combinations(group, 2))
        seen += len(found)
    assert seen > 60


def test_many_pictures_with_a_chain_and_a_clique() -> None:
    chain = [[place, place + 1] for place in range(20_000)]
    clique = [list(pair) for pair in itertools.combinations(range(20_001, 20_061), 2)]
    pairs = np.array(chain + clique)
    groups = complete_groups(20_061, pairs, np.full(len(pairs), 0.99), 0.95)
    assert groups[0] == [0, 1]
    assert len(groups) == 10_001
    assert groups[-1] == list(range(20_001, 20_061))


def test_what_is_no_pair() -> None:
    assert complete_groups(0, np.empty((0, 2), np.int64), [], 0.5) == []
    for pairs, message in (([[0, 0]], "different places"), ([[0, 9]], "from 0 to 2"), ([[0, 1], [1, 0]], "twice")):
        with pytest.raises(ValueError, match=message):
            complete_groups(3, pairs, [0.9] * len(pairs), 0.5)
    with pytest.raises(ValueError, match="threshold must be above 0"):
        complete_groups(3, [[0, 1]], [0.9], 0.0)
