"""The model in the package: it is whole, small, and tells a copy from another picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ImageEnhance

import copynce
from copynce.copies.polygons import overlap, rectangle
from copynce.data.synthetic import make_picture
from copynce.models.box import DESCRIPTOR, MATCHER, box_of
from copynce.models.checkpoints import read_checkpoint_metadata


@pytest.fixture(scope="module")
def model() -> copynce.Model:
    return copynce.load_model("default", device="cpu")


def test_its_files_are_small_and_name_no_folder() -> None:
    box = box_of("default")
    assert box is not None
    assert (box / DESCRIPTOR).stat().st_size < 25e6
    assert (box / MATCHER).stat().st_size < 12e6
    for name in (DESCRIPTOR, MATCHER):
        card = read_checkpoint_metadata(box / name)
        assert card["license"] == "apache-2.0"
        assert "/" not in str(card).replace("apache-2.0", "")
    assert (box / "README.md").is_file()


def test_it_tells_a_copy_and_where_from_another_picture(model: copynce.Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    original, other = (make_picture(rng, (300, 320)) for _ in range(2))
    width, height = original.size
    box = (width // 5, height // 6, width, height - height // 8)
    copy = ImageEnhance.Brightness(original.crop(box)).enhance(1.2)
    copy.save(tmp_path / "copy.jpg", quality=60)
    assert model.one_pass
    match = model.compare(tmp_path / "copy.jpg", original)
    assert match.probability > 0.9
    assert match.region.found
    shown = rectangle(box[2] - box[0], box[3] - box[1], box[0], box[1])
    assert overlap(match.region.reference, shown) > 0.4, "patches of smooth ground tell little"
    turned = model.compare(original.rotate(90, expand=True), original)
    assert turned.probability > 0.9, "as a file with an EXIF orientation"
    assert model.compare(tmp_path / "copy.jpg", other).probability < 0.5


def test_its_descriptors_are_centred(model: copynce.Model) -> None:
    """Rounding to 8 bits once moved all of them by .4 of their length, which cost two points of uAP."""
    assert model.background is not None
    assert np.linalg.norm(model.background.mean(0)) < 0.1
