"""A report as one HTML file: pictures embedded, no other file, nothing fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Protocol

from PIL import Image

from copynce.files import atomic_text

METRIC_TITLES = {
    "uap": "uAP",
    "rp90": "RP90",
    "map": "mAP",
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
}
"""Keys of a metrics.json that `metrics_table` shows, in order, and the names that papers give them."""


@dataclass(frozen=True)
class Table:
    """Rows of cells as text; numbers are right-aligned. `strong`: index of a column to stress, or None."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None


@dataclass(frozen=True)
class Figure:
    """A picture with a caption. `photo`: stored as JPEG instead of PNG. `wide`: never beside another."""

    image: Image.Image
    caption: str = ""
    photo: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Found:
    """One search result: its picture (None: it cannot be shown), its score (None: it was not found), whether it is the
    query's original, and its rank (None: its place among the results that are shown)."""

    image: Image.Image | None
    score: float | None
    is_original: bool
    caption: str = ""
    rank: int | None = None


@dataclass(frozen=True)
class Search:
    """A query and what was found for it, best first; `note` says for example that the original is not among them."""

    query: Image.Image | None
    found: Sequence[Found]
    caption: str = ""
    note: str = ""


class Block(Protocol):
    """A part of a page that makes its own HTML, style and script; it escapes what it shows and fetches nothing."""

    def html(self) -> str: ...


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and blocks under it."""

    title: str
    text: str = ""
    blocks: Sequence[Table | Figure | Search | Block] = field(default_factory=tuple)


@dataclass(frozen=True)
class Report:
    """Title, one line under it, headline figures (name, value, remark), and the sections."""

    title: str
    subtitle: str = ""
    headline: Sequence[tuple[str, str, str]] = field(default_factory=tuple)
    sections: Sequence[Section] = field(default_factory=tuple)


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Metrics as rows, one column per named result; with exactly two columns a third gives the gain.

    columns: title -> the content of a metrics.json; only keys of `METRIC_TITLES` that some column has are shown.
    """
    titles = list(columns)
    rows = []
    for key, name in METRIC_TITLES.items():
        values = [columns[title].get(key) for title in titles]
        if all(value is None for value in values):
            continue
        row = [name, *("-" if value is None else f"{value:.4f}" for value in values)]
        if len(titles) == 2:
            first, second = values
            row.append("-" if first is None or second is None else f"{second - first:+.4f}")
        rows.append(row)
    header = ["", *titles, *(["gain"] if len(titles) == 2 else [])]
    return Table(header, rows, strong=len(titles))


def write_report(path: str | Path, report: Report) -> None:
    """Write the report as one HTML file, which appears whole or not at all. All text is escaped."""
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<header><h1>{escape(report.title)}</h1>",
        f"<p class='subtitle'>{escape(report.subtitle)}</p></header>" if report.subtitle else "</header>",
    ]
    if report.headline:
        parts.append("<div class='headline'>")
        parts += [
            f"<div class='number'><div class='name'>{escape(name)}</div><div class='value'>{escape(value)}</div>"
            f"<div class='remark'>{escape(remark)}</div></div>"
            for name, value, remark in report.headline
        ]
        parts.append("</div>")
    for section in report.sections:
        parts.append(f"<section><h2>{escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{escape(section.text)}</p>")
        parts += [_block(block) for block in section.blocks]
        parts.append("</section>")
    parts.append("</main></body></html>\n")
    with atomic_text(path) as file:
        file.write("\n".join(parts))


def _block(block: Table | Figure | Search | Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        caption = f"<figcaption>{escape(block.caption)}</figcaption>" if block.caption else ""
        narrow = not block.wide and block.image.width < 2.4 * block.image.height
        half = " class='half'" if narrow else ""  # two of them side by side
        return f"<figure{half}>{_img(block.image, block.photo, block.caption or 'figure')}{caption}</figure>"
    return _search(block) if isinstance(block, Search) else block.html()


def _table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        text = []
        for index, cell in enumerate(cells):
            style = " class='strong'" if index == table.strong and tag == "td" else ""
            text.append(f"<{tag}{style}>{escape(cell)}</{tag}>")
        return f"<tr>{''.join(text)}</tr>"

    body = "".join(line(row, "td") for row in table.rows)
    return f"<div class='wide'><table><thead>{line(table.header, 'th')}</thead><tbody>{body}</tbody></table></div>"


def _search(search: Search) -> str:
    query = (
        f"<div class='hit query'><div class='picture'>{_shown(search.query, 'query')}</div>"
        f"<div class='label'>query</div><div class='file'>{escape(search.caption)}</div></div>"
    )
    hits = []
    for place, found in enumerate(search.found, start=1):
        rank = found.rank or place
        kind, mark = ("true", " ✓ original") if found.is_original else ("false", "")
        picture = _shown(found.image, f"result {rank}")
        label = f"{rank}. {found.score:.3f}{mark}" if found.score is not None else f"not found{mark}"
        hits.append(
            f"<div class='hit {kind}'><div class='picture'>{picture}</div>"
            f"<div class='label'>{label}</div>"
            f"<div class='file'>{escape(found.caption)}</div></div>"
        )
    note = f"<div class='note'>{escape(search.note)}</div>" if search.note else ""
    return f"<div class='search'>{query}<div class='arrow'>→</div>{''.join(hits)}{note}</div>"


def _shown(image: Image.Image | None, alt: str) -> str:
    if image is None:
        return "<span class='absent'>cannot be shown</span>"
    return _img(_thumbnail(image), True, alt)


def _thumbnail(image: Image.Image, side: int = 280) -> Image.Image:
    """At most `side` pixels a side, twice what is shown, for sharp screens."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _img(image: Image.Image, photo: bool, alt: str) -> str:
    return f"<img alt='{escape(alt, quote=True)}' src='{data_url(image, photo)}'>"


def data_url(image: Image.Image, photo: bool, quality: int = 85) -> str:
    """The picture as the source of an `img`: JPEG of this quality for a photo, else PNG."""
    buffer = io.BytesIO()
    kind = "jpeg" if photo else "png"
    image.convert("RGB").save(buffer, format=kind, **({"quality": quality} if photo else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:#f3f4f6;color:#20242c;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:32px;line-height:1.2;margin:0;letter-spacing:-.02em}
h2{font-size:20px;margin:0 0 6px}
p{margin:0 0 16px;max-width:75ch;color:#4b5262}
.subtitle{margin:8px 0 0}
.headline{display:flex;flex-wrap:wrap;gap:16px;margin:28px 0}
.number{flex:1 1 180px;background:#fff;border-radius:12px;padding:18px 20px;border:1px solid #e3e5ea}
.name{font-size:13px;color:#6b7280}
.value{font-size:32px;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.remark{font-size:13px;color:#6b7280}
section{background:#fff;border-radius:12px;padding:24px;margin-top:20px;border:1px solid #e3e5ea}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:8px 20px 8px 0;text-align:right;border-bottom:1px solid #eceef2;white-space:nowrap}
th{font-weight:600;font-size:13px;color:#6b7280}
th:first-child,td:first-child{text-align:left}
td.strong{font-weight:650}
figure{margin:18px 0 0}
figure img{max-width:100%;height:auto;display:block}
figure.half{display:inline-block;vertical-align:top;width:calc(50% - 16px);margin-right:12px}
@media(max-width:760px){figure.half{width:100%}}
figcaption{font-size:14px;color:#6b7280;margin-top:6px}
.search{display:flex;flex-wrap:wrap;align-items:flex-start;gap:14px;padding:14px 0;border-bottom:1px solid #eceef2}
.search:last-child{border-bottom:0}
.arrow{font-size:22px;color:#9aa1ad;line-height:150px}
.hit{width:150px}
.picture{width:150px;height:150px;border-radius:8px;border:4px solid #e3e5ea;background:#f8f9fb;
display:flex;align-items:center;justify-content:center;overflow:hidden}
.picture img{max-width:100%;max-height:100%;display:block}
.absent{font-size:12px;color:#9aa1ad}
.query .picture{border-color:#20242c}
.true .picture{border-color:#1a9850}
.true .label{color:#147a3e}
.label{font-size:13px;font-weight:600;margin-top:5px;font-variant-numeric:tabular-nums}
.file{font-size:12px;color:#6b7280;overflow-wrap:anywhere;line-height:1.3}
.note{flex-basis:100%;font-size:13px;color:#b42318}
@media print{body{background:#fff}section,.number{break-inside:avoid}}
"""
