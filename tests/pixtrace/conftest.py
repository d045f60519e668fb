"""Plain twins of the PixTrace tests, and the chains they run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from copynce.pixtrace import (
    Affine,
    Crop,
    Edit,
    Erase,
    HorizontalFlip,
    Matte,
    Overlay,
    Pad,
    PasteOnto,
    Perspective,
    Photometric,
    Remap,
    Resize,
    Rotation,
    Stamp,
    Stretch,
    Tilt,
    VerticalFlip,
    mask_of,
)

Points = tuple[np.ndarray, np.ndarray, np.ndarray]


def pull_points(edits: Sequence[Edit], source_shape: tuple[int, int], grid: tuple[int, int]) -> Points:
    """x, y in source pixels and the source's weight in the colour, 0 to 1, for every pixel centre of the view.

    Walks back from the view, one edit at a time, in continuous coordinates: what the composed map must equal. Written
    from the edits' definitions, not from their matrices.
    """
    height, width = source_shape
    chain: list[tuple[Any, int, int]] = []
    for edit in edits:
        for absolute in edit.absolute(height, width, grid):
            chain.append((absolute, height, width))
            height, width = absolute.output_size(height, width)
    y, x = np.mgrid[:height, :width] + 0.5
    weight = np.ones((height, width))
    for edit, height, width in reversed(chain):
        if isinstance(edit, Crop):
            x, y = x + edit.left, y + edit.top
        elif isinstance(edit, Resize):
            x, y = x * width / edit.width, y * height / edit.height
        elif isinstance(edit, HorizontalFlip):
            x = width - x
        elif isinstance(edit, VerticalFlip):
            y = height - y
        elif isinstance(edit, (Affine, Perspective, Matte)):
            matrix = np.array(edit.matrix)
            back = np.linalg.solve(matrix, np.stack([x, y, np.ones_like(x)]).reshape(3, -1)).reshape(3, *x.shape)
            with np.errstate(divide="ignore", invalid="ignore"):
                x, y = back[0] / back[2], back[1] / back[2]
            depth = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2]
            centre = matrix[2] @ (width / 2, height / 2, 1.0)
            weight = np.where(depth * centre > 0, weight, 0.0)
        elif isinstance(edit, (Pad, PasteOnto)):
            x, y = x - edit.left, y - edit.top
        elif isinstance(edit, (Overlay, Erase)):
            inside = _inside(x - edit.left, y - edit.top, edit.height, edit.width)
            weight = np.where(inside, weight * (0.0 if isinstance(edit, Erase) else 1.0 - edit.opacity), weight)
        elif isinstance(edit, Stamp):
            bits = mask_of(edit.bits)
            inside = _inside(x - edit.left, y - edit.top, edit.height, edit.width)
            row, column = (y - edit.top) * bits.shape[0] / edit.height, (x - edit.left) * bits.shape[1] / edit.width
            row, column = (np.floor(np.where(inside, v, 0) + 1e-7).astype(int) for v in (row, column))
            weight = np.where(inside & (bits[row, column] == 1), weight * (1.0 - edit.opacity), weight)
        elif isinstance(edit, Remap):
            x, y = _sampled(edit.field, x - 0.5, y - 0.5)
        else:
            assert isinstance(edit, Photometric)
        if isinstance(edit, (Affine, Perspective, Matte, Pad, PasteOnto, Remap)):
            weight = np.where(_inside(x, y, height, width), weight, 0.0)
        if isinstance(edit, Matte):
            rows, columns = (np.floor(np.where(weight > 0, v, 0) + 1e-7).astype(int) for v in (y, x))
            weight = np.where(mask_of(edit.mask)[rows, columns] == 1, weight, 0.0)
        if isinstance(edit, (PasteOnto, Matte)):
            weight = weight * edit.opacity
    return x, y, weight


def _sampled(field: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The x and y of a dense map at fractional array positions, by four corners, held at the border."""
    height, width = field.shape[:2]
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    j, i = np.floor(x).astype(int), np.floor(y).astype(int)
    out = np.zeros((*x.shape, 2))
    for row, down in ((i, 1 - (y - i)), (np.minimum(i + 1, height - 1), y - i)):
        for column, across in ((j, 1 - (x - j)), (np.minimum(j + 1, width - 1), x - j)):
            out += (down * across)[..., None] * field[row, column]
    return out[..., 0], out[..., 1]


def _inside(x: np.ndarray, y: np.ndarray, height: int, width: int) -> np.ndarray:
    # The tolerance of the tables: a point on a border up to rounding lies right of it or below it.
    return (x >= -1e-7) & (x < width - 1e-7) & (y >= -1e-7) & (y < height - 1e-7)


def exact_index(edits: Sequence[Edit], source_shape: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """int32 [H, W]: the table of :func:`pull_points`."""
    x, y, weight = pull_points(edits, source_shape, grid)
    shown = 255 * weight >= 126.5  # 127 of 255 or more, rounded
    column = np.floor(np.where(shown, x, 0) * grid[1] / source_shape[1] + 1e-7).clip(0, grid[1] - 1)
    row = np.floor(np.where(shown, y, 0) * grid[0] / source_shape[0] + 1e-7).clip(0, grid[0] - 1)
    return np.where(shown, row * grid[1] + column, -1).astype(np.int32)


def agreement(found: np.ndarray, expected: np.ndarray, width: int) -> tuple[float, float]:
    """Of all pixels, the part that both or neither call visible; of those visible in both, within one grid pixel."""
    both = (found >= 0) & (expected >= 0)
    visible = float(((found >= 0) == (expected >= 0)).mean())
    if not both.any():
        return visible, 1.0
    rows = np.abs(found[both] // width - expected[both] // width)
    columns = np.abs(found[both] % width - expected[both] % width)
    return visible, float((np.maximum(rows, columns) <= 1).mean())


def random_chain(
    rng: np.random.Generator, length: int, source: tuple[int, int], smallest: int, layers: bool = True
) -> tuple[Edit, ...]:
    """A chain of absolute edits that never makes the picture smaller than ``smallest`` pixels a side."""
    height, width = source
    chain: list[Edit] = []
    while len(chain) < length:
        kind = int(rng.integers(11 if layers else 8))
        edit: Edit
        if kind == 0:
            h, w = (int(rng.integers(max(1, (2 * side) // 3), side + 1)) for side in (height, width))
            edit = Crop(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
        elif kind == 1:
            edit = Resize(*(int(side * rng.uniform(0.7, 1.3)) + 1 for side in (height, width)))
        elif kind == 2:
            edit = HorizontalFlip()
        elif kind == 3:
            edit = VerticalFlip()
        elif kind == 4:
            (edit,) = Rotation(float(rng.uniform(0, 360)), float(rng.uniform(-30, 30))).absolute(height, width, (1, 1))
        elif kind == 5:
            moves = tuple((float(a), float(b)) for a, b in rng.uniform(0, 0.4, (4, 2)))
            (edit,) = Tilt(moves).absolute(height, width, (1, 1))
        elif kind == 6:
            edit = Pad(*(int(v) for v in rng.integers(0, max(2, min(height, width) // 5), 4)))
        elif kind == 7:
            (edit,) = Stretch(float(rng.uniform(0.6, 1.5)), float(rng.uniform(0.6, 1.5))).absolute(
                height, width, (1, 1)
            )
        elif kind == 8:
            h, w = height + int(rng.integers(60)), width + int(rng.integers(60))
            top, left = int(rng.integers(h - height + 1)), int(rng.integers(w - width + 1))
            edit = PasteOnto(h, w, top, left, float(rng.uniform(0.75, 1.0)), 0.3)
        else:
            h, w = (int(rng.integers(1, max(2, side // 2))) for side in (height, width))
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            edit = Overlay(top, left, h, w, float(rng.choice([0.2, 0.8])), 0.6) if kind == 9 else Erase(top, left, h, w)
        size = edit.output_size(height, width)
        if min(size) >= smallest and max(size) <= 1500:
            chain.append(edit)
            height, width = size
    return tuple(chain)


@pytest.fixture(scope="session")
def pull() -> Callable[..., Points]:
    return pull_points


@pytest.fixture(scope="session")
def exact() -> Callable[..., np.ndarray]:
    return exact_index


@pytest.fixture(scope="session")
def agree() -> Callable[..., tuple[float, float]]:
    return agreement


@pytest.fixture(scope="session")
def chain_of() -> Callable[..., tuple[Edit, ...]]:
    return random_chain
