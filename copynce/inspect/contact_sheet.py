"""A sheet of every edit: the picture, its edited view, and the source's grid carried through the table.

Pixels come from the pixel executor and lines from PixTrace, so a person sees whether the two agree. Colour edits move
nothing; they are shown at three strengths instead.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from copynce.pixtrace import (
    Blur,
    Clahe,
    ColorJitter,
    ColorMatrix,
    Convolve,
    CoordinateTable,
    Crop,
    Edit,
    EditProgram,
    Equalize,
    Erase,
    Grayscale,
    HorizontalFlip,
    Jpeg,
    Lens,
    Median,
    Mesh,
    Noise,
    Pixelate,
    Rain,
    RelativeMatte,
    RelativeOverlay,
    RelativePad,
    RelativePasteOnto,
    RelativeStamp,
    Resize,
    ResizedCrop,
    Rotation,
    Shift,
    ShufflePixels,
    Stretch,
    Swirl,
    Tilt,
    ToneCurve,
    VerticalFlip,
    Wave,
    bits_of,
    sample_program,
    stroke_bits,
    text_bits,
)
from dali_pipelines import render_programs

Picture = NDArray[np.uint8]  # [H, W, 3]

LINES = 8
"""Cells a side of the grid that is drawn on the source."""
_GAP, _TITLE, _MARGIN = 4, 20, 12
_PAPER, _INK = (255, 255, 255), (32, 36, 44)

_y, _x = np.mgrid[:64, :64] / 31.5 - 1.0
_OBJECT = bits_of(np.hypot(_x, _y) < 0.75 + 0.2 * np.sin(5 * np.arctan2(_y, _x)))
_STROKE = stroke_bits(((0.05, 0.8), (0.3, 0.1), (0.5, 0.9), (0.7, 0.2), (0.95, 0.6)), 0.08)
_GREY = (0.299, 0.587, 0.114)

MOVING: dict[str, tuple[Edit, ...]] = {
    "none: the plain resize": (),
    "Crop": (Crop(20, 30, 170, 200),),
    "Resize to 30 x 100 (composed: no loss)": (Resize(30, 100),),
    "ResizedCrop": (ResizedCrop(((0.4, 0.7),), 0.6, 0.3),),
    "HorizontalFlip": (HorizontalFlip(),),
    "VerticalFlip": (VerticalFlip(),),
    "Affine: Rotation": (Rotation(30.0),),
    "Affine: Rotation with shear": (Rotation(90.0, 25.0),),
    "Affine: Stretch and Shift": (Stretch(1.4, 0.7), Shift(0.1, -0.1)),
    "Perspective: Tilt": (Tilt(((0.35, 0.1), (0.0, 0.4), (0.3, 0.25), (0.1, 0.0))),),
    "Pad": (RelativePad(0.2, 0.2, 0.2, 0.2),),
    "PasteOnto, opacity 0.8": (RelativePasteOnto(((0.4, 1.3),), 0.8, 0.3, 0.8, 0.0),),
    "Overlay, opacity 0.4": (RelativeOverlay(((0.4, 0.8),), 0.3, 0.6, 0.4, 0.0),),
    "Overlay, opacity 0.7": (RelativeOverlay(((0.4, 0.8),), 0.3, 0.6, 0.7, 0.0),),
    "Matte": (RelativeMatte(_OBJECT, 0.8, 20.0, 0.55, 0.5),),
    "Stamp: text": (RelativeStamp(text_bits("COPY ME"), 0.16, 0.5, 0.8, (1.0, 0.9, 0.1)),),
    "Stamp: a stroke": (RelativeStamp(_STROKE, 0.8, 0.5, 0.5, (0.1, 0.2, 0.9), 0.9),),
    "Erase": (Erase(60, 40, 90, 110, noise_seed=3),),
    "Remap: Swirl": (Swirl(0.18, 0.5),),
    "Remap: Wave": (Wave(0.04, 0.03, 2.0, 0.1),),
    "Remap: Lens": (Lens(0.6),),
    "Remap: Mesh": (Mesh((((0.0, 0.1), (0.1, 0.0)), ((-0.1, 0.0), (0.1, -0.1)), ((0.0, -0.1), (0.0, 0.1)))),),
    "flip, paste, turn, pad": (
        HorizontalFlip(),
        RelativePasteOnto(((0.5, 1.0),), 0.7, 0.4, 1.0, 0.0),
        Rotation(-15.0),
        RelativePad(0.1, 0.1, 0.1, 0.1),
    ),
    "stamp, swirl, overlay, crop": (
        RelativeStamp(text_bits("ABC"), 0.3, 0.2, 0.2, (1.0, 1.0, 1.0)),
        Swirl(-0.12),
        RelativeOverlay(((0.2, 1.0),), 0.9, 0.9, 1.0, 0.0),
        ResizedCrop(((0.7, 1.0),), 0.5, 0.9),
    ),
    "a program of the policy descriptor": sample_program("descriptor", seed=0, epoch=0, uuid="sheet 26").edits,
    "a program of the policy matcher": sample_program("matcher", seed=0, epoch=0, uuid="sheet 4").edits,
}
"""Edits that move or hide pixels; the boxes of Crop and Erase fit any picture of at least 200 x 230 pixels."""

COLOURS: dict[str, tuple[Edit, ...]] = {
    "ColorJitter: brightness 0.5, 1.25, 1.5": tuple(ColorJitter(brightness=b) for b in (0.5, 1.25, 1.5)),
    "ColorJitter: contrast 0.5, 1.25, 1.5": tuple(ColorJitter(contrast=c) for c in (0.5, 1.25, 1.5)),
    "ColorJitter: saturation 0.3, 1.3, 1.8": tuple(ColorJitter(saturation=s) for s in (0.3, 1.3, 1.8)),
    "ColorJitter: hue -0.1, 0.1, 0.2": tuple(ColorJitter(hue=h) for h in (-0.1, 0.1, 0.2)),
    "Grayscale, Equalize, Clahe": (Grayscale(), Equalize(), Clahe()),
    "ColorMatrix: haze, shift, sepia": (
        ColorMatrix(((0.6, 0, 0, 0.36), (0, 0.6, 0, 0.36), (0, 0, 0.6, 0.36))),
        ColorMatrix(((1, 0, 0, 0.08), (0, 1, 0, -0.08), (0, 0, 1, 0.08))),
        ColorMatrix(((0.393, 0.769, 0.189, 0), (0.349, 0.686, 0.168, 0), (0.272, 0.534, 0.131, 0))),
    ),
    "ToneCurve: gamma 1.7, posterize, solarize": (
        ToneCurve(tuple((k / 63) ** 1.7 for k in range(64))),
        ToneCurve(tuple((k & 0xF0) / 255 for k in range(256))),
        ToneCurve(tuple((k if k < 128 else 255 - k) / 255 for k in range(256))),
    ),
    "Convolve: edges, more edges, motion blur": (
        Convolve(((-0.5,) * 3, (-0.5, 5.0, -0.5), (-0.5,) * 3)),
        Convolve(((-1.0,) * 3, (-1.0, 9.0, -1.0), (-1.0,) * 3)),
        Convolve(tuple(tuple(1 / 7 if i == j else 0.0 for j in range(7)) for i in range(7))),
    ),
    "Median: 3, 5, 9": (Median(3), Median(5), Median(9)),
    "Pixelate: 0.6, 0.3, 0.12": (Pixelate(0.6), Pixelate(0.3), Pixelate(0.12)),
    "Rain": (Rain(-10, 1), Rain(0, 2), Rain(10, 3)),
    "ShufflePixels; Noise: grey, coloured": (ShufflePixels(), Noise(luma=0.08), Noise(chroma=0.08)),
    "Blur: sigma 1, 2.5, 4.5": (Blur(1.0), Blur(2.5), Blur(4.5)),
    "Jpeg: quality 50, 20, 10": (Jpeg(50), Jpeg(20), Jpeg(10)),
}
"""Edits of colours, three a row."""


def contact_sheet(pictures: Sequence[Path], *, size: int = 136, columns: int = 3) -> Image.Image:
    """The sheet, RGB: a cell per entry of :data:`MOVING`, then of :data:`COLOURS`, taking the pictures in turn.

    pictures: files of at least 200 x 230 pixels, at least two (the next one of the row serves as other picture).
    size: pixels a side of a panel; a cell has three. columns: cells in a row. Raises ValueError for fewer pictures.
    """
    if len(pictures) < 2:
        raise ValueError(f"pictures must be at least two, got {len(pictures)}")
    cells = []
    for k, (title, edits) in enumerate(MOVING.items()):
        path, other = pictures[k % len(pictures)], pictures[(k + 1) % len(pictures)]
        cells.append(_cell(title, _moved(path, other, edits, size)))
    for k, (title, three) in enumerate(COLOURS.items(), start=len(MOVING)):
        path = pictures[k % len(pictures)]
        cells.append(_cell(title, list(render_programs([path] * 3, [EditProgram((edit,)) for edit in three], size))))
    height, width = cells[0].height + _MARGIN, cells[0].width + _MARGIN
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _PAPER)
    for k, cell in enumerate(cells):
        sheet.paste(cell, (_MARGIN + k % columns * width, _MARGIN + k // columns * height))
    return sheet


def draw_source_grid(picture: Picture) -> Picture:
    """The picture with the lines of a regular grid on it, each in its own colour."""
    table = CoordinateTable.identity(picture.shape[:2])
    return draw_traced_grid(picture, table)


def draw_traced_grid(view: Picture, table: CoordinateTable) -> Picture:
    """A view with what shows nothing of the source greyed, and the source's grid lines where the table puts them.

    view uint8 [H, W, 3]; table of the same size. A line runs between two neighbouring pixels that show different cells
    of the source.
    """
    shown = table.index >= 0
    grey = view @ np.array(_GREY)
    drawn = np.where(shown[..., None], view, (0.35 * grey + 150)[..., None]).astype(np.uint8)
    row, column = np.divmod(np.maximum(table.index, 0), table.grid_shape[1])
    for cell, colours in (
        (column * LINES // table.grid_shape[1], _line_colours(0.0)),
        (row * LINES // table.grid_shape[0], _line_colours(0.5)),
    ):
        for axis in (0, 1):
            here, there = (slice(None, -1), slice(None)), (slice(1, None), slice(None))
            if axis == 1:
                here, there = here[::-1], there[::-1]
            # Neighbouring cells only: a jump is an edge of something that covers or repeats, not a line.
            line = shown[here] & shown[there] & (np.abs(cell[here] - cell[there]) == 1)
            drawn[here][line] = colours[np.maximum(cell[here], cell[there])[line]]
    return drawn


def _moved(path: Path, other: Path, edits: tuple[Edit, ...], size: int) -> list[Picture]:
    """Three panels: the source under its grid, the view, and the view under the traced grid."""
    program = EditProgram(edits)
    plain, view = render_programs([path, path], [EditProgram(), program], size, pictures=[other])
    with Image.open(path) as image:
        table = program.trace((image.height, image.width), (size, size))
    return [draw_source_grid(plain), view, draw_traced_grid(view, table)]


def _line_colours(start: float) -> Picture:
    """uint8 [LINES, 3]: bright colours over half of the circle from ``start`` on."""
    turns = [start + 0.5 * k / LINES for k in range(LINES)]
    return np.array([[round(255 * c) for c in colorsys.hsv_to_rgb(t, 0.9, 1.0)] for t in turns], np.uint8)


def _cell(title: str, panels: Sequence[Picture]) -> Image.Image:
    size = panels[0].shape[0]
    cell = Image.new("RGB", (len(panels) * (size + _GAP) - _GAP, _TITLE + size), _PAPER)
    ImageDraw.Draw(cell).text((0, 1), title, fill=_INK, font=_font())
    for k, panel in enumerate(panels):
        cell.paste(Image.fromarray(panel), (k * (size + _GAP), _TITLE))
    return cell


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(14)
