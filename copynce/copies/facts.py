"""Which picture of a group of copies is likely their source, by facts of the files and of where the copies lie.

A score says that two pictures are copies and is the same both ways, so it cannot say which was first. Facts can, in
this order; those of one line together, and where they contradict each other nothing is said:

    1. when it was taken, by EXIF, or which camera; more detail of what both show; shows more than the other
    2. a finer JPEG quantisation, a larger file of the same format
    3. an older file, weak, for copying sets that date anew
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy as np
from PIL import Image

from copynce.copies.regions import CopiedRegion
from copynce.index.reading import read_exif
from dali_pipelines.sources import AnyPath, read_bytes

_CLEARLY = 1.1  # times as fine a quantisation, as large a file
_LARGER, _DETAIL = 1.05, 1.15  # times as many pixels a side, of the whole and of a part, whose geometry is less exact
_SAME_SHAPE = 0.02  # of the ratio of width and height
_ALL, _PART = 0.9, 0.8  # of a picture is copied: all of it, for regions end at a 16th of a side; a part of it
_SECONDS = 2.0  # that file systems round times of change to


@dataclass(frozen=True)
class PictureFacts:
    """What a picture and its file tell.

    width, height: in pixels. size: of the file in bytes. changed: its time of change, seconds since 1970. format: as
    Pillow calls it. taken, camera: by EXIF. quantisation: mean of a JPEG's luminance table, the higher the coarser.
    """

    width: int
    height: int
    size: int
    changed: float
    format: str | None = None
    taken: datetime | None = None
    camera: str | None = None
    quantisation: float | None = None


class Source(NamedTuple):
    """place: of the likely source among the pictures; None: no fact tells. why: in words."""

    place: int | None
    why: str


def read_facts(file: AnyPath, size: int, changed: float) -> PictureFacts:
    """The facts of a picture whose file has `size` bytes and was `changed` then, from the head of the file; without
    what cannot be read, and 0 x 0 if nothing can."""
    try:
        with Image.open(file if isinstance(file, str) else io.BytesIO(read_bytes(file))) as image:
            exif, table = read_exif(image), getattr(image, "quantization", None)
            quantisation = float(np.mean(table[0])) if table else None
            return PictureFacts(*image.size, size, changed, image.format, exif.taken, exif.camera, quantisation)
    except Exception:  # gone since, or damaged in its head; Pillow raises whatever its parsers do
        return PictureFacts(0, 0, size, changed)


def likely_source(
    facts: Sequence[PictureFacts], names: Sequence[str], region: Callable[[int, int], CopiedRegion]
) -> Source:
    """The one picture of a group that facts prefer to each of the others.

    names: of the pictures, for the reasons. region: where a pair (i, j), i < j, is copied, i as the query.
    """
    others, short = range(len(facts)), [os.path.basename(name) for name in names]
    if len(set(short)) == len(short):
        names = short
    said = {(i, j): decide(list(compare(facts[i], facts[j], region(i, j)))) for i in others for j in others if i < j}
    won = [[j for j in others if i != j and said[min(i, j), max(i, j)].winner == int(i > j)] for i in others]
    best = max(others, key=lambda i: (len(won[i]), -i))
    open_pairs = [(min(best, j), max(best, j)) for j in others if j != best and j not in won[best]]
    if open_pairs:
        i, j = open_pairs[0]
        return Source(None, _why_not(said[i, j], names[i], names[j]))
    return Source(best, _why(best, {j: said[min(best, j), max(best, j)].facts for j in won[best]}, names))


class Fact(NamedTuple):
    """One fact that prefers a picture of two. rank: 1 to 3. kind: larger, ... winner: 0 or 1. margin: the higher the
    clearer, among facts of a kind. text: of the winner, to be read behind its name."""

    rank: int
    kind: str
    winner: int
    margin: float
    text: str


class Decision(NamedTuple):
    """winner: 0, 1 or None. facts: what decided it, or what contradicts each other."""

    winner: int | None
    facts: list[Fact]


def decide(facts: list[Fact]) -> Decision:
    """What the facts of a pair say: those of the first rank where there are any, if they agree."""
    if not facts:
        return Decision(None, [])
    first = min(fact.rank for fact in facts)
    heard = [fact for fact in facts if fact.rank == first]
    if len({fact.winner for fact in heard}) > 1:
        return Decision(None, heard)
    return Decision(heard[0].winner, heard)


def compare(a: PictureFacts, b: PictureFacts, region: CopiedRegion) -> Iterator[Fact]:
    """The facts that tell two pictures apart, `region` of the pair with `a` as the query, by rank."""
    pair = (a, b)
    yield from _by_camera(pair)
    yield from _by_detail(pair, region)
    shares = region.query_share, region.reference_share
    for more, less in ((0, 1), (1, 0)):
        if region.found and shares[more] <= _PART and shares[less] >= _ALL:
            text = f"shows more: the other is {shares[more]:.0%} of it"
            yield Fact(1, "more", more, 1 - shares[more], text)
    if a.format == b.format:
        if a.quantisation and b.quantisation:
            yield from _ratio(2, "quantisation", (1 / a.quantisation, 1 / b.quantisation), _CLEARLY, [
                f"less compressed: mean JPEG quantisation {one.quantisation:.1f} against {other.quantisation:.1f}"
                for one, other in ((a, b), (b, a))
            ])  # fmt: skip
        yield from _ratio(2, "file", (a.size, b.size), _CLEARLY, [
            f"larger file: {one.size:,} bytes against {other.size:,}" for one, other in ((a, b), (b, a))
        ])  # fmt: skip
    if abs(a.changed - b.changed) > _SECONDS:
        old = int(a.changed > b.changed)
        days = [datetime.fromtimestamp(one.changed).strftime("%Y-%m-%d %H:%M:%S") for one in pair]
        text = f"older file: {days[old]} against {days[1 - old]}"
        yield Fact(3, "older", old, abs(a.changed - b.changed), text)


def _by_camera(pair: tuple[PictureFacts, PictureFacts]) -> Iterator[Fact]:
    a, b = pair
    if a.taken is not None and b.taken is not None:
        if a.taken != b.taken:
            first = int(b.taken < a.taken)
            margin = abs((a.taken - b.taken).total_seconds())
            yield Fact(1, "taken", first, margin, f"taken {pair[first].taken}, before {pair[1 - first].taken}")
            return
    elif a.taken is not None or b.taken is not None:
        known = int(a.taken is None)
        yield Fact(1, "taken", known, np.inf, f"taken {pair[known].taken} by EXIF, the other does not say")
        return
    if (a.camera is None) != (b.camera is None):
        known = int(a.camera is None)
        yield Fact(1, "camera", known, np.inf, f"by EXIF from a {pair[known].camera}, the other does not say")


def _by_detail(pair: tuple[PictureFacts, PictureFacts], region: CopiedRegion) -> Iterator[Fact]:
    """Pixels of what both show, which are not those of the files where one shows it on a larger canvas. In both
    directions there must be more: a picture that was drawn wider has no more to show."""
    sizes = [(one.width, one.height) for one in pair]
    if min(map(min, sizes)) < 1:
        return
    larger = ["larger: {} x {} against {} x {}".format(*sizes[i], *sizes[1 - i]) for i in (0, 1)]
    if region.found:
        least, most = _scales(region)
        whole = min(region.query_share, region.reference_share) >= _ALL
        times = max((least * most) ** 0.5, (least * most) ** -0.5)
        texts = larger if whole else [f"more detail: the shared part is {times:.1f} times as large"] * 2
        for winner, scale in ((0, 1 / most), (1, least)):
            if scale >= (_LARGER if whole else _DETAIL):
                yield Fact(1, "larger" if whole else "detail", winner, scale, texts[winner])
    elif abs(sizes[0][0] * sizes[1][1] / (sizes[0][1] * sizes[1][0]) - 1) <= _SAME_SHAPE:
        yield from _ratio(1, "larger", [width for width, _ in sizes], _LARGER, larger)


def _scales(region: CopiedRegion) -> tuple[float, float]:
    """By how much what is copied is longer in the reference than in the query, in pixels of both: in the direction in
    which it is least and in which it is most."""
    geometry = region.geometry
    x, y, w = geometry @ [*region.query.mean(axis=0), 1.0]
    jacobian = (geometry[:2, :2] - np.outer([x / w, y / w], geometry[2, :2])) / w
    most, least = np.linalg.svd(jacobian, compute_uv=False)
    return max(float(least), 1e-9), max(float(most), 1e-9)


def _ratio(rank: int, kind: str, values: Sequence[float], enough: float, texts: Sequence[str]) -> Iterator[Fact]:
    best = int(values[1] > values[0])
    margin = values[best] / max(values[1 - best], 1e-12)
    if margin >= enough:
        yield Fact(rank, kind, best, margin, texts[best])


def _why(best: int, reasons: dict[int, list[Fact]], names: Sequence[str]) -> str:
    """Each kind of fact that holds against all others, told against the nearest of them; else what holds against
    each."""
    by_kind: dict[str, list[Fact]] = {}
    for facts in reasons.values():
        for fact in facts:
            by_kind.setdefault(fact.kind, []).append(fact)
    common = [min(facts, key=lambda fact: fact.margin) for facts in by_kind.values() if len(facts) == len(reasons)]
    if common:
        return "; ".join(fact.text for fact in sorted(common))
    return "; ".join(f"against {names[j]}: {facts[0].text}" for j, facts in reasons.items())


def _why_not(decision: Decision, *names: str) -> str:
    if decision.winner is not None:  # it lost this one, and no other has won all of its own
        return "no fact tells: each is surpassed by another"
    if not decision.facts:
        return "no fact tells them apart"
    told = [f"{names[fact.winner]} {fact.text}" for fact in decision.facts]
    return f"facts contradict each other: {'; '.join(told)}"
