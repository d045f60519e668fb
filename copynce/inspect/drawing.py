"""Pictures of what the method does: traced pixels, patch affinities. All return RGB pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from matplotlib import colormaps
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

PANEL_PX = 320
"""Height of one drawn picture."""
_GAP = 28
_TITLE = 30
_SMOOTH = 2  # everything is drawn at twice the size and reduced, so that lines and dots have smooth edges
_INK = (32, 36, 44)
_PAPER = (255, 255, 255)
_TARGET = (64, 220, 255)


def draw_traced_pixels(
    query: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    query_to_reference: NDArray[np.int32],
    reference_to_query: NDArray[np.int32],
    *,
    dots: int = 9,
    lines: int = 14,
) -> Image.Image:
    """A query beside its reference, with the copied pixels bright and corresponding points joined.

    query uint8 [Hq, Wq, 3], reference uint8 [Hr, Wr, 3]. query_to_reference int32 [Hq, Wq]: row-major index into the
    reference picture's pixels or -1 (`CoordinateTable.index`); reference_to_query int32 [Hr, Wr] likewise. What shows
    nothing of the other picture is greyed. A grid of `dots` x `dots` query points is marked in both pictures in the
    same colours, and up to `lines` of them are joined. Raises ValueError if a table does not fit its pictures.
    """
    _check_table("query_to_reference", query_to_reference, query, reference)
    _check_table("reference_to_query", reference_to_query, reference, query)
    left = _panel(_dimmed(query, query_to_reference >= 0))
    right = _panel(_dimmed(reference, reference_to_query >= 0))
    share = float((query_to_reference >= 0).mean())
    titles = (f"query: {share:.0%} of it is copied", "reference: the copied pixels")
    board, corners = _board([left, right], titles)
    draw = ImageDraw.Draw(board, "RGBA")

    height, width = query.shape[:2]
    scale_q = left.width / width, left.height / height
    scale_r = right.width / reference.shape[1], right.height / reference.shape[0]
    found = []
    for y in _spread(height, dots):
        for x in _spread(width, dots):
            index = int(query_to_reference[y, x])
            if index >= 0:
                ry, rx = divmod(index, reference.shape[1])
                start = corners[0][0] + (x + 0.5) * scale_q[0], corners[0][1] + (y + 0.5) * scale_q[1]
                end = corners[1][0] + (rx + 0.5) * scale_r[0], corners[1][1] + (ry + 0.5) * scale_r[1]
                hue = colorsys.hsv_to_rgb(x / width * 0.83, 0.85 - 0.45 * y / height, 1.0)
                found.append((start, end, tuple(int(255 * c) for c in hue)))
    for i in _spread(len(found), min(lines, len(found))):
        start, end, colour = found[i]
        draw.line([start, end], fill=(0, 0, 0, 110), width=3 * _SMOOTH)
        draw.line([start, end], fill=(*colour, 230), width=3 * _SMOOTH // 2)
    radius = 3.5 * _SMOOTH
    for start, end, colour in found:
        for x, y in (start, end):
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=(*colour, 255), outline=(20, 20, 20, 255), width=_SMOOTH)
    return board.reduce(_SMOOTH)


def draw_copied_region(picture: NDArray[np.uint8], region: ArrayLike | None, *, side: int = 640) -> Image.Image:
    """A picture at most `side` pixels high and wide, its copied region tinted and outlined, the rest dimmed.

    picture uint8 [H, W, 3]; region: polygon [n, 2] of (x, y) in its pixels; None: unknown, the picture stays as it is.
    """
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    large = Image.fromarray(np.ascontiguousarray(picture)).resize(
        (size[0] * _SMOOTH, size[1] * _SMOOTH), Image.Resampling.BICUBIC
    )
    if region is not None:
        points = np.asarray(region, np.float64) * [large.width / width, large.height / height]
        corners = [(float(x), float(y)) for x, y in points]
        inside = Image.new("L", large.size, 0)
        ImageDraw.Draw(inside).polygon(corners, fill=255)
        dimmed = Image.fromarray(_dimmed(np.asarray(large), np.zeros((large.height, large.width), np.bool_)))
        large = Image.composite(Image.blend(large, Image.new("RGB", large.size, _TARGET), 0.12), dimmed, inside)
        pen = ImageDraw.Draw(large)
        for thick, ink in ((4, (0, 0, 0)), (2, _TARGET)):
            pen.line([*corners, *corners[:2]], fill=ink, width=thick * _SMOOTH, joint="curve")
    return large.reduce(_SMOOTH)


def stacked(boards: Sequence[Image.Image], *, gap: int = 16) -> Image.Image:
    """Pictures below each other on white."""
    board = Image.new("RGB", (max(b.width for b in boards), sum(b.height + gap for b in boards) - gap), _PAPER)
    y = 0
    for one in boards:
        board.paste(one, (0, y))
        y += one.height + gap
    return board


def titled(panels: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Pictures side by side on white, at panel height, each under its title."""
    raised = [_panel(np.asarray(panel.convert("RGB"))) for panel in panels]
    return _board(raised, titles)[0].reduce(_SMOOTH)


def draw_affinity(
    query: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    patch: int,
    affinities: Mapping[str, ArrayLike],
    target: ArrayLike,
    *,
    grid: int,
) -> Image.Image:
    """One probed query patch, and where in the reference each of several models looks for it.

    query, reference uint8 [H, W, 3]; grid: patches a side, L = grid * grid in row-major order. patch: index of the
    probed query patch. affinities: title -> row `patch` of the affinity [L] (`affinity(...)[patch]`), drawn as heat on
    one common scale, from 0 to the largest value of all. target [L]: overlap ratios of the patch
    (`patch_overlap(...)[patch]`); patches above 0 are outlined, and the affinity they receive stands in the title
    (all 0: unknown, neither is).
    Raises ValueError on another length.
    """
    length = grid * grid
    rows = {title: np.asarray(row, np.float64).reshape(-1) for title, row in affinities.items()}
    truth = np.asarray(target, np.float64).reshape(-1)
    for name, row in {**rows, "target": truth}.items():
        if row.shape != (length,):
            raise ValueError(
                f"{name} must have {length} values, one per patch of the {grid} x {grid} grid, got {row.size}"
            )
    if not 0 <= patch < length:
        raise ValueError(f"patch must lie in [0, {length}), got {patch}")
    top = max((float(row.max()) for row in rows.values()), default=0.0) or 1.0

    probe = _panel(query)
    _outline(probe, np.arange(length) == patch, grid, (255, 214, 10))
    panels, titles = [probe], ["probed patch of the query"]
    for title, row in rows.items():
        panel = _heated(reference, row / top, grid)
        _outline(panel, truth > 0, grid, _TARGET)
        panels.append(panel)
        titles.append(f"{title}: {row[truth > 0].sum():.0%} on the true place" if truth.any() else title)
    board, corners = _board(panels, titles, margin_right=62 if rows else 0)
    if rows:
        _scale_bar(board, corners[-1][0] + panels[-1].width + 10 * _SMOOTH, corners[-1][1], panels[-1].height, top)
    return board.reduce(_SMOOTH)


def draw_entropy(
    query: NDArray[np.uint8], entropies: Mapping[str, ArrayLike], copied: ArrayLike, *, grid: int
) -> Image.Image:
    """A query with its affinity entropy (equation 10) for each of several models; copied patches should be dark.

    entropies: title -> [L] in nats, drawn between the smallest and the largest value of all; copied [L]: share of each
    patch that is a copy, patches above one half are outlined. Raises ValueError on another length than L = grid * grid.
    """
    length = grid * grid
    rows = {title: np.asarray(row, np.float64).reshape(-1) for title, row in entropies.items()}
    truth = np.asarray(copied, np.float64).reshape(-1)
    for name, row in {**rows, "copied": truth}.items():
        if row.shape != (length,):
            raise ValueError(
                f"{name} must have {length} values, one per patch of the {grid} x {grid} grid, got {row.size}"
            )
    low = min((float(row.min()) for row in rows.values()), default=0.0)
    spread = max((float(row.max()) for row in rows.values()), default=1.0) - low or 1.0
    panels, titles = [_panel(query)], ["query"]
    for title, row in rows.items():
        panel = _heated(query, (row - low) / spread, grid)
        _outline(panel, truth > 0.5, grid, _TARGET)
        panels.append(panel)
        titles.append(f"{title}: affinity entropy")
    board, _ = _board(panels, titles)
    return board.reduce(_SMOOTH)


def _check_table(name: str, table: NDArray[np.int32], view: NDArray[np.uint8], grid: NDArray[np.uint8]) -> None:
    if table.shape != view.shape[:2]:
        raise ValueError(f"{name} must have its picture's shape {list(view.shape[:2])}, got {list(table.shape)}")
    cells = grid.shape[0] * grid.shape[1]
    if table.size and int(table.max()) >= cells:
        raise ValueError(f"{name} must lie below {cells}, the other picture's number of pixels, got {int(table.max())}")


def _spread(length: int, count: int) -> list[int]:
    """`count` integers evenly over [0, length), at the middles of equal parts."""
    return [int((i + 0.5) * length / count) for i in range(count)]


def _panel(picture: NDArray[np.uint8]) -> Image.Image:
    """A picture at panel height, times the smoothing factor."""
    height = PANEL_PX * _SMOOTH
    width = max(round(picture.shape[1] * height / picture.shape[0]), 1)
    return Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.BICUBIC)


def _grey(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Brightness [H, W, 1] in [0, 255]."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return (picture.astype(np.float32) @ weights)[..., None]


def _dimmed(picture: NDArray[np.uint8], keep: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The picture where `keep`, dark grey elsewhere."""
    return np.where(keep[..., None], picture, 24 + 0.3 * _grey(picture)).astype(np.uint8)


def _heated(picture: NDArray[np.uint8], heat: NDArray[np.float64], grid: int) -> Image.Image:
    """A panel of the picture in grey under a grid of values in [0, 1] as colours."""
    grey = _panel(np.repeat(_grey(picture), 3, axis=2).astype(np.uint8))
    colours = (colormaps["inferno"](np.clip(heat, 0, 1).reshape(grid, grid))[..., :3] * 255).astype(np.uint8)
    layer = Image.fromarray(colours).resize(grey.size, Image.Resampling.NEAREST)
    return Image.blend(grey, layer, 0.68)


def _outline(panel: Image.Image, chosen: NDArray[np.bool_], grid: int, colour: tuple[int, int, int]) -> None:
    """Draw the border of a set of patches [L] on a panel."""
    cells = np.pad(chosen.reshape(grid, grid), 1)
    draw = ImageDraw.Draw(panel)
    step_x, step_y = panel.width / grid, panel.height / grid
    sides = []
    for row, column in np.argwhere(cells):
        y, x = (row - 1) * step_y, (column - 1) * step_x
        for dy, dx, side in (
            (-1, 0, (x, y, x + step_x, y)),
            (1, 0, (x, y + step_y, x + step_x, y + step_y)),
            (0, -1, (x, y, x, y + step_y)),
            (0, 1, (x + step_x, y, x + step_x, y + step_y)),
        ):
            if not cells[row + dy, column + dx]:
                sides.append(side)
    for width, ink in ((7, (0, 0, 0)), (4, colour)):  # a dark rim keeps the line visible on any colour
        for x0, y0, x1, y1 in sides:
            half = width * _SMOOTH / 4
            draw.rectangle((x0 - half, y0 - half, x1 + half, y1 + half), fill=ink)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _board(
    panels: Sequence[Image.Image], titles: Sequence[str], margin_right: int = 0
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Panels side by side on white under their titles; returns it and each panel's top left corner, in drawn pixels."""
    gap, top = _GAP * _SMOOTH, _TITLE * _SMOOTH
    width = sum(panel.width for panel in panels) + gap * (len(panels) - 1) + margin_right * _SMOOTH
    board = Image.new("RGB", (width, top + max(panel.height for panel in panels)), _PAPER)
    draw = ImageDraw.Draw(board)
    corners, x = [], 0
    for panel, title in zip(panels, titles, strict=True):
        draw.text((x, 4 * _SMOOTH), _fitted(draw, title, panel.width + gap // 2), fill=_INK, font=_font(14 * _SMOOTH))
        board.paste(panel, (x, top))
        corners.append((x, top))
        x += panel.width + gap
    return board, corners


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, shortened with an ellipsis until it is at most `width` wide."""
    font = _font(14 * _SMOOTH)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _scale_bar(board: Image.Image, x: int, y: int, height: int, top: float) -> None:
    """The heat's colours from 0 (bottom) to `top`."""
    ramp = (colormaps["inferno"](np.linspace(1, 0, height))[:, None, :3] * 255).astype(np.uint8)
    width = 10 * _SMOOTH
    board.paste(Image.fromarray(np.repeat(ramp, width, axis=1)), (x, y))
    draw = ImageDraw.Draw(board)
    font = _font(12 * _SMOOTH)
    draw.text((x + width + 4 * _SMOOTH, y), f"{top:.2f}", fill=_INK, font=font)
    draw.text((x + width + 4 * _SMOOTH, y + height), "0", fill=_INK, font=font, anchor="ls")
