"""Pairs judged in blocks, with a matcher that shares the descriptor's blocks, equal the plain way of each pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.copies import judging
from copynce.copies.calibration import FEATURES, Calibration
from copynce.copies.judging import judge, look
from copynce.copies.pixels import SIDE as SIDE_PX
from copynce.copies.pixels import agreeing
from copynce.copies.polygons import area, mapped, rectangle
from copynce.copies.regions import CopiedRegion, copied_region
from copynce.data.synthetic import make_picture
from copynce.errors import DataError
from copynce.model import Model
from copynce.models import build_descriptor, build_matcher
from copynce.retrieval.query_views import query_views
from dali_pipelines import LoaderOptions, PictureLoader
from dali_pipelines.options import MEAN, STD

OPTIONS = {"embed_dim": 24, "num_heads": 2}
SIZE = 32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    paths = [folder / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        make_picture(rng, (70, 70)).resize((60 + number, 40)).save(path)
    return paths


@pytest.fixture(autouse=True)
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 on every processor."""
    monkeypatch.setattr(judging, "bf16_in_hardware", lambda device: False)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    descriptor = build_descriptor(
        img_size=SIZE, dim=16, head="cls", backbone_options={**OPTIONS, "depth": 3, "patch_size": 8}
    ).eval()
    matcher = build_matcher(
        img_size=SIZE, encoder_blocks=2, fusion_blocks=1, backbone_options={**OPTIONS, "patch_size": 8}, norm_eps=1e-6
    ).eval()
    own = descriptor.encoder.state_dict()
    matcher.encoder.load_state_dict({name: own[name] for name in matcher.encoder.state_dict()})
    background = np.random.default_rng(0).standard_normal((30, descriptor.dim)).astype(np.float32)
    return Model(
        descriptor,
        Path("model.safetensors"),
        "0" * 64,
        torch.device("cpu"),
        matcher=matcher,
        background=background,
        calibration=Calibration(tuple(np.linspace(0.1, 1, len(FEATURES)).tolist()), -1.0),
        one_pass=True,
    )


def plainly(model: Model, query: Path, reference: Path) -> tuple[float, float, float, float, float, float]:
    """Cosine, normalised cosine, matcher's logit, the region's evidence, and how its pixels agree, coarsely and finely,
    of a pair, by the models' own methods."""
    with torch.inference_mode():
        options = LoaderOptions(size=SIZE, batch_size=1)
        loaders = [PictureLoader([path], options, on_broken=lambda *_: None) for path in (query, reference)]
        views = [next(iter(loader))[1] for loader in loaders]
        described = [model.module(view) for view in views]
        assert model.matcher is not None
        logit = float(model.matcher(*views))
    q, r = (one[0][0].numpy() for one in described)
    tokens = [one[1][0].numpy() for one in described]
    assert model.background is not None
    rows = model.background / np.linalg.norm(model.background, axis=1, keepdims=True)
    bias = float(np.sort(rows @ q)[::-1][1:5].mean())
    sizes = [Image.open(path).size for path in (query, reference)]
    region = copied_region(*tokens, sizes[0], sizes[1])
    squares = []
    for path in (query, reference):
        loader = PictureLoader([path], LoaderOptions(size=SIDE_PX, batch_size=1), on_broken=lambda *_: None)
        rgb = next(iter(loader))[1][0].numpy() * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))
        squares.append(np.round(np.tensordot([0.299, 0.587, 0.114], rgb, 1) * 255).clip(0, 255))
    pixels, _ = agreeing(*squares, region, sizes[0], sizes[1])
    return float(q @ r), float(q @ r) - bias, logit, region.evidence, pixels.coarse, pixels.fine


def test_every_pair_equals_the_plain_way_whatever_the_blocks(
    model: Model, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = np.array([(0, 1), (2, 2), (1, 0), (0, 5), (3, 4)])
    expected = [plainly(model, pictures[q], pictures[r]) for q, r in pairs]
    assert len({round(row[2], 5) for row in expected}) > 2, "a matcher that tells nothing would prove nothing"
    for most in (512, 3):
        monkeypatch.setattr(judging, "_PICTURES", most)
        found = dict(look(model, pictures, pictures, pairs, on_broken=lambda *_: pytest.fail("none is")))
        for row, want in enumerate(expected):
            seen = found[row].signals
            told = seen.cosine, seen.normalised, seen.logit, seen.evidence
            np.testing.assert_allclose(told, want[:4], atol=2e-4)
            np.testing.assert_allclose((seen.coarse, seen.fine), want[4:], atol=1e-3)
            assert found[row].query_size == (60 + pairs[row, 0], 40), "width and height"
    slow = dataclasses.replace(model, one_pass=False)
    other = dict(look(slow, pictures, pictures, pairs, on_broken=lambda *_: pytest.fail("none is")))
    assert other[0].signals.logit == pytest.approx(found[0].signals.logit, abs=1e-5)


def test_a_reference_is_encoded_once_while_there_is_room(
    model: Model, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, asked = judging._encodings, list[int]()

    def counted(model: Model, files: Sequence[Path], wanted: Iterable[tuple[int, int]], *rest: Any) -> Any:
        keys = list(wanted)
        if files is references:
            asked.extend(place for place, _ in keys)
        return encode(model, files, keys, *rest)

    monkeypatch.setattr(judging, "_encodings", counted)
    monkeypatch.setattr(judging, "_PICTURES", 3)
    references = list(pictures)
    pairs = np.array([(query, (query + step) % 6) for query in range(6) for step in (1, 2)])

    def evidence() -> list[float]:
        seen = dict(look(model, pictures, references, pairs, on_broken=lambda *_: pytest.fail("none is")))
        return [seen[row].signals.evidence for row in range(len(pairs))]

    kept = evidence()
    assert sorted(asked) == list(range(6))
    asked.clear()
    monkeypatch.setattr(judging, "_HELD", 0)
    assert evidence() == pytest.approx(kept, abs=1e-3)
    assert len(asked) > 6, "what is asked for together stays, and no more"


def test_broken_pictures_leave_their_pairs_out_and_are_told_once(
    model: Model, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    told: list[tuple[str, str]] = []
    done: list[int] = []
    paths = [*pictures[:2], tmp_path / "broken.jpg"]
    pairs = np.array([(0, 1), (2, 0), (1, 2), (1, 1)])
    found = judge(
        model,
        paths,
        paths,
        pairs,
        on_broken=lambda path, reason: told.append((str(path), reason)),
        progress=done.append,
    )
    assert [pair is None for pair in found] == [False, True, True, False]
    assert [path for path, _ in told] == [str(tmp_path / "broken.jpg")]
    assert done[-1] == 4
    first = found[0]
    assert first is not None
    assert (first.query, first.reference) == (str(pictures[0]), str(pictures[1]))
    assert 0 < first.probability < 1


def test_a_model_compares_two_pictures(model: Model, pictures: list[Path]) -> None:
    # Without a background the whole picture is nearest to itself, not one of its views.
    match = dataclasses.replace(model, background=None).compare(pictures[0], Image.open(pictures[0]))
    assert match.score == pytest.approx(1, abs=1e-5)
    assert match.reference == "picture 1"
    with pytest.raises(DataError, match=r"gone\.jpg"):
        model.compare(pictures[0], "gone.jpg")
    with pytest.raises(DataError, match="has no calibration, so its scores are no probabilities"):
        dataclasses.replace(model, calibration=None).compare(pictures[0], pictures[1])


@pytest.mark.parametrize("view", [1, 3, 8])
def test_a_view_of_the_query_is_that_picture_saved_by_itself(
    model: Model, pictures: list[Path], tmp_path: Path, view: int
) -> None:
    with Image.open(pictures[0]) as picture:
        size = picture.size
        cut = query_views(*size)[view]
        part = picture.rotate(cut.angle, expand=True) if cut.box is None else picture.crop(cut.box)
        part.save(tmp_path / "part.png")
    (_, seen), (_, plain) = (
        next(look(model, [path], pictures, np.array([[0, 1]]), views=np.array([number]), on_broken=lambda *_: None))
        for path, number in ((pictures[0], view), (tmp_path / "part.png", 0))
    )
    np.testing.assert_allclose(seen.signals.row()[:3], plain.signals.row()[:3], atol=1e-4)
    assert seen.signals.cropped == (cut.box is not None)
    assert (seen.query_size, plain.query_size) == (size, part.size)


@pytest.mark.parametrize("view", [1, 2, 3, 8])
def test_a_region_of_a_view_is_told_in_pixels_of_the_picture(view: int) -> None:
    size = 60, 40
    shown, to_picture = query_views(*size)[view].geometry(size[1], size[0])
    square = rectangle(shown[0] / 2, shown[1] / 4, 3, 2)
    geometry = np.array([[2.0, 0.1, 5], [0.2, 1.5, 7], [1e-3, 2e-3, 1]])
    region = CopiedRegion("found", square, mapped(geometry, square), geometry, 1 / 8, 0.3, 100, 0.9, 9, 9)
    found = region.through(to_picture, shown, size)
    assert found.query_share == pytest.approx(area(found.query) / (size[0] * size[1]))
    np.testing.assert_allclose(mapped(found.geometry, found.query), region.reference)
    assert found.query.min() >= -1e-9
    assert (found.query.max(0) <= np.array(size) + 1e-9).all()
    assert found.geometry[2, 2] == 1


def test_the_corner_of_a_turned_view_is_the_pictures_next() -> None:
    size, to_picture = query_views(60, 40)[1].geometry(40, 60)  # by 90 degrees, counter-clockwise
    assert size == (40, 60)
    np.testing.assert_allclose(mapped(to_picture, [[0, 0], [40, 0], [0, 60]]), [[60, 0], [60, 40], [0, 0]], atol=1e-9)
