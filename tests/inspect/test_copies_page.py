from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from copynce.copies.pair import CopyPair
from copynce.copies.polygons import rectangle
from copynce.copies.regions import CopiedRegion
from copynce.inspect.copies_page import GroupMember, PictureGroup, groups_by_query, write_copies_report
from copynce.inspect.page_pictures import embedded_side, file_url

NASTY = "<script>alert('x')</script> & \"quotes\" é→"
ODD = os.fsdecode(b"a b\xff?#%'<b>&.jpg")
VOID = {"meta", "img", "input"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Checks that tags close in order; collects text and the attributes of pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")  # strictly
        self.open: list[str] = []
        self.tags: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(self.source)
        assert self.open == []
        self.embedded = [
            Image.open(io.BytesIO(base64.b64decode(found)))
            for found in re.findall(r"src='data:image/jpeg;base64,([^']*)'", self.source)
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def picture(path: str | Path, size: tuple[int, int] = (60, 40), **options: object) -> str:
    rng = np.random.default_rng(size[0])
    small = Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8))
    small.resize(size).save(path, **options)
    return str(path)


def pair(
    query: str, reference: str, probability: float = 0.9, *, found: bool = True, mirrored: bool = False
) -> CopyPair:
    region = CopiedRegion(
        verdict="found" if found else "place unknown",
        query=rectangle(30, 20, 10, 5),
        reference=rectangle(60, 40),
        geometry=np.diag([-2.0 if mirrored else 2.0, 2.0, 1.0]),
        query_share=0.25,
        reference_share=0.004,
        evidence=100.0,
        agreement=0.9,
        matches=9,
        inliers=8,
    )
    return CopyPair(query, reference, probability, 0.5, region, (60, 40), (60, 40))


def test_the_page_is_whole_escaped_and_fetches_nothing(tmp_path: Path) -> None:
    names = [picture(tmp_path / ODD), picture(tmp_path / "b\nc.png")]
    pairs = [pair(*names, 0.99996, mirrored=True), pair(names[0], str(tmp_path / NASTY), 0.3, found=False)]
    report = tmp_path / "report.html"
    broken = write_copies_report(report, [PictureGroup(NASTY, pairs, NASTY)], title=NASTY, subtitle=NASTY)
    assert broken == {str(tmp_path / NASTY): "no such file"}
    page = Page(report)
    assert page.tags.count("script") == 2, "its own"
    assert page.text.count(NASTY.rpartition("/")[2]) >= 5
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert "a b\\xff?#%'<b>&.jpg" in page.text
    assert "b\\nc.png" in page.text
    assert "99.9 % copy · mirrored · cosine 0.500" in page.text
    assert "30.0 % perhaps a copy, place unknown · cosine" in page.text
    assert "cannot be shown: no such file" in page.text
    assert "25 % of it is copied" in page.text
    assert "< 1 % of it is copied" in page.text
    assert page.source.count("class='region' d='M") == 2, "none where the place is unknown"
    assert "class='region' d='M10.0 5.0L40.0 5.0L40.0 25.0L10.0 25.0Z'" in page.source
    assert list(report.parent.glob(".report*")) == []


def test_each_picture_is_embedded_once_and_small(tmp_path: Path) -> None:
    large, small = picture(tmp_path / "large.png", (1300, 900)), picture(tmp_path / "small.png")
    write_copies_report(tmp_path / "page.html", groups_by_query([pair(large, small)] * 5), title="")
    page = Page(tmp_path / "page.html")
    assert [image.size for image in page.embedded] == [(480, 332), (60, 40)]
    assert len(page.pictures) == 10
    assert [one.get("data-same") for one in page.pictures[:4]] == [None, None, "i0", "i1"]
    assert [embedded_side(count) for count in (0, 1000, 2000, 10**6)] == [480, 480, 339, 240]


def test_queries_come_by_their_best_pair() -> None:
    given = [("a", "1", 0.6), ("b", "2", 0.9), ("a", "3", 0.95), ("b", "4", 0.97), ("c", "5", 0.7)]
    groups = groups_by_query([pair(*one) for one in given])
    assert [(group.title, [one.reference for one in group.pairs]) for group in groups] == [
        ("b", ["4", "2"]),
        ("a", ["3", "1"]),
        ("c", ["5"]),
    ]
    assert groups_by_query([]) == []


def test_a_group_shows_its_members_and_the_likely_source(tmp_path: Path) -> None:
    first, second = picture(tmp_path / "first.png"), picture(tmp_path / "second.png")
    members = [GroupMember(first, (60, 40), "2 kB", "it is <larger>"), GroupMember(second, (60, 40))]
    write_copies_report(tmp_path / "page.html", [PictureGroup("two", [pair(first, second)], "", members)], title="")
    page = Page(tmp_path / "page.html")
    assert page.text.count("likely source: it is <larger>") == 1
    assert page.text.count("likely source") == 2, "once more in its pair"
    assert "2 kB" in page.text
    assert "class='role'" not in page.source
    assert (len(page.pictures), len(page.embedded)) == (4, 2)
    write_copies_report(tmp_path / "page.html", [], title="none")
    assert "No copies." in Page(tmp_path / "page.html").text


def linked_pair(tmp_path: Path) -> tuple[Path, list[str]]:
    """A page with links, and pictures of every kind that it may meet."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    names = [
        picture(folder / ODD),
        picture(folder / "turned.jpg", exif=turned),
        picture(folder / "a.tif"),
        picture(folder / "inside.png"),
        str(folder / "broken.png"),
    ]
    Path(names[4]).write_bytes(b"no picture")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        tar.add(names[3], "deep/inside.png")
    names[3] = str(folder / "shard.tar" / "deep" / "inside.png")
    report = tmp_path / "found" / "report.html"
    report.parent.mkdir()
    pairs = [pair(names[0], other, 0.9 - k / 10) for k, other in enumerate(names[1:])]
    broken = write_copies_report(report, groups_by_query(pairs), title="linked", link=True)
    assert list(broken) == [names[4]]
    return report, names


def test_linked_pictures_and_those_that_must_be_embedded(tmp_path: Path) -> None:
    report, _ = linked_pair(tmp_path)
    page = Page(report)
    linked = "../pictures/a%20b%FF%3F%23%25%27%3Cb%3E%26.jpg"
    assert [one.get("src", "")[:50] for one in page.pictures[::2]] == [linked] * 4
    assert [image.size for image in page.embedded] == [(60, 40)] * 3, (
        "as stored; of the shard, the turned one, the TIFF"
    )
    assert file_url("/data/a.jpg", Path("/other")) == "file:///data/a.jpg"
    assert file_url("/data/http:/x", Path("/data")) == "http%3A/x"


ACTIONS = """
const facts=[],press=(key)=>document.activeElement.dispatchEvent(new KeyboardEvent('keydown',{key,bubbles:true}));
const tell=what=>facts.push([what,document.activeElement.id||[...document.querySelectorAll('.pair')]
  .indexOf(document.activeElement),document.getElementById('count').textContent]);
const type=(id,value)=>{const e=document.getElementById(id);e.value=value;e.dispatchEvent(new Event('input'));};
const later=ms=>new Promise(done=>setTimeout(done,ms));
addEventListener('load',async()=>{
  tell('hash');
  press('k');tell('k');press('ArrowDown');tell('down');press('J');tell('J');
  press('o');tell(getComputedStyle(document.querySelector('.pair svg')).display);
  press('/');type('text','SECOND');press('j');tell('slash');press('Enter');tell('enter');
  type('text','');type('least','65');tell('least');
  await later(400);tell(location.hash);
  press('?');tell(String(document.getElementById('keys').open));
  document.documentElement.setAttribute('data-facts',JSON.stringify({facts,pictures:
    await Promise.all([...document.querySelectorAll('img')].map(async i=>{
      i.loading='eager';await i.decode().catch(()=>0);return [i.naturalWidth,i.naturalHeight];}))}));
});
"""


def browse(report: Path, script: str, fragment: str) -> dict[str, object]:
    """What the script leaves in the page's `data-facts`, run in a browser."""
    acted = report.with_name("acted.html")
    acted.write_text(report.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={report.parent}/profile"),
        *("--virtual-time-budget=5000", "--dump-dom", f"{acted.as_uri()}#{fragment}"),
    ]
    for _ in range(3):  # on a busy machine the page's time may be over before its pictures are decoded
        dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
        found = re.search(r'data-facts="([^"]*)"', dom)
        if found:
            break
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here")
def test_keys_filters_and_links_in_a_browser(tmp_path: Path) -> None:
    report, names = linked_pair(tmp_path)
    second = picture(tmp_path / "second.png")
    pairs = [pair(names[0], other, 0.9 - k / 10) for k, other in enumerate(names[1:4])]
    write_copies_report(report, groups_by_query([*pairs, pair(second, names[2], 0.62)]), title="", link=True)
    told = browse(report, ACTIONS, "pair=2&least=1")
    everything = "4 of 4 pairs in 2 of 2 queries"
    assert told["facts"] == [
        ["hash", 1, everything],
        ["k", 0, everything],
        ["down", 1, everything],
        ["J", 3, everything],
        ["none", 3, everything],
        ["slash", "text", "1 of 4 pairs in 1 of 2 queries"],
        ["enter", 3, "1 of 4 pairs in 1 of 2 queries"],
        ["least", -1, "3 of 4 pairs in 1 of 2 queries"],
        ["#least=65&outlines=off&pair=4", -1, "3 of 4 pairs in 1 of 2 queries"],
        ["true", -1, "3 of 4 pairs in 1 of 2 queries"],
    ]
    assert told["pictures"] == [[60, 40]] * 8, "all are there, none is turned"
