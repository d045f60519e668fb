"""Bitmaps as plain text, and how to draw words and strokes of a brush as such."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from copynce.pixtrace.compiled.drawing import draw_stroke

Bits = tuple[str, ...]  #: a bitmap: one text of 0 and 1 per row, so that programs stay plain and comparable


def text_bits(text: str) -> Bits:
    """``text`` in a 5 x 7 font (capitals, digits, a few marks; anything else is a block), as the bits of a stamp.

    >>> print("\\n".join(text_bits("HI")).replace("0", ".").replace("1", "#"))
    #...#.#####
    #...#...#..
    #...#...#..
    #####...#..
    #...#...#..
    #...#...#..
    #...#.#####
    """
    glyphs = [_GLYPHS.get(character, _BLOCK) for character in text.upper()]
    if not glyphs:
        raise ValueError("text must have at least one character, got ''")
    return tuple(map("0".join, zip(*glyphs, strict=True)))


def stroke_bits(points: tuple[tuple[float, float], ...], thickness: float, size: int = 64) -> Bits:
    """A line through (x, y) points of the unit square, ``thickness`` of the side wide, as size x size bits of a
    stamp."""
    if len(points) < 2 or size < 1:
        raise ValueError(f"a stroke needs at least 2 points and 1 pixel, got {len(points)} points, size {size}")
    drawn = np.zeros((size, size), np.uint8)
    draw_stroke(np.array(points, np.float64) * size, thickness * size / 2, drawn)
    return bits_of(drawn)


def bits_of(mask: NDArray) -> Bits:
    """The rows of a 2-D array as texts of 0 and 1 (1 where it is not 0)."""
    mask = np.asarray(mask)
    text = ((mask != 0) + np.uint8(ord("0"))).tobytes().decode("ascii")
    return tuple([text[i : i + mask.shape[1]] for i in range(0, mask.size, mask.shape[1])])


def mask_of(bits: Bits) -> NDArray[np.uint8]:
    """uint8 [H, W] of 0 and 1: the bits as an array."""
    text = np.frombuffer("".join(bits).encode("ascii"), np.uint8)
    return (text - ord("0")).reshape(len(bits), len(bits[0]))


# Five bits a row, the leftmost pixel first; a common 5 x 7 dot-matrix alphabet.
_FONT: dict[str, tuple[int, ...]] = {
    " ": (0, 0, 0, 0, 0, 0, 0),
    "!": (4, 4, 4, 4, 4, 0, 4),
    "'": (4, 4, 8, 0, 0, 0, 0),
    ",": (0, 0, 0, 0, 4, 4, 8),
    "-": (0, 0, 0, 31, 0, 0, 0),
    ".": (0, 0, 0, 0, 0, 12, 12),
    ":": (0, 12, 12, 0, 12, 12, 0),
    "?": (14, 17, 1, 2, 4, 0, 4),
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (31, 2, 4, 2, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
    "A": (14, 17, 17, 31, 17, 17, 17),
    "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 15),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (31, 4, 4, 4, 4, 4, 31),
    "J": (7, 2, 2, 2, 2, 18, 12),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17),
    "N": (17, 17, 25, 21, 19, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "Q": (14, 17, 17, 17, 21, 18, 13),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14),
    "V": (17, 17, 17, 17, 17, 10, 4),
    "W": (17, 17, 17, 21, 21, 21, 10),
    "X": (17, 17, 10, 4, 10, 17, 17),
    "Y": (17, 17, 17, 10, 4, 4, 4),
    "Z": (31, 1, 2, 4, 8, 16, 31),
}
#: The same as texts of 0 and 1, and what stands for a character that the font has not.
_GLYPHS: dict[str, Bits] = {name: tuple([f"{row:05b}" for row in rows]) for name, rows in _FONT.items()}
_BLOCK: Bits = ("11111",) * 7
