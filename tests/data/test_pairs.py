"""Pair plans: who is paired with whom, how often, on which rank, and what stands in for a broken picture."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from copynce.data import Manifest, Neighbours, Quarantine
from copynce.data.mixtures import MixedPairs
from copynce.data.pairs import DescriptorPairs, MatcherPairs, PairSampler, PairSource, SupervisedPairs
from copynce.data.synthetic import make_pictures
from copynce.errors import DataError
from copynce.pixtrace import EditProgram, sample_program
from dali_pipelines import LoaderOptions, Pair, PairLoader

PLAIN = EditProgram()


def pictures(count: int, folder: str = "train", letter: str = "T") -> Manifest:
    uuids = [f"{letter}{i:04}" for i in range(count)]
    return Manifest(uuids, [Path(folder, f"{uuid}.jpg") for uuid in uuids], Path(folder))


def ring(count: int, columns: int = 3) -> Neighbours:
    """Neighbours of i are i + 1, i + 2, ...; the picture itself stands second in its row."""
    steps = np.array([1, 0, *range(2, columns + 3)])
    return Neighbours((np.arange(count)[:, None] + steps) % count, columns)


def plan_of(kind: str, count: int) -> PairSource:
    if kind == "supervised":
        queries = pictures(count, "queries", "Q")
        truth = {uuid: [f"R{i:04}", f"R{(i + 1) % count:04}"] for i, uuid in enumerate(queries.uuids)}
        return SupervisedPairs(queries, pictures(count, "references", "R"), truth, "light", 7, 0.5)
    if kind == "matcher":
        return MatcherPairs(pictures(count), "light", 7, ring(count))
    if kind == "mixture":  # of ``count`` items
        labelled, generated = plan_of("supervised", count - 5), plan_of("matcher", 12)
        assert isinstance(labelled, SupervisedPairs)
        assert isinstance(generated, MatcherPairs)
        return MixedPairs(labelled, generated, 5 / 12, 7)
    return DescriptorPairs(pictures(count), "light", 7, ring(count) if kind == "descriptor with neighbours" else None)


KINDS = ("descriptor", "descriptor with neighbours", "matcher", "supervised", "mixture")


def test_descriptor_pairs_are_a_picture_edited_and_as_it_is() -> None:
    manifest = pictures(5)
    (pair,) = DescriptorPairs(manifest, "descriptor", seed=3).item(2, epoch=4)
    program = sample_program("descriptor", seed=3, epoch=4, uuid="T0002")
    assert pair == Pair(manifest.paths[2], program, manifest.paths[2], PLAIN, True, "T0002")


def test_descriptor_items_with_neighbours_are_two_pairs() -> None:
    manifest = pictures(40)
    plan = DescriptorPairs(manifest, "light", 7, ring(40))
    chosen: Counter[int] = Counter()
    for epoch in range(30):
        first, second = plan.item(11, epoch)
        assert [first] == DescriptorPairs(manifest, "light", 7).item(11, epoch)
        other = manifest.uuids.index(second.uuid)
        chosen[other] += 1
        assert second.query_path == second.reference_path == manifest.paths[other]
        assert second.reference_program == PLAIN
        assert second.positive
        assert second.traced
        # B is edited in another way than where it is an A, and than as the neighbour of another A.
        assert second.query_program != plan.item(other, epoch)[0].query_program
    assert set(chosen) == {12, 13, 14}  # three neighbours, never itself
    assert plan.item(11, 5) == plan.item(11, 5)


def test_matcher_pairs_have_the_shares_of_the_method() -> None:
    count = 400
    manifest, neighbours = pictures(count), ring(count, columns=5)
    plan = MatcherPairs(manifest, "matcher", 1, neighbours)
    positives, hard, edited, negatives = 0, 0, 0, 0
    for epoch in range(5):
        for index in range(count):
            (pair,) = plan.item(index, epoch)
            assert (pair.reference_path, pair.reference_program) == (manifest.paths[index], PLAIN)
            assert pair.uuid == manifest.uuids[index]
            positives += pair.positive
            if pair.positive:
                assert pair.query_program == sample_program("matcher", seed=1, epoch=epoch, uuid=pair.uuid)
                continue
            query = manifest.paths.index(Path(pair.query_path))
            assert query != index
            negatives += 1
            hard += query in neighbours.of(index)
            edited += pair.query_program != PLAIN
    # 2000 draws: three standard deviations of a share are at most 0.035, of 1400 negatives 0.04.
    assert positives / 2000 == pytest.approx(0.3, abs=0.031)
    assert hard / negatives == pytest.approx(0.5 + 0.5 * 5 / 399, abs=0.04)
    assert edited / negatives == pytest.approx(0.5, abs=0.04)


def test_matcher_without_neighbours_takes_any_other_picture() -> None:
    plan = MatcherPairs(pictures(6), "light", 0)
    met: dict[str, set[str]] = {}
    for epoch in range(200):
        for index in range(6):
            (pair,) = plan.item(index, epoch)
            if not pair.positive:
                met.setdefault(pair.uuid, set()).add(Path(pair.query_path).stem)
    everyone = set(plan.manifest.uuids)
    assert met == {uuid: everyone - {uuid} for uuid in everyone}


@pytest.mark.parametrize("kind", [DescriptorPairs, MatcherPairs])
def test_pictures_without_neighbours_get_another(kind: type[DescriptorPairs | MatcherPairs]) -> None:
    plan = kind(pictures(5), "light", 0, Neighbours(np.full((5, 4), -1), columns=4))
    pairs = [pair for epoch in range(20) for pair in plan.item(3, epoch)]
    others = {Path(pair.query_path).stem for pair in pairs} - {"T0003"}
    assert others == {"T0000", "T0001", "T0002", "T0004"}


def test_supervised_pairs_are_copies_that_are_not_traced() -> None:
    queries, references = pictures(4, "queries", "Q"), pictures(3, "references", "R")
    truth = {"Q0000": ["R0001"], "Q0001": [], "Q0003": ["R0000", "R0002"]}
    plan = SupervisedPairs(queries, references, truth, "light", 0)
    assert len(plan) == 2  # distractors are no items
    assert plan.item(0, 0) == [
        Pair(Path("queries/Q0000.jpg"), PLAIN, Path("references/R0001.jpg"), PLAIN, True, "Q0000", traced=False)
    ]
    shown = {Path(plan.item(1, epoch)[0].reference_path).stem for epoch in range(20)}
    assert shown == {"R0000", "R0002"}
    edited = SupervisedPairs(queries, references, truth, "light", 0, augment_probability=0.5)
    programs = [edited.item(1, epoch)[0] for epoch in range(60)]
    assert all(pair.reference_program == PLAIN for pair in programs)
    assert 15 <= sum(pair.query_program == PLAIN for pair in programs) <= 45
    assert programs[3] == edited.item(1, 3)[0]


def test_a_mixture_is_all_copies_and_in_each_epoch_other_generated_pairs() -> None:
    truth = {"Q0000": ["R0001"], "Q0003": ["R0000"]}
    labelled = SupervisedPairs(pictures(4, "queries", "Q"), pictures(3, "references", "R"), truth, "light", 0)
    generated = MatcherPairs(pictures(120), "light", 0)
    plan = MixedPairs(labelled, generated, 1 / 12, 0)
    assert len(plan) == 2 + 10
    shown, positives = [], 0
    for epoch in range(24):
        items = [plan.item(index, epoch) for index in range(12)]
        assert items[:2] == [labelled.item(index, epoch) for index in range(2)]
        drawn = [pair for item in items[2:] for pair in item]
        assert drawn == [generated.item(int(pair.uuid[1:]), epoch)[0] for pair in drawn]
        positives += sum(pair.positive for pair in drawn)
        shown.append([pair.uuid for pair in drawn])
    for start in (0, 12):  # each picture once in a round of twelve epochs
        assert sorted(uuid for epoch in shown[start : start + 12] for uuid in epoch) == generated.manifest.uuids
    assert shown[0] != shown[12]
    assert positives / 240 == pytest.approx(0.3, abs=0.09)  # three standard deviations
    assert plan.fingerprint != MixedPairs(labelled, generated, 1 / 6, 0).fingerprint
    assert len(MixedPairs(labelled, generated, 1e-9, 0)) == 3
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        MixedPairs(labelled, generated, 0, 0)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"Q0009": ["R0000"]}, "queries: query 'Q0009' of the ground truth is not among the queries"),
        ({"Q0000": ["R0007"]}, "references: reference 'R0007', which query 'Q0000' copies, is not among the 3"),
        ({"Q0000": []}, "queries: the ground truth names no query that copies a reference"),
    ],
)
def test_ground_truth_of_other_pictures_is_named(truth: dict[str, list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SupervisedPairs(pictures(4, "queries", "Q"), pictures(3, "references", "R"), truth, "light", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [17, 24, 41])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_make_equal_steps_of_disjoint_pictures(kind: str, count: int, world_size: int) -> None:
    """Uneven sizes: every rank makes the same number of full steps; a picture is an item at most once per epoch."""
    plan = plan_of(kind, count)
    ranks = [PairSampler(plan, 3, seed=9, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = count // (3 * world_size)
    assert {rank.steps_per_epoch for rank in ranks} == {steps}
    one = PairSampler(plan, 3 * world_size, seed=9)
    assert one.steps_per_epoch == steps
    size = plan.pairs_per_item
    for epoch in range(2):
        batches = [list(rank.batches(epoch * steps, (epoch + 1) * steps)) for rank in ranks]
        assert all(len(batch) == 3 * size for rank in batches for batch in rank)
        items = [batch[i : i + size] for rank in batches for batch in rank for i in range(0, len(batch), size)]
        firsts = [item[0].uuid for item in items]
        assert len(firsts) == len(set(firsts)) == 3 * world_size * steps
        whole = [pair.uuid for batch in one.batches(epoch * steps, (epoch + 1) * steps) for pair in batch]
        assert Counter(whole) == Counter(pair.uuid for item in items for pair in item)


def test_a_step_of_several_parts_has_the_items_of_one_large_batch() -> None:
    plan = plan_of("matcher", 41)
    parts = PairSampler(plan, 3, seed=9, world_size=2, parts=3)
    whole = PairSampler(plan, 9, seed=9, world_size=2)
    assert parts.steps_per_epoch == whole.steps_per_epoch == 2
    found, expected = ([pair.uuid for batch in one.batches(1, 5) for pair in batch] for one in (parts, whole))
    assert found == expected
    assert [len(batch) for batch in parts.batches(1, 5)] == [3] * 12
    assert list(parts.batches(3, 5)) == list(parts.batches(1, 5))[6:]
    with pytest.raises(DataError, match="one step takes 42 pictures on each of 1 processes, got 41 pictures in all"):
        PairSampler(plan, 6, seed=9, parts=7)
    with pytest.raises(ValueError, match="parts of a step must be at least 1, got 0"):
        PairSampler(plan, 6, seed=9, parts=0)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_follow_from_the_step_alone(kind: str) -> None:
    sampler = PairSampler(plan_of(kind, 17), 3, seed=9, rank=1, world_size=2)
    whole = list(sampler.batches(0, 9))  # four and a half epochs
    assert list(sampler.batches(5, 9)) == whole[5:]
    assert list(pickle.loads(pickle.dumps(sampler)).batches(5, 9)) == whole[5:]  # as a worker process has it
    assert len({json.dumps([pair.query_program.to_json() for pair in batch]) for batch in whole}) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_substitutes_are_of_the_same_kind_and_repeat(kind: str) -> None:
    plan = plan_of(kind, 20)
    for broken in (pair for index in range(20) for pair in plan.item(index, 0)):
        found = [plan.substitute(broken, attempt) for attempt in range(1, 9)]
        assert found == [plan.substitute(broken, attempt) for attempt in range(1, 9)]
        assert len({pair.query_path for pair in found}) > 3
        for attempt, pair in enumerate(found, start=1):
            assert (pair.positive, pair.traced) == (broken.positive, broken.traced)
            assert (pair.query_program, pair.reference_program) == (broken.query_program, PLAIN)
            assert (pair.query_path == pair.reference_path) == (pair.positive and pair.traced)
            if not broken.positive and attempt % 2:
                assert pair.reference_path == broken.reference_path
            if not pair.traced:
                number, count = int(pair.uuid[1:]), 20 if kind == "supervised" else 15
                assert Path(pair.reference_path).stem in (f"R{number:04}", f"R{(number + 1) % count:04}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """16 pictures, of which two are broken."""
    folder = tmp_path_factory.mktemp("pictures")
    made = make_pictures(folder, 16, seed=3, side_px=(48, 64))
    for path in made[:2]:
        path.write_bytes(b"no picture")
    return Manifest([path.stem for path in made], list(made), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_feeds_the_loader_past_broken_pictures(kind: str, files: Manifest) -> None:
    plan: PairSource
    if kind == "supervised":
        names = files.uuids
        truth = {name: [names[i - 1]] for i, name in enumerate(names)}
        plan = SupervisedPairs(files, files, truth, "light", 0)
    elif kind == "mixture":
        truth = {name: [files.uuids[i - 1]] for i, name in enumerate(files.uuids)}
        plan = MixedPairs(
            SupervisedPairs(files, files, truth, "light", 0), MatcherPairs(files, "light", 0, ring(16)), 0.5, 0
        )
    elif kind == "matcher":
        plan = MatcherPairs(files, "light", 0, ring(16))
    else:
        plan = DescriptorPairs(files, "light", 0, ring(16) if kind.endswith("neighbours") else None)
    sampler = PairSampler(plan, 4, seed=0)
    quarantine = Quarantine()
    with PairLoader(
        sampler.batches(0, 8),
        plan.pictures.paths,
        LoaderOptions(size=32, batch_size=4 * plan.pairs_per_item, threads=1),
        substitute=plan.substitute,
        on_broken=quarantine.add,
    ) as loader:
        batches = list(loader)
    assert {Path(path).stem for path, _ in quarantine.entries()} == set(files.uuids[:2])
    assert [len(batch.uuids) for batch in batches] == [4 * plan.pairs_per_item] * 8
    wanted = [pair for batch in sampler.batches(0, 8) for pair in batch]
    assert [flag for batch in batches for flag in batch.positive.tolist()] == [pair.positive for pair in wanted]
    traced = [flag for batch in batches for flag in batch.traced.tolist()]
    assert traced == [pair.traced for pair in wanted]
    assert set(traced) == {"supervised": {False}, "mixture": {False, True}}.get(kind, {True})
    copied = [bool((table >= 0).any()) for batch in batches for table in batch.query_to_reference]
    assert not any(shown for shown, pair in zip(copied, wanted, strict=True) if not (pair.positive and pair.traced))
    if kind != "supervised":
        assert sum(copied) > 0.8 * sum(pair.positive and pair.traced for pair in wanted)


def test_too_few_pictures_and_wrong_ranks_are_named() -> None:
    with pytest.raises(DataError, match="train: one step takes 4 pictures on each of 2 processes, got 7 pictures"):
        PairSampler(DescriptorPairs(pictures(7), "light", 0), 4, seed=0, world_size=2)
    with pytest.raises(ValueError, match="batch_size must be at least 2 items"):
        PairSampler(DescriptorPairs(pictures(7), "light", 0), 1, seed=0)
    with pytest.raises(ValueError, match=r"rank must be in .* = \[0, 2\), got 2"):
        PairSampler(DescriptorPairs(pictures(7), "light", 0), 2, seed=0, rank=2, world_size=2)
    plans: list[Callable[[], PairSource]] = [
        lambda: MatcherPairs(pictures(1), "light", 0),
        lambda: DescriptorPairs(pictures(1), "light", 0, Neighbours(np.zeros((1, 1), int), 1)),
    ]
    for plan in plans:
        with pytest.raises(DataError, match="train: pairs of different pictures need at least 2 pictures, got 1"):
            plan()
