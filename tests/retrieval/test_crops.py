"""Local crops: their numbers, and the loader's pixels against Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from copynce.retrieval.crops import (
    CANDIDATE_QUERY,
    candidate_query,
    candidate_reference,
    lce_forwards,
    lce_query,
    lce_reference,
    one_of_four,
    one_of_nine,
    one_of_one,
    one_of_two,
)
from dali_pipelines import CropLoader, Cut, LoaderOptions
from dali_pipelines.options import MEAN, STD

SIZE = 40


def test_counts_are_those_of_the_protocol() -> None:
    assert [len(cuts(640, 480)) for cuts, _ in CANDIDATE_QUERY.values()] == [1, 10, 9, 25]
    assert [rank for _, rank in CANDIDATE_QUERY.values()] == [100, 10, 10, 4]
    assert sum(rank for _, rank in CANDIDATE_QUERY.values()) == 124
    per_view = sum(rank * (len(cuts(9, 9)) if cuts is not one_of_one else 1) for cuts, rank in CANDIDATE_QUERY.values())
    assert per_view == 390
    assert len(candidate_query(640, 480)) == 45
    assert len(candidate_reference(640, 480)) == 9
    query, reference = lce_query(640, 480), lce_reference(640, 480)
    assert (len(query), len(reference)) == (26, 10)
    assert query[:10] == reference
    assert len(lce_forwards()) == 35
    assert len({(query[q], reference[r]) for q, r in lce_forwards()}) == 34


@pytest.mark.parametrize(("width", "height"), [(640, 480), (101, 67), (1, 1)])
def test_boxes_are_those_of_the_protocol(width: int, height: int) -> None:
    w, h = width, height
    two = [cut.box for cut in one_of_two(w, h)]
    if w > 1:
        assert two[1] == (w // 4, 0, 3 * w // 2, h)
        assert one_of_two(w, h, released=False)[1].box == (w // 4, 0, 3 * w // 4, h)
        assert two[6:] == [
            (0, 0, int(0.707 * w), int(0.707 * h)),
            (int(0.293 * w), 0, w, int(0.707 * h)),
            (0, int(0.293 * h), int(0.707 * w), h),
            (int(0.293 * w), int(0.293 * h), w, h),
        ]
        assert lce_query(w, h)[1].box == lce_query(w, h)[10 + 4].box == (w // 3, h // 3, 2 * w // 3, 2 * h // 3)
        assert lce_query(w, h)[9].box == (w // 2, h // 2, w, h)
        assert [cut.box for cut in one_of_four(w, h)][1][:2] == (w // 4, 0)  # type: ignore[index]
        assert one_of_nine(w, h)[24].box == (4 * w // 6, 4 * h // 6, w, h)
        assert candidate_reference(w, h)[1].box == (w // 6, h // 6, 5 * w // 6, 5 * h // 6)
    for cuts in (candidate_query, candidate_reference, lce_query, lce_reference):
        for cut in cuts(w, h):
            assert cut.box is None or (cut.box[0] < cut.box[2] and cut.box[1] < cut.box[3])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    dots = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(dots).resize((151, 98), Image.Resampling.BICUBIC).save(path)
    return path


def resized(image: Image.Image) -> np.ndarray:
    """Columns first, as Pillow did when the published numbers were made."""
    narrow = image.resize((SIZE, image.height), Image.Resampling.BICUBIC)
    return np.asarray(narrow.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("cuts", [candidate_query, candidate_reference, lce_query, lce_reference])
def test_views_equal_pillows(picture: Path, tmp_path: Path, cuts: object) -> None:
    (tmp_path / "broken.jpg").write_text("nothing")
    told: list[str] = []
    loader = CropLoader(
        [picture, tmp_path / "broken.jpg", picture],
        cuts,  # type: ignore[arg-type]
        LoaderOptions(size=SIZE, batch_size=2),
        on_broken=lambda path, reason: told.append(Path(path).name),
    )
    assert len(loader) == 2
    (first, views), (second, again) = loader
    assert (first.tolist(), second.tolist(), told) == ([0], [2], ["broken.jpg"])
    image = Image.open(picture)
    wanted = cuts(*image.size)  # type: ignore[operator]
    assert views.shape == (1, len(wanted), 3, SIZE, SIZE)
    assert (views == again).all()
    for cut, view in zip(wanted, views[0], strict=True):
        colours = view.permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
        found = (255 * colours).round().astype(int)
        if cut.angle % 90 == 0:
            turned = image.rotate(cut.angle, expand=True) if cut.box is None else image.crop(cut.box)
            np.testing.assert_array_equal(found, resized(turned), err_msg=str(cut))
        else:
            expected = resized(image.rotate(cut.angle, resample=Image.Resampling.BICUBIC, expand=True))
            assert np.abs(found - expected).max() <= 1, cut


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cut((5, 0, 5, 9)), r"Cut\.box must be"),
        (lambda: Cut((0, 0, 5, 9), 90), r"Cut\.angle must be 0 where a box is given"),
    ],
)
def test_wrong_cuts_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_each_path_may_have_cuts_of_its_own(picture: Path, tmp_path: Path) -> None:
    """Also one picture twice in a batch; those after a broken one keep theirs."""
    (tmp_path / "broken.jpg").write_text("nothing")
    paths = [picture, tmp_path / "broken.jpg", picture, picture]
    boxes = [Cut((0, 0, 20, 20)), Cut((1, 1, 9, 9)), Cut((5, 7, 30, 31)), Cut(angle=90.0)]
    options = LoaderOptions(size=SIZE, batch_size=3)

    def views(paths: list[Path], cuts: object) -> dict[int, np.ndarray]:
        loader = CropLoader(paths, cuts, options, on_broken=lambda path, why: None)  # type: ignore[arg-type]
        return {i: view.numpy() for at, found in loader for i, view in zip(at.tolist(), found, strict=True)}

    found = views(paths, [lambda w, h, box=box: [box] for box in boxes])
    assert sorted(found) == [0, 2, 3]
    for i, view in found.items():
        np.testing.assert_array_equal(view, views([picture], lambda w, h, i=i: [boxes[i]])[0])
    with pytest.raises(ValueError, match="cuts must be one function, or one for each of 4 paths, got 1"):
        views(paths, [one_of_one])


def test_every_picture_needs_as_many_views(picture: Path, tmp_path: Path) -> None:
    Image.open(picture).resize((50, 50)).save(tmp_path / "square.png")
    paths = [picture, tmp_path / "square.png"]
    with pytest.raises(ValueError, match="cuts must give as many views for every picture, got 2, 1"):
        list(
            CropLoader(
                paths,
                lambda w, h: [Cut()] * (1 + (w == h)),
                LoaderOptions(size=SIZE, batch_size=2),
                on_broken=lambda path, why: None,
            )
        )


def test_crops_are_cut_on_the_cpu() -> None:
    options = LoaderOptions(size=SIZE, batch_size=2, device="gpu")
    with pytest.raises(ValueError, match="device must be 'cpu', got 'gpu'"):
        CropLoader([], one_of_one, options, on_broken=lambda path, why: None)
