from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from copynce.inspect import Figure, Found, Report, Search, Section, Table, metrics_table, write_report

NASTY = "<script>alert('x')</script> & \"quotes\" é→"


class Balanced(HTMLParser):
    """Checks that tags close in order, and collects pictures and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.text = ""
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(str(dict(attrs)["src"]))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report() -> Report:
    image = Image.new("RGB", (600, 300), (10, 200, 30))
    return Report(
        title=f"demo {NASTY}",
        subtitle=NASTY,
        headline=[("uAP", "0.612", NASTY)],
        sections=[
            Section("scores", NASTY, [metrics_table({"before": {"uap": 0.1, "map": 0.25}, "after": {"uap": 0.5}})]),
            Section("pictures", blocks=[Figure(image, NASTY), Figure(image.convert("RGBA"), photo=True)]),
            Section(
                "search",
                blocks=[Search(image, [Found(image, 0.9, True, NASTY), Found(image, 0.2, False)], NASTY, note=NASTY)],
            ),
        ],
    )


def test_report_is_one_whole_escaped_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, report())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    page = path.read_text(encoding="utf-8")
    parsed = Balanced()
    parsed.feed(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert parsed.text.count(NASTY) == 9  # title twice, subtitle, remark, text, four captions and notes
    assert not re.search(r"(src|href)=['\"](?!data:)|url\(|@import", page)


def test_pictures_are_embedded_and_search_pictures_small(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report())
    parsed = Balanced()
    parsed.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    decoded = []
    for source in parsed.pictures:
        kind, data = source.split(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            decoded.append((kind, image.format, image.size))
    png, jpeg = "data:image/png", "data:image/jpeg"
    assert decoded[:2] == [(png, "PNG", (600, 300)), (jpeg, "JPEG", (600, 300))]
    assert decoded[2:] == [(jpeg, "JPEG", (280, 140))] * 3


def test_an_original_is_marked(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("✓ original") == page.count("class='hit true'") == 1
    assert page.count("class='hit false'") == 1


def test_metrics_table() -> None:
    table = metrics_table(
        {"before": {"uap": 0.1, "map": 0.25, "other": 3.0}, "after": {"uap": 0.5, "recall_at_1": 1.0}}
    )
    assert table.header == ["", "before", "after", "gain"]
    assert table.rows == [
        ["uAP", "0.1000", "0.5000", "+0.4000"],
        ["mAP", "0.2500", "-", "-"],
        ["recall@1", "-", "1.0000", "-"],
    ]
    assert metrics_table({"now": {"rp90": 0.0}}) == Table(["", "now"], [["RP90", "0.0000"]], strong=1)


def test_a_failed_write_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, report())
    before = path.read_bytes()
    broken = Report("x", sections=[Section("y", blocks=[Figure(Image.new("RGB", (0, 0)))])])
    with pytest.raises((ValueError, SystemError)):
        write_report(path, broken)
    assert path.read_bytes() == before
