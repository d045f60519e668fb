from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from copynce.data.synthetic import make_pictures


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_same_seed_gives_the_same_pictures(tmp_path: Path) -> None:
    few, more = make_pictures(tmp_path / "few", 3, seed=7), make_pictures(tmp_path / "more", 5, seed=7, processes=2)
    assert [path.name for path in few] == ["synthetic_00000.jpg", "synthetic_00001.jpg", "synthetic_00002.jpg"]
    for a, b in zip(few, more, strict=False):
        assert a.read_bytes() == b.read_bytes()
    other = make_pictures(tmp_path / "other", 1, seed=8)
    assert other[0].read_bytes() != few[0].read_bytes()


def test_pictures_are_distinct_and_rich(tmp_path: Path) -> None:
    paths = make_pictures(tmp_path, 40)
    small = []
    shapes = set()
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert image.mode == "RGB"
            assert min(image.size) >= 256
            assert max(image.size) <= 400
            shapes.add(image.size)
            small.append(np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32).ravel())
            assert np.asarray(image).std() > 8
    assert len(shapes) > 30
    features = np.stack(small)
    distance = np.abs(features[:, None] - features[None]).mean(-1) + 255 * np.eye(len(paths))
    assert distance.min() > 5  # mean difference of 16 x 16 thumbnails, grey levels


def test_sides_may_be_chosen(tmp_path: Path) -> None:
    assert pixels(make_pictures(tmp_path, 1, side_px=(64, 64))[0]).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("count", "side_px", "message"),
    [(0, (256, 400), "count must be at least 1, got 0"), (1, (400, 256), "side_px must be"), (1, (8, 9), "side_px")],
)
def test_settings_that_do_not_fit(tmp_path: Path, count: int, side_px: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pictures(tmp_path, count, side_px=side_px)


def test_no_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        make_pictures(tmp_path, 1, processes=0)
