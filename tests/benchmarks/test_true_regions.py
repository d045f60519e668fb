from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.true_regions import true_region
from copynce.copies.polygons import mapped, overlap, rectangle

REFERENCE = (200, 100)
PAD = {"op": "pad", "w": 0.25, "h": 0.5}
CROP = {"op": "crop", "area": 0.25, "x": 0.5, "y": 0.5}
ONTO = {"op": "onto_photo", "size": 0.5, "x": 0.1, "y": 0.2}
#: Edits, the query's size, and the true regions of query and reference: (width, height, left, top).
ROWS: dict[str, tuple[list[dict[str, Any]], tuple[int, int], tuple[float, ...], tuple[float, ...]]] = {
    "no geometry": ([{"op": "blur", "radius": 2}], (400, 200), (400, 200), (200, 100)),
    "mirrored": ([{"op": "hflip"}], (400, 200), (400, 200), (200, 100)),
    "padded": ([PAD], (300, 200), (200, 100, 50, 50), (200, 100)),
    "a band above": ([{"op": "meme", "band": 0.5, "both": False}], (200, 150), (200, 100, 0, 50), (200, 100)),
    "cropped": ([CROP], (100, 50), (100, 50), (100, 50, 100, 50)),
    "on a photo": ([ONTO], (300, 300), (212.1, 106.1, 30, 60), (200, 100)),
    "a quarter turn": ([{"op": "rotate", "degrees": 90}], (100, 200), (100, 200), (200, 100)),
}


@pytest.mark.parametrize("name", ROWS)
def test_regions_of_edits(name: str) -> None:
    edits, size, query, reference = ROWS[name]
    found = true_region(edits, REFERENCE, size)
    assert found is not None
    assert overlap(found.query, rectangle(*query)) > 0.99
    assert overlap(found.reference, rectangle(*reference)) > 0.99
    assert overlap(mapped(found.geometry, found.reference), found.query) > 0.99


def test_the_geometry_is_that_of_the_edits() -> None:
    mirrored = true_region(ROWS["mirrored"][0], REFERENCE, (400, 200))
    turned = true_region(ROWS["a quarter turn"][0], REFERENCE, (100, 200))
    assert mirrored is not None
    assert turned is not None
    np.testing.assert_allclose(mapped(mirrored.geometry, [[0, 0], [50, 25]]), [[400, 0], [300, 50]])
    # Counter-clockwise: the top right corner comes to lie at the top left.
    np.testing.assert_allclose(mapped(turned.geometry, [[200, 0]]), [[0, 0]], atol=1e-9)


@pytest.mark.parametrize(
    ("edits", "size"),
    [
        ([{"op": "perspective", "strength": 0.2}], (200, 100)),
        ([CROP, ONTO], (300, 300)),
        ([{"op": "an edit of another list"}], (200, 100)),
        ([PAD], (300, 300)),  # the file has another shape than these edits make
        ([CROP], (100, 10)),  # no such crop lies within the picture
    ],
)
def test_what_the_edits_do_not_tell(edits: list[dict[str, Any]], size: tuple[int, int]) -> None:
    assert true_region(edits, REFERENCE, size) is None
