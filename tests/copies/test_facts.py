"""Facts of pairs and groups: who is called the source, why, and when nobody is."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from copynce.copies.facts import PictureFacts, compare, decide, likely_source, read_facts
from copynce.copies.polygons import rectangle
from copynce.copies.regions import CopiedRegion


def facts(width: int = 800, height: int = 600, **more: object) -> PictureFacts:
    return PictureFacts(width, height, **{"size": 100_000, "changed": 1e9, "format": "JPEG", **more})  # type: ignore[arg-type]


def region(query: np.ndarray, reference: np.ndarray, shares: tuple[float, float], found: bool = True) -> CopiedRegion:
    verdict = "found" if found else "place unknown"
    geometry = np.diag([*np.ptp(reference, axis=0) / np.ptp(query, axis=0), 1.0])
    geometry[:2, 2] = reference[0] - geometry[:2, :2] @ query[0]
    return CopiedRegion(verdict, query, reference, geometry, *shares, 100.0, 0.9, 40, 30)  # type: ignore[arg-type]


def same_place(a: PictureFacts, b: PictureFacts, found: bool = True) -> CopiedRegion:
    return region(rectangle(a.width, a.height), rectangle(b.width, b.height), (1.0, 1.0), found)


TAKEN = datetime(2019, 5, 2, 14, 3)


@pytest.mark.parametrize(
    ("a", "b", "winner", "why"),
    [
        (facts(4000, 3000), facts(), 0, "larger: 4000 x 3000 against 800 x 600"),
        (facts(1600, 610), facts(), None, ""),  # drawn wider, not larger
        (facts(), facts(taken=TAKEN), 1, "taken 2019-05-02 14:03:00 by EXIF, the other does not say"),
        (facts(taken=datetime(2021, 1, 1)), facts(taken=TAKEN), 1, "before 2021-01-01"),
        (facts(camera="Canon EOS 5D"), facts(), 0, "from a Canon EOS 5D"),
        (facts(4000, 3000), facts(taken=TAKEN), None, ""),  # enlarged, or its EXIF removed
        (facts(quantisation=12.0), facts(quantisation=3.0), 1, "quantisation 3.0 against 12.0"),
        (facts(size=200_000), facts(), 0, "larger file: 200,000 bytes against 100,000"),
        (facts(size=200_000), facts(format="PNG"), None, ""),  # sizes of two formats say nothing
        (facts(changed=1e9 + 60), facts(), 1, "older file"),
        (facts(changed=1e9), facts(4000, 3000, changed=1e9 + 60), 1, "larger"),  # dates are the last to be asked
        (facts(changed=1e9 + 1), facts(), None, ""),
    ],
)
def test_two_that_show_the_same(a: PictureFacts, b: PictureFacts, winner: int | None, why: str) -> None:
    for found in (True, False):
        decision = decide(list(compare(a, b, same_place(a, b, found))))
        assert decision.winner == winner
        assert why in "; ".join(fact.text for fact in decision.facts)
        turned = decide(list(compare(b, a, same_place(b, a, found))))
        assert turned.winner == (None if winner is None else 1 - winner)


def test_where_one_shows_more() -> None:
    whole, crop = facts(1000, 800), facts(500, 400)
    there = region(rectangle(500, 400, 100, 100), rectangle(500, 400), (0.25, 1.0))
    decision = decide(list(compare(whole, crop, there)))
    assert decision.winner == 0
    assert [fact.text for fact in decision.facts] == ["shows more: the other is 25% of it"]
    # Laid small on a larger canvas: the canvas shows more, the original has more detail, and neither is said.
    canvas, original = facts(2000, 1600), facts(1000, 800)
    pasted = region(rectangle(500, 400, 100, 100), rectangle(1000, 800), (0.06, 1.0))
    decision = decide(list(compare(canvas, original, pasted)))
    assert decision.winner is None
    assert {fact.text for fact in decision.facts} == {
        "more detail: the shared part is 2.0 times as large",
        "shows more: the other is 6% of it",
    }
    # Where the place is unknown, so is what a larger canvas says.
    unknown = region(rectangle(1, 1), rectangle(1, 1), (0.0, 0.0), found=False)
    assert list(compare(facts(2000, 1000), original, unknown)) == []


def test_the_source_of_a_group_surpasses_each_of_the_others() -> None:
    group = [facts(), facts(4000, 3000, taken=TAKEN), facts(1600, 1200)]
    names = ["in/a.jpg", "in/b.jpg", "in/c.jpg"]

    def place(i: int, j: int) -> CopiedRegion:
        return same_place(group[i], group[j])

    found = likely_source(group, names, place)
    assert found.place == 1
    assert "larger: 4000 x 3000 against 1600 x 1200; taken 2019-05-02 14:03:00 by EXIF" in found.why
    group[1] = facts(4000, 3000)
    group[0] = facts(4000, 3000, changed=1e9 + 60)
    found = likely_source(group, names, place)
    assert found == (1, "against a.jpg: older file: " + found.why.split("file: ")[1])
    assert "against c.jpg: larger: 4000 x 3000 against 1600 x 1200" in found.why
    group[0] = facts(4000, 3000)
    assert likely_source(group, names, place) == (None, "no fact tells them apart")
    group[0] = facts(taken=TAKEN)
    found = likely_source(group, names, place)
    assert found.place is None
    assert found.why.startswith("facts contradict each other: a.jpg taken 2019-05-02 14:03:00")
    assert "b.jpg larger: 4000 x 3000 against 800 x 600" in found.why


def test_facts_of_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[271], exif[272], exif[306] = "Canon", "EOS 5D", "2020:01:01 00:00:00"
    exif.get_ifd(0x8769)[36867] = "2019:05:02 14:03:00"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg", exif=exif, quality=90)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "b.jpg", quality=30)
    found = read_facts(str(tmp_path / "a.jpg"), 5, 6.0)
    coarse = read_facts(tmp_path / "b.jpg", 5, 6.0)
    assert (found.taken, found.camera, found.format) == (TAKEN, "Canon EOS 5D", "JPEG")
    assert found.quantisation is not None
    assert coarse.quantisation is not None
    assert found.quantisation < coarse.quantisation / 3
    (tmp_path / "b.jpg").write_text("nothing")
    assert read_facts(str(tmp_path / "b.jpg"), 5, 6.0) == PictureFacts(0, 0, 5, 6.0)
