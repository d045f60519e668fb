"""Pictures made from numbers: enough variety to train and judge a small descriptor without any data set.

Every picture is a background (smooth noise, stripes, tiles, cells, a gradient, a landscape) with objects, patches of
texture and words on it. Palettes and families repeat between pictures, so that colour or kind alone does not tell two
of them apart: a copy has to be known by its details.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFont

SIDE_PX = (256, 400)
"""Smallest and largest side of a picture in pixels, both included."""
JPEG_QUALITY = 90

Field = NDArray[np.floating]  # [H, W] in [0, 1]
Picture = NDArray[np.uint8]  # [H, W, 3]

# Five colours each, dark to light; few on purpose (see above).
_PALETTES = (
    ("#1b2a41", "#324a5f", "#5c7a89", "#b6a999", "#efe6dd"),
    ("#2d1e2f", "#6b2d5c", "#f0386b", "#ff9a76", "#f8f4e3"),
    ("#0b3d2e", "#27724f", "#7fb069", "#e6aa68", "#fffbbd"),
    ("#1a1423", "#3d314a", "#684756", "#96705b", "#ab8476"),
    ("#012a4a", "#2a6f97", "#61a5c2", "#a9d6e5", "#f7fff7"),
    ("#370617", "#9d0208", "#dc2f02", "#f48c06", "#ffba08"),
    ("#22223b", "#4a4e69", "#9a8c98", "#c9ada7", "#f2e9e4"),
    ("#10002b", "#5a189a", "#9d4edd", "#48bfe3", "#d0f4de"),
)
_WORDS = """
river stone window seven market paper north garden light copper bridge winter salt engine open harbour letter
green mirror second field tower glass round music silver orange quiet forest signal
""".split()  # noqa: SIM905 - a list of thirty strings is harder to read


def make_pictures(
    folder: str | Path, count: int, seed: int = 0, *, side_px: tuple[int, int] = SIDE_PX, processes: int = 1
) -> list[Path]:
    """Write `count` distinct JPEG pictures into a folder and return their paths, in order.

    folder: made if absent; files are named `synthetic_00000.jpg`, ... and replaced if present. seed: picture `i`
    depends on (seed, i) alone, so a longer series begins with the shorter one. side_px: smallest and largest side;
    height and width are drawn independently. processes: how many share the work (more than one need a main module that
    can be imported, as :mod:`multiprocessing` says); the pictures do not depend on it. About 25 ms of one core each.
    Raises ValueError for count < 1, processes < 1 or a bad range.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    low, high = side_px
    if not 32 <= low <= high:
        raise ValueError(f"side_px must be (low, high) with 32 <= low <= high, got {side_px}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"synthetic_{index:05d}.jpg" for index in range(count)]
    save = partial(_save_picture, seed=seed, side_px=side_px)
    if processes == 1:
        for item in enumerate(paths):
            save(item)
    else:  # spawned: a fork would copy the locks of running threads
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(save, enumerate(paths), chunksize=10))
    return paths


def _save_picture(item: tuple[int, Path], seed: int, side_px: tuple[int, int]) -> None:
    index, path = item
    make_picture(np.random.default_rng([seed, index]), side_px).save(path, quality=JPEG_QUALITY)


def make_picture(rng: Generator, side_px: tuple[int, int] = SIDE_PX) -> Image.Image:
    """One RGB picture; everything in it is drawn from `rng`."""
    height, width = (int(side) for side in rng.integers(side_px[0], side_px[1] + 1, size=2))
    palette = _palette(rng)
    background = _BACKGROUNDS[rng.integers(len(_BACKGROUNDS))]
    picture = Image.fromarray(background(rng, height, width, palette))
    for _ in range(rng.integers(2, 9)):
        _draw_object(rng, picture, _palette(rng) if rng.random() < 0.4 else palette)
    for _ in range(rng.choice(4, p=(0.5, 0.25, 0.15, 0.1))):
        _draw_words(rng, picture, palette)
    light = 255 - 80 * _noise(rng, height, width, 2)  # uneven light over everything
    picture = ImageChops.multiply(picture, _three(light.astype(np.uint8)))
    grain = int(rng.integers(2, 10))
    noise = rng.integers(0, 2 * grain + 1, size=(height, width), dtype=np.uint8)
    return ImageChops.add(picture, _three(noise), offset=-grain)


def _three(plane: NDArray[np.uint8]) -> Image.Image:
    """A plane [H, W] as a grey RGB picture."""
    return Image.merge("RGB", [Image.fromarray(plane)] * 3)


def _palette(rng: Generator) -> NDArray[np.float32]:
    """Five colours [5, 3] in [0, 1]: one of the palettes, a little off, sometimes turned to another hue."""
    chosen = _PALETTES[rng.integers(len(_PALETTES))]
    colours = np.array([[int(text[i : i + 2], 16) for i in (1, 3, 5)] for text in chosen], np.float32) / 255
    if rng.random() < 0.3:
        colours = colours[:, rng.permutation(3)]
    return np.clip(colours + rng.normal(0, 0.04, size=colours.shape), 0, 1).astype(np.float32)


def _coloured(field: Field, palette: NDArray[np.float32]) -> Picture:
    """A field's values as colours: interpolated along the palette."""
    stops = np.linspace(0, 1, len(palette))
    table = np.stack([np.interp(np.linspace(0, 1, 256), stops, palette[:, c]) for c in range(3)], -1)
    return np.take((table * 255 + 0.5).astype(np.uint8), np.clip(field * 255, 0, 255).astype(np.uint8), axis=0)


def _grid(height: int, width: int) -> tuple[Field, Field]:
    """y [H, 1] and x [1, W], both in units of 100 pixels."""
    return (
        np.arange(height, dtype=np.float32)[:, None] / 100,
        np.arange(width, dtype=np.float32)[None] / 100,
    )


def _noise(rng: Generator, height: int, width: int, cells: int, octaves: int = 1) -> Field:
    """Smooth noise in [0, 1]: random values on a coarse grid, enlarged bicubically, halved in size per octave."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        n = cells << octave
        coarse = Image.fromarray(rng.random((n + 1, n + 1), dtype=np.float32))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / (1 << octave)
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def _turned(rng: Generator, height: int, width: int) -> tuple[Field, Field]:
    """Coordinates [H, W] turned by a random angle and bent by noise."""
    y, x = _grid(height, width)
    angle = rng.uniform(0, np.pi)
    bend = rng.uniform(0, 0.6) * _noise(rng, height, width, 3)
    u = np.cos(angle) * x + np.sin(angle) * y + bend
    v = -np.sin(angle) * x + np.cos(angle) * y + bend
    return u.astype(np.float32), v.astype(np.float32)


def _clouds(rng: Generator, height: int, width: int, palette: NDArray[np.float32]) -> Picture:
    field = _noise(rng, height, width, int(rng.integers(2, 7)), octaves=int(rng.integers(2, 6)))
    if rng.random() < 0.4:  # contour bands
        field = (field * rng.integers(3, 8)) % 1.0
    return _coloured(field, palette)


def _stripes(rng: Generator, height: int, width: int, palette: NDArray[np.float32]) -> Picture:
    u, v = _turned(rng, height, width)
    wave = np.sin(u * rng.uniform(6, 26)) * 0.5 + 0.5
    if rng.random() < 0.5:  # Gabor-like packets
        wave = wave * (np.sin(v * rng.uniform(2, 9)) * 0.5 + 0.5)
    if rng.random() < 0.4:
        wave = (wave > 0.5).astype(np.float32)
    return _coloured(0.75 * wave + 0.25 * _noise(rng, height, width, 4, 2), palette)


def _tiles(rng: Generator, height: int, width: int, palette: NDArray[np.float32]) -> Picture:
    u, v = _turned(rng, height, width)
    size = rng.uniform(1.2, 4.0)
    column, row = np.floor(u * size).astype(np.int64), np.floor(v * size).astype(np.int64)
    if rng.random() < 0.5:  # chequers of two kinds
        value = ((column + row) % 2).astype(np.float32) * 0.8
    else:  # a colour a tile
        value = rng.random((64, 64), dtype=np.float32)[row % 64, column % 64]
    joint = (np.minimum(u * size - column, v * size - row) < 0.07) * rng.random()
    return _coloured(np.clip(value + 0.15 * _noise(rng, height, width, 8, 2) - joint, 0, 1), palette)


def _cells(rng: Generator, height: int, width: int, palette: NDArray[np.float32]) -> Picture:
    count = int(rng.integers(8, 40))
    y, x = _grid(height, width)
    points = rng.random((count, 2)) * (height / 100, width / 100)
    values = rng.random(count, dtype=np.float32)
    nearest = np.full((height, width), np.inf, np.float32)
    second = nearest.copy()
    owner = np.zeros((height, width), np.int64)
    for index, (py, px) in enumerate(points.astype(np.float32)):
        distance = (y - py) ** 2 + (x - px) ** 2
        closer = distance < nearest
        second = np.where(closer, nearest, np.minimum(second, distance))
        owner[closer] = index
        nearest = np.minimum(nearest, distance)
    edge = np.sqrt(second) - np.sqrt(nearest)
    field = np.clip(0.7 * values[owner] + 0.3 * np.sqrt(nearest), 0, 1)
    if rng.random() < 0.6:
        field = field * np.clip(edge * 25, 0, 1)
    return _coloured(field, palette)


def _gradient(rng: Generator, height: int, width: int, palette: NDArray[np.float32]) -> Picture:
    y, x = _grid(height, width)
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * np.pi)
        field = np.cos(angle) * x + np.sin(angle) * y
    else:
        field = np.hypot(y - rng.uniform(0, height / 100), x - rng.uniform(0, width / 100))
    field = (field - field.min()) / max(float(np.ptp(field)), 1e-6)
    return _coloured(0.85 * field + 0.15 * _noise(rng, height, width, 3, 4), palette)


def _landscape(rng: Generator, height: int, width: int, palette: NDArray[np.float32]) -> Picture:
    y, x = _grid(height, width)
    picture = _coloured(np.clip(1 - 0.5 * y / y.max() + 0.25 * (_noise(rng, height, width, 3, 4) - 0.5), 0, 1), palette)
    sun = np.hypot(y - rng.uniform(0.2, 1.2), x - rng.uniform(0, width / 100)) < rng.uniform(0.12, 0.4)
    picture[sun] = _rgb(palette[-1])
    layers = int(rng.integers(2, 5))
    for layer in range(layers):
        rough = int(rng.integers(2, 8))
        profile = _noise(rng, 2, width, rough, octaves=5)[0]
        horizon = height / 100 * (0.35 + 0.5 * layer / layers) + rng.uniform(0.3, 1.0) * (profile - 0.5)
        ground = y > horizon[None]
        shade = 0.7 - 0.6 * (layer + 1) / layers + 0.25 * _noise(rng, height, width, 12, 3)
        picture[ground] = _coloured(np.clip(shade, 0, 1), palette)[ground]
    return picture


_BACKGROUNDS: tuple[Callable[[Generator, int, int, NDArray[np.float32]], Picture], ...] = (
    _clouds,
    _stripes,
    _tiles,
    _cells,
    _gradient,
    _landscape,
)


def _outline(rng: Generator, radius: float) -> list[tuple[float, float]]:
    """A closed outline around (0, 0): a polygon, a star, a box, an ellipse or a blob."""
    kind = rng.integers(5)
    start = rng.uniform(0, 2 * np.pi)
    radii: NDArray[np.floating]
    if kind == 0:
        n = int(rng.integers(3, 7))
        angles, radii = start + np.arange(n) * 2 * np.pi / n, np.full(n, radius)
    elif kind == 1:
        n = int(rng.integers(4, 9))
        angles = start + np.arange(2 * n) * np.pi / n
        radii = np.where(np.arange(2 * n) % 2, radius * rng.uniform(0.35, 0.7), radius)
    elif kind == 2:
        corner = rng.uniform(0.35, 1.2)
        angles = start + np.array([-corner, corner, np.pi - corner, np.pi + corner])
        radii = np.full(4, radius)
    else:
        angles = start + np.linspace(0, 2 * np.pi, 40, endpoint=False)
        flat = rng.uniform(0.45, 1)
        waves = 0.0 if kind == 3 else 0.3  # an ellipse, or a blob
        radii = radius * (1 + waves * np.sin(rng.integers(2, 6) * angles) * np.cos(angles))
        turned = np.stack([np.cos(angles) * radii, flat * np.sin(angles) * radii], -1)
        return [(float(px), float(py)) for px, py in turned]
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]


def _draw_object(rng: Generator, picture: Image.Image, palette: NDArray[np.float32]) -> None:
    """Lay one object on the picture: an outline filled with a colour or a texture, often with an edge."""
    width, height = picture.size
    radius = min(width, height) * float(rng.choice((0.07, 0.12, 0.2, 0.3))) * rng.uniform(0.8, 1.2)
    centre = rng.uniform(0, width), rng.uniform(0, height)
    side = int(2.7 * radius) + 2
    scale = 2  # masks are drawn at twice the size and reduced: smooth edges
    points = [((px + side / 2) * scale, (py + side / 2) * scale) for px, py in _outline(rng, radius)]
    mask = Image.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(mask)
    draw.polygon(points, fill=255)
    corner = int(centre[0] - side / 2), int(centre[1] - side / 2)
    if rng.random() < 0.55:
        texture = _BACKGROUNDS[rng.integers(len(_BACKGROUNDS) - 1)]  # any but a landscape
        fill = Image.fromarray(texture(rng, side, side, palette))
    else:
        fill = Image.new("RGB", (side, side), _rgb(palette[rng.integers(5)]))
    picture.paste(fill, corner, mask.reduce(scale))
    if rng.random() < 0.4:
        edge = Image.new("L", mask.size)
        ImageDraw.Draw(edge).line([*points, points[0]], fill=255, width=int(rng.integers(2, 7)) * scale, joint="curve")
        picture.paste(Image.new("RGB", (side, side), _rgb(palette[rng.integers(5)])), corner, edge.reduce(scale))


def _rgb(colour: NDArray[np.float32]) -> tuple[int, int, int]:
    red, green, blue = (round(float(c) * 255) for c in colour)
    return red, green, blue


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_words(rng: Generator, picture: Image.Image, palette: NDArray[np.float32]) -> None:
    """Write one to three lines of words somewhere, turned a little now and then, on a plate or bare."""
    lines = [
        " ".join(_WORDS[i] for i in rng.integers(len(_WORDS), size=rng.integers(1, 4)))
        for _ in range(rng.integers(1, 4))
    ]
    text = "\n".join(line.upper() if rng.random() < 0.3 else line for line in lines)
    font = _font(int(rng.choice((14, 20, 28, 40))))
    left, top, right, bottom = ImageDraw.Draw(picture).multiline_textbbox((0, 0), text, font=font)
    size = int(right - left) + 16, int(bottom - top) + 12
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).multiline_text((8 - left, 6 - top), text, font=font, fill=255)
    ink, plate = rng.permutation(5)[:2]
    layer = Image.new("RGB", size, _rgb(palette[plate]))
    layer.paste(Image.new("RGB", size, _rgb(palette[ink])), (0, 0), mask)
    visible = Image.new("L", size, 255) if rng.random() < 0.5 else mask
    if rng.random() < 0.4:
        angle = rng.uniform(-40, 40)
        layer = layer.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        visible = visible.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    x = int(rng.uniform(-0.2, 0.9) * (picture.width - layer.width * 0.5))
    y = int(rng.uniform(0, 0.95) * (picture.height - layer.height * 0.5))
    picture.paste(layer, (x, y), visible)
