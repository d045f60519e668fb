"""Edits by any dense backward map: a step between composed runs; and relative forms of the common ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copynce.pixtrace.edits.base import Edit, Relative, Size, require_range, wrong
from copynce.pixtrace.edits.geometry import Resize


@dataclass(frozen=True, eq=False)
class Remap(Edit):
    """Any dense backward map: swirl, wave, lens, mesh.

    ``field`` float32 [H, W, 2] (or nested tuples of that shape): the (x, y) point of the *input* that the centre of
    output pixel (i, j) shows, in the input's continuous pixel coordinates; the output has H x W pixels. Points
    outside of the input are black.
    """

    field: NDArray[np.float32]

    def __post_init__(self) -> None:
        field = np.array(self.field, dtype=np.float32)
        if field.ndim != 3 or field.shape[2] != 2 or field.size == 0:
            raise ValueError(f"Remap.field must have the shape [H, W, 2], H and W at least 1, got {list(field.shape)}")
        if not np.isfinite(field).all():
            place = tuple(int(k) for k in np.argwhere(~np.isfinite(field))[0])
            raise ValueError(f"Remap.field must be finite, got {field[place]} at {list(place)}")
        field.setflags(write=False)
        object.__setattr__(self, "field", field)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remap) and np.array_equal(self.field, other.field)

    def __hash__(self) -> int:
        return hash(self.field.tobytes())

    def output_size(self, height: int, width: int) -> Size:
        return self.field.shape[0], self.field.shape[1]


@dataclass(frozen=True)
class Swirl(Relative):
    """Resize to the grid and twist about (x, y): ``turns`` at the centre, none from ``radius`` (of the side) on."""

    turns: float
    radius: float = 0.5
    x: float = 0.5
    y: float = 0.5

    def __post_init__(self) -> None:
        require_range(self, -10.0, 10.0, "turns")
        require_range(self, 1e-3, 10.0, "radius")
        require_range(self, 0.0, 1.0, "x", "y")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = _centres(grid)
        dx, dy = x / grid[1] - self.x, y / grid[0] - self.y
        angle = 2 * np.pi * self.turns * np.clip(1.0 - np.hypot(dx, dy) / self.radius, 0.0, 1.0) ** 2
        sx, sy = dx * np.cos(angle) - dy * np.sin(angle), dx * np.sin(angle) + dy * np.cos(angle)
        return Resize(*grid), _remap((self.x + sx) * grid[1], (self.y + sy) * grid[0])


@dataclass(frozen=True)
class Wave(Relative):
    """Resize to the grid and shift rows and columns by sines of so many fractions of the side, ``waves`` along a
    side."""

    x: float
    y: float
    waves: float = 3.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        require_range(self, -1.0, 1.0, "x", "y")
        require_range(self, 0.0, 100.0, "waves")
        require_range(self, -1.0, 1.0, "phase")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = _centres(grid)
        turn = 2 * np.pi
        moved_x = x + self.x * grid[1] * np.sin(turn * (self.waves * y / grid[0] + self.phase))
        moved_y = y + self.y * grid[0] * np.sin(turn * (self.waves * x / grid[1] + self.phase))
        return Resize(*grid), _remap(moved_x, moved_y)


@dataclass(frozen=True)
class Lens(Relative):
    """Resize to the grid and bend along the radius: ``strength`` above 0 pushes the corners outwards, below pulls
    in."""

    strength: float

    def __post_init__(self) -> None:
        require_range(self, -0.9, 10.0, "strength")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = _centres(grid)
        dx, dy = 2 * x / grid[1] - 1, 2 * y / grid[0] - 1
        scale = (1.0 + self.strength * (dx * dx + dy * dy) / 2) / (1.0 + max(0.0, self.strength))
        return Resize(*grid), _remap((1 + dx * scale) * grid[1] / 2, (1 + dy * scale) * grid[0] / 2)


@dataclass(frozen=True)
class Mesh(Relative):
    """Resize to the grid and pull it along a mesh: ``moves`` are rows of (x, y) fractions of the side, bilinear
    between.

    The corners of the mesh lie on the corners of the picture; a move says how far from its place a point is fetched.
    """

    moves: tuple[tuple[tuple[float, float], ...], ...]

    def __post_init__(self) -> None:
        moves = np.array(self.moves, dtype=np.float64)
        if moves.ndim != 3 or moves.shape[2] != 2 or min(moves.shape[:2]) < 2 or not (np.abs(moves) <= 1.0).all():
            raise wrong(self, "moves", "at least 2 x 2 pairs (x, y) of numbers in [-1, 1]")

    def absolute(self, height: int, width: int, grid: Size) -> tuple[Edit, ...]:
        x, y = _centres(grid)
        moves = np.array(self.moves, dtype=np.float64)
        at_x, at_y = x / grid[1] * (moves.shape[1] - 1), y / grid[0] * (moves.shape[0] - 1)
        moved = bilinear(moves, at_x, at_y)
        return Resize(*grid), _remap(x + moved[..., 0] * grid[1], y + moved[..., 1] * grid[0])


def bilinear(values: NDArray, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """``values`` [H, W, C] at fractional *array* positions (column x, row y), held at the border."""
    height, width = values.shape[:2]
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    j, i = np.minimum(x.astype(np.int64), max(width - 2, 0)), np.minimum(y.astype(np.int64), max(height - 2, 0))
    right, below = np.minimum(j + 1, width - 1), np.minimum(i + 1, height - 1)
    fx, fy = (x - j)[..., None], (y - i)[..., None]
    upper = values[i, j] * (1 - fx) + values[i, right] * fx
    lower = values[below, j] * (1 - fx) + values[below, right] * fx
    return upper * (1 - fy) + lower * fy


def _centres(size: Size) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y, each [H, W], of the pixel centres."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    return x, y


def _remap(x: NDArray[np.float64], y: NDArray[np.float64]) -> Remap:
    return Remap(np.stack([x, y], axis=-1).astype(np.float32))
