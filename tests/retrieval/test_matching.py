"""Matching: scores against plain forward passes of every pair, passes counted, parts kept, pictures broken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import copynce.retrieval.matcher_passes as passes_module
import copynce.retrieval.matching as matching_module
from copynce.data import Manifest, Quarantine
from copynce.errors import DataError
from copynce.models import Matcher, build_matcher
from copynce.retrieval.crops import lce_forwards, lce_query, lce_reference, one_of_one
from copynce.retrieval.matching import score_pairs
from copynce.retrieval.pair_scores import ROLES, PairScores, Role, ScoreStore, plan_pairs
from copynce.retrieval.query_views import QUERY_VIEWS
from dali_pipelines import CropLoader, LoaderOptions

SIZE = 32
QUERIES, REFERENCES = 3, 5
ENCODING = 4 * (1 + 16) * 24  # bytes


def matcher() -> Matcher:
    """Logits of pairs some tenths apart, in any order of the pictures."""
    options = {"embed_dim": 24, "num_heads": 3, "patch_size": 8}
    torch.manual_seed(0)
    model = build_matcher(img_size=SIZE, encoder_blocks=1, fusion_blocks=2, backbone_options=options).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1 and "cls_token" not in name:
                weights.mul_(4)
        model.heads["cls_head"].classifier.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def model() -> Matcher:
    return matcher()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small pictures with odd sides; ``broken.jpg`` is none."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name in [f"q{i}" for i in range(QUERIES)] + [f"r{i}" for i in range(REFERENCES)]:
        dots = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        sides = random.integers(19, 60, 2)
        Image.fromarray(dots).resize((int(sides[0]), int(sides[1]) | 1), Image.Resampling.BICUBIC).save(
            folder / f"{name}.png"
        )
    (folder / "broken.jpg").write_text("nothing")
    return folder


def manifest(folder: Path, letter: str, broken: int | None = None) -> Manifest:
    count = QUERIES if letter == "q" else REFERENCES
    paths = [folder / ("broken.jpg" if i == broken else f"{letter}{i}.png") for i in range(count)]
    return Manifest([f"{letter.upper()}{i}" for i in range(count)], paths, folder)


def every_pair(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(f"Q{q}", f"R{r}") for q in range(QUERIES) for r in range(REFERENCES)]
    order = np.random.default_rng(seed).permutation(len(pairs))
    columns = np.array(pairs, object)[order]
    return columns[:, 0], columns[:, 1]


def views(folder: Path, name: str, cuts: object) -> Tensor:
    """[V, 3, S, S]; the loader's pixels are compared with Pillow's elsewhere."""
    options = LoaderOptions(size=SIZE, batch_size=1)
    path = folder / f"{name.lower()}.png"
    ((_, found),) = CropLoader([path], cuts, options, on_broken=lambda path, why: None)  # type: ignore[arg-type]
    return found[0]


def plain(model: Matcher, folder: Path, pairs: tuple[np.ndarray, np.ndarray], local_crops: bool) -> np.ndarray:
    """One plain forward pass for each view of each pair, as the method says it."""
    both = (lce_query, lce_reference) if local_crops else (one_of_one, one_of_one)
    pictures = {name: views(folder, name, both[side]) for side in (0, 1) for name in set(pairs[side])}
    forwards = lce_forwards() if local_crops else [(0, 0)]
    assert len(forwards) == (35 if local_crops else 1)
    scores = []
    with torch.inference_mode():
        for query, reference in zip(*pairs, strict=True):
            logits = [model(pictures[query][q, None], pictures[reference][r, None]) for q, r in forwards]
            scores.append(float(torch.cat(logits).sigmoid().max()))
    return np.array(scores)


def score(model: Matcher, folder: Path, **options: object) -> PairScores:
    settings: dict[str, object] = {"precision": "fp32", "batch_size": 4, **options}
    pairs = settings.pop("pairs", None) or every_pair()
    lists = settings.pop("lists", None) or (manifest(folder, "q"), manifest(folder, "r"))
    return score_pairs(model, pairs, *lists, **settings)  # type: ignore[misc,arg-type]


@pytest.mark.numeric
def test_scores_equal_a_plain_forward_pass_of_every_pair(model: Matcher, folder: Path) -> None:
    done: list[int] = []
    found = score(model, folder, progress=done.append)
    expected = plain(model, folder, every_pair(), local_crops=False)
    assert expected.std() > 0.05
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)
    assert found.scores.dtype == np.float32
    assert [found.queries.tolist(), found.references.tolist()] == [column.tolist() for column in every_pair()]
    assert (found.encodings, found.fusions) == (QUERIES + REFERENCES, QUERIES * REFERENCES)
    assert (found.precision, found.unscored) == ("fp32", [])
    assert done == sorted(done)
    assert done[-1] == len(found.scores)


@pytest.mark.numeric
def test_local_crops_equal_35_plain_forward_passes(model: Matcher, folder: Path) -> None:
    found = score(model, folder, local_crops=True, batch_size=30)
    expected = plain(model, folder, every_pair(), local_crops=True)
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)
    assert (found.encodings, found.fusions) == (25 * QUERIES + 10 * REFERENCES, 34 * QUERIES * REFERENCES)
    vanilla = score(model, folder).scores
    assert (found.scores >= vanilla - 1e-6).all()
    assert (found.scores > vanilla + 1e-3).any()


def chosen_views(count: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, QUERY_VIEWS.count, count)


@pytest.mark.numeric
@pytest.mark.parametrize(("memory", "part"), [(10**6, 100), (2 * ENCODING, 4)])
def test_a_view_of_each_pair_equals_plain_forward_passes(
    model: Matcher, folder: Path, tmp_path: Path, memory: int, part: int
) -> None:
    """Whole, turned or a box; two views of one query in different pairs; each encoded once where all can be held."""
    pairs = every_pair()
    chosen = chosen_views(len(pairs[0]))
    keep = ScoreStore(tmp_path, "m")
    whole = score(model, folder, keep=keep, part=part)
    found = score(model, folder, query_views=chosen, keep=keep, memory=memory, part=part)
    for query, reference, view, value in zip(*pairs, chosen, found.scores, strict=True):
        query_views = views(folder, query, QUERY_VIEWS.cuts)
        with torch.inference_mode():
            logit = model(query_views[view, None], views(folder, reference, one_of_one))
        assert value == pytest.approx(float(logit.sigmoid()), abs=1e-6), (query, reference, view)
    assert found.queries.tolist() == pairs[0].tolist()
    assert found.fusions == len(chosen)
    if memory > 10**5:
        assert found.encodings == len(set(zip(pairs[0], chosen, strict=True))) + REFERENCES
    again = score(model, folder, query_views=chosen, keep=keep, memory=memory, part=part)
    np.testing.assert_array_equal(again.scores, found.scores)
    assert np.abs(found.scores - whole.scores).max() > 1e-3
    first = score(model, folder, query_views=np.zeros(len(chosen), np.int64))
    np.testing.assert_allclose(first.scores, whole.scores, atol=1e-6)


def test_a_broken_query_has_no_score_in_any_view(model: Matcher, folder: Path) -> None:
    lists = manifest(folder, "q", broken=1), manifest(folder, "r")
    quarantine = Quarantine()
    chosen = chosen_views(QUERIES * REFERENCES)
    found = score(model, folder, lists=lists, query_views=chosen, quarantine=quarantine)
    assert sorted(found.unscored) == [("Q1", f"R{i}") for i in range(REFERENCES)]
    assert [path for path, _ in quarantine.entries()] == [str(folder / "broken.jpg")]


def test_one_pair_takes_no_more_than_36_and_34_passes(model: Matcher, folder: Path) -> None:
    pairs = np.array(["Q0"], object), np.array(["R0"], object)
    found = score(model, folder, local_crops=True, pairs=pairs)
    assert (found.encodings, found.fusions) == (35, 34)


@pytest.mark.parametrize(
    ("local_crops", "memory", "again"),
    # 2 of 3 queries are held, or 3 of 5 references with their 10 views: for the second block all others come again.
    [(False, 2, 5), (True, 30, 75)],
)
def test_less_memory_takes_more_passes_and_gives_the_same_scores(
    model: Matcher, folder: Path, local_crops: bool, memory: int, again: int
) -> None:
    whole = score(model, folder, local_crops=local_crops)
    less = score(model, folder, local_crops=local_crops, memory=memory * ENCODING)
    np.testing.assert_allclose(less.scores, whole.scores, atol=1e-6)
    assert (less.encodings, less.fusions) == (whole.encodings + again, whole.fusions)


def test_every_pair_stands_once_in_a_plan_and_few_are_held() -> None:
    random = np.random.default_rng(0)
    places: dict[Role, np.ndarray] = {"query": random.integers(0, 40, 500), "reference": random.integers(0, 90, 500)}
    for capacity, pairs in [(1, 1), (30, 7), (1000, 60)]:
        plan = plan_pairs(places, {"query": 3, "reference": 2}, capacity=capacity, pairs=pairs)
        views = {"query": 3, "reference": 2}[plan.hold]
        assert sorted(np.concatenate(plan.parts)) == list(range(500))
        assert max(map(len, plan.held)) == max(1, min(capacity // views, 40 if plan.hold == "query" else 90))
        passing = ROLES[1 - ROLES.index(plan.hold)]
        seen: set[tuple[int, int]] = set()
        for rows, block in zip(plan.parts, plan.blocks, strict=True):
            assert set(places[plan.hold][rows]) <= set(plan.held[block])
            assert (np.diff(places[passing][rows]) >= 0).all()
            groups = {(int(block), int(place)) for place in places[passing][rows]}
            assert not groups & seen, "a picture passes once for a block"
            seen |= groups
        held = sum(map(len, plan.held))
        assert plan.encodings == held * views + len(seen) * (5 - views)


def test_pairs_with_a_broken_picture_are_left_out_and_named(model: Matcher, folder: Path) -> None:
    whole = score(model, folder)
    for local_crops, broken in ((False, (1, 4)), (True, (2, None))):
        quarantine = Quarantine()
        lists = manifest(folder, "q", broken=broken[0]), manifest(folder, "r", broken=broken[1])
        found = score(model, folder, lists=lists, quarantine=quarantine, local_crops=local_crops)
        bad = [
            pair for pair in zip(*every_pair(), strict=True) if pair[0] == f"Q{broken[0]}" or pair[1] == f"R{broken[1]}"
        ]
        assert found.unscored == bad
        assert len(found.scores) == QUERIES * REFERENCES - len(bad)
        assert [path for path, _ in quarantine.entries()] == [str(folder / "broken.jpg")]
        if not local_crops:
            kept = [pair not in bad for pair in zip(*every_pair(), strict=True)]
            np.testing.assert_allclose(found.scores, whole.scores[kept], atol=1e-6)


def test_all_pictures_broken(model: Matcher, folder: Path) -> None:
    pairs = np.array(["Q0"], object), np.array(["R0"], object)
    lists = manifest(folder, "q", broken=0), manifest(folder, "r")
    found = score(model, folder, pairs=pairs, lists=lists, precision="auto")
    assert (found.unscored, len(found.scores)) == ([("Q0", "R0")], 0)


class Killed(Exception):
    pass


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of views that were fused since."""
    fused: list[int] = []
    fuse = Matcher.fuse

    def counting(self: Matcher, query: Tensor, reference: Tensor) -> Tensor:
        fused.append(len(query))
        return fuse(self, query, reference)

    monkeypatch.setattr(Matcher, "fuse", counting)
    return fused


def test_a_killed_matching_goes_on(model: Matcher, folder: Path, tmp_path: Path, counted: list[int]) -> None:
    whole = score(model, folder, part=4)
    counted.clear()
    store = ScoreStore(tmp_path / "parts", "model")

    def kill(done: int) -> None:
        if done > 10:
            raise Killed

    with pytest.raises(Killed):
        score(model, folder, part=4, keep=store, progress=kill)
    first = sum(counted)
    assert 0 < first < 15
    parts = sorted((tmp_path / "parts").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:-3])  # damaged since
    counted.clear()
    found = score(model, folder, part=4, keep=store)
    np.testing.assert_array_equal(found.scores, whole.scores)
    assert (found.encodings, found.fusions) == (whole.encodings, 15)
    assert 0 < sum(counted) < 15

    counted.clear()
    again = score(model, folder, part=4, keep=store)
    np.testing.assert_array_equal(again.scores, whole.scores)
    assert not counted
    score(model, folder, part=4, keep=ScoreStore(tmp_path / "parts", "another model"))
    assert sum(counted) == 15
    counted.clear()
    score(model, folder, part=100, keep=ScoreStore(tmp_path / "parts", "model"))
    assert sum(counted) == 15
    assert len(list((tmp_path / "parts").iterdir())) == 1


@pytest.mark.parametrize("local_crops", [False, True])
def test_a_part_goes_on_where_it_left_its_scores(
    model: Matcher,
    folder: Path,
    tmp_path: Path,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
    local_crops: bool,
) -> None:
    lists = manifest(folder, "q", broken=1), manifest(folder, "r", broken=2)
    whole = score(model, folder, lists=lists, local_crops=local_crops)
    assert whole.fusions == 8 * (34 if local_crops else 1)
    counted.clear()
    monkeypatch.setattr(matching_module, "LEAVE_SECONDS", 0.0)
    store = ScoreStore(tmp_path / "parts", "model")

    def kill(done: int) -> None:
        if done >= 8:
            raise Killed

    with pytest.raises(Killed):
        score(model, folder, lists=lists, local_crops=local_crops, keep=store, progress=kill)
    assert 0 < sum(counted) < whole.fusions
    found = score(model, folder, lists=lists, local_crops=local_crops, keep=store)
    np.testing.assert_array_equal(found.scores, whole.scores)
    assert (found.unscored, found.fusions, sum(counted)) == (whole.unscored, whole.fusions, whole.fusions)
    assert [path.name for path in store.folder.iterdir()] == ["scores-000000.safetensors"]


class Group:
    """One of two processes, here a thread."""

    def __init__(self, rank: int, barrier: threading.Barrier, box: list[object]) -> None:
        self.rank, self.size = rank, 2
        self._barrier, self._box = barrier, box

    def broadcast_object(self, value: object) -> object:
        if self.rank == 0:
            self._box[:] = [value]
        self._barrier.wait(60)
        return self._box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        yield
        self._barrier.wait(60)


def test_processes_share_the_parts_and_all_get_the_same(folder: Path, tmp_path: Path) -> None:
    alone = score(matcher(), folder, part=4)
    barrier, box = threading.Barrier(2), list[object]()
    results: dict[int, PairScores] = {}
    done: dict[int, list[int]] = {0: [], 1: []}
    models = [matcher(), matcher()]

    def run(rank: int) -> None:
        results[rank] = score(
            models[rank], folder, part=4, keep=ScoreStore(tmp_path, "m"), processes=Group(rank, barrier, box),
            progress=done[rank].append, precision="auto",
        )  # fmt: skip

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rank in (0, 1):
        if results[rank].precision == "fp32":
            np.testing.assert_array_equal(results[rank].scores, alone.scores)
        np.testing.assert_array_equal(results[rank].scores, results[0].scores)
    assert results[0].fusions == 15


def test_bf16_is_taken_only_where_logits_agree(model: Matcher, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "bf16_in_hardware", lambda device: True)
    said: list[str] = []
    monkeypatch.setattr(passes_module, "BF16_AGREES", 10.0)
    auto = score(model, folder, precision="auto", say=said.append)
    exact = score(model, folder)
    assert (auto.precision, said) == ("bf16", [])
    assert 0 < np.abs(auto.scores - exact.scores).max() < 0.05
    np.testing.assert_array_equal(auto.scores, score(model, folder, precision="bf16").scores)
    monkeypatch.setattr(passes_module, "BF16_AGREES", 0.0)
    auto = score(model, folder, precision="auto", say=said.append)
    assert auto.precision == "fp32"
    np.testing.assert_array_equal(auto.scores, exact.scores)
    assert "goes on in fp32" in said[0]
    assert auto.encodings == exact.encodings, "the question is not counted"


def test_what_cannot_be_scored_is_a_sentence(model: Matcher, folder: Path) -> None:
    nothing = np.array([], object)
    with pytest.raises(DataError, match="there is no candidate pair to score"):
        score(model, folder, pairs=(nothing, nothing))
    strange = np.array(["Q0"], object), np.array(["R9"], object)
    with pytest.raises(DataError, match="reference 'R9' of the candidates is not among the 5 references in"):
        score(model, folder, pairs=strange)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score(model, folder, batch_size=0)
    with pytest.raises(ValueError, match="query_views must be 15 numbers from 0 to 22, one for each pair"):
        score(model, folder, query_views=np.full(15, 23))
    with pytest.raises(ValueError, match="query_views names one view for each pair, local_crops means all"):
        score(model, folder, query_views=chosen_views(15), local_crops=True)
    with pytest.raises(ValueError, match="precision must be auto, fp32 or bf16"):
        score(model, folder, precision="fp16")
    damaged = matcher()
    torch.nn.init.constant_(damaged.heads["cls_head"].classifier.weight, float("nan"))
    with pytest.raises(DataError, match="logits of the matcher are not finite; its weights are damaged"):
        score(damaged, folder)


@pytest.mark.numeric
def test_scores_of_this_way(folder: Path) -> None:
    """Whoever must change these numbers adds one to WAY."""
    model = matcher()
    random = np.random.RandomState(0)  # its numbers stay as they are
    with torch.no_grad():
        for weights in model.parameters():
            noise = torch.from_numpy(random.standard_normal(tuple(weights.shape)))
            weights.copy_(noise / weights.shape[-1] ** 0.5 if weights.ndim > 1 else 1 + 0.1 * noise)
    pairs = np.array(["Q0", "Q1"], object), np.array(["R0", "R3"], object)
    found = [score(model, folder, pairs=pairs, local_crops=crops).scores.tolist() for crops in (False, True)]
    found.append(score(model, folder, pairs=pairs, query_views=np.array([2, 13])).scores.tolist())
    np.testing.assert_allclose(found, [[0.280198, 0.272210], [0.326103, 0.312029], [0.290870, 0.264597]], atol=1e-4)
