"""Pixels that agree, and those of look-alikes, against the plain way with Pillow and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from copynce.copies import pixels
from copynce.copies.geometry import centres, transformed
from copynce.copies.pixels import LEVELS, SIDE, agreeing, pixel_agreement
from copynce.copies.polygons import contains, mapped, overlap, rectangle
from copynce.copies.regions import CopiedRegion
from copynce.data.synthetic import make_picture

WHOLE = rectangle(1, 1)


def picture(seed: int, side: int = 3 * SIDE) -> Image.Image:
    rng = np.random.default_rng(seed)
    grain = Image.fromarray(rng.integers(0, 255, (side // 6, side // 6), np.uint8)).resize((side, side), Image.BICUBIC)
    return Image.blend(make_picture(rng, (side, side)).convert("L"), grain, 0.4)


def square(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image.resize((SIDE, SIDE), Image.BILINEAR), np.float32)


def seen_through(image: Image.Image, geometry: NDArray[np.float64]) -> Image.Image:
    """The query whose points `geometry` takes to those of the picture, in unit squares."""
    side = image.width
    to_pixels = np.diag([side, side, 1.0])
    matrix = to_pixels @ geometry @ np.linalg.inv(to_pixels)
    numbers = (matrix / matrix[2, 2]).ravel()[:8].tolist()
    return image.transform(image.size, Image.Transform.PERSPECTIVE, numbers, Image.Resampling.BICUBIC)


GEOMETRIES = {
    "itself": np.eye(3),
    "crop": np.array([[0.6, 0, 0.2], [0, 0.7, 0.1], [0, 0, 1.0]]),
    "laid small": np.array([[1.8, 0, -0.3], [0, 1.6, -0.4], [0, 0, 1.0]]),
    "mirrored": np.array([[-0.9, 0, 0.95], [0, 0.9, 0.05], [0, 0, 1.0]]),
    "a quarter turn": np.array([[0, 1.0, 0], [-1.0, 0, 1.0], [0, 0, 1.0]]),
    "perspective": np.array([[0.8, 0.05, 0.1], [0.02, 0.75, 0.12], [0.1, -0.08, 1.0]]),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("off", [0.0, 0.03])
def test_a_copy_agrees_and_its_geometry_is_found(name: str, off: float) -> None:
    true = GEOMETRIES[name]
    original = picture(5)
    query = seen_through(original, true)
    edited = query.filter(ImageFilter.GaussianBlur(2)).point(lambda grey: 0.6 * grey + 50)
    told = true @ np.array([[1 - off, 0, off], [off / 2, 1 + off / 2, -off], [0, 0, 1.0]])
    region = rectangle(0.5, 0.5, 0.25, 0.25)
    found = pixel_agreement(square(edited), square(original), told, region)
    assert found.coarse > 0.9
    assert found.fine > 0.85
    assert found.blocks > 12
    error = np.abs(mapped(found.geometry, region) - mapped(true, region)).max()
    assert error < 0.006, f"a pixel of 224 is .0045; {error:.4f} with the told geometry {off} off"


def test_another_picture_does_not_agree() -> None:
    worst = 0.0
    for seed in range(4):
        found = pixel_agreement(square(picture(seed)), square(picture(seed + 10)), np.eye(3), WHOLE)
        worst = max(worst, found.fine)
        assert found.blocks > 100
    assert worst < 0.4


def test_query_and_reference_may_change_sides() -> None:
    original, true = picture(5), GEOMETRIES["crop"]
    query, there = square(seen_through(original, true)), mapped(true, WHOLE)
    forth = pixel_agreement(query, square(original), true, WHOLE)
    back = pixel_agreement(square(original), query, np.linalg.inv(true), there)
    assert (back.coarse, back.fine) == pytest.approx((forth.coarse, forth.fine), abs=0.02)
    np.testing.assert_allclose(mapped(back.geometry, mapped(forth.geometry, WHOLE)), WHOLE, atol=0.01)


def test_what_is_drawn_upon_costs_its_blocks_alone() -> None:
    original = picture(6)
    drawn = original.copy()
    drawn.paste(picture(9).crop((0, 0, SIDE, SIDE)), (SIDE, SIDE))  # a ninth of it
    found = pixel_agreement(square(drawn), square(original), np.eye(3), WHOLE)
    assert 0.75 < found.fine < 0.95


@pytest.mark.parametrize(
    "region",
    [np.empty((0, 2)), WHOLE[:2], rectangle(0.01, 0.01), rectangle(1, 1, 3, 3)],
    ids=["none", "two corners", "less than a block", "outside"],
)
def test_nothing_to_compare(region: NDArray[np.float64]) -> None:
    same = square(picture(1))
    found = pixel_agreement(same, same, np.eye(3), region)
    assert (found.coarse, found.fine, found.blocks) == (0, 0, 0)
    assert np.array_equal(found.geometry, np.eye(3))


@pytest.mark.parametrize(
    "geometry",
    [np.zeros((3, 3)), np.diag([1e-9, 1, 1]), np.full((3, 3), np.nan), np.array([[1.0, 0, 0], [0, 1, 0], [-2, 0, 1]])],
    ids=["none", "a line", "no number", "a horizon through it"],
)
def test_a_geometry_that_is_none(geometry: NDArray[np.float64]) -> None:
    same = square(picture(1))
    found = pixel_agreement(same, same, geometry, WHOLE)
    assert np.isfinite([found.coarse, found.fine]).all()


def test_flat_pictures_tell_nothing() -> None:
    flat = np.full((SIDE, SIDE), 90, np.uint8)
    assert pixel_agreement(flat, flat, np.eye(3), WHOLE).blocks == 0
    assert pixel_agreement(square(picture(1)), flat, np.eye(3), WHOLE).fine < 0.05


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"must be \[224, 224\], got \[224, 224\] and \[112, 112\]"):
        pixel_agreement(np.zeros((SIDE, SIDE)), np.zeros((112, 112)), np.eye(3), WHOLE)


def test_a_region_takes_the_geometry_of_pixels_that_agree() -> None:
    original, true = picture(5), GEOMETRIES["crop"]
    query, size, other = square(seen_through(original, true)), (300, 200), (400, 500)
    off = true @ np.array([[0.98, 0, 0.03], [0, 1.02, -0.02], [0, 0, 1.0]])

    def region(geometry: NDArray[np.float64]) -> CopiedRegion:
        pixels = np.diag([*other, 1.0]) @ geometry @ np.linalg.inv(np.diag([*size, 1.0]))
        corners = rectangle(*size)
        return CopiedRegion("found", corners, mapped(pixels, corners), pixels, 1.0, 0.4, 90.0, 0.9, 30, 28)

    told, wanted = region(off), region(true)
    pixels, found = agreeing(query, square(original), told, size, other)
    assert pixels.coarse > 0.9
    assert np.array_equal(found.query, told.query)
    assert overlap(found.reference, wanted.reference) > 0.98 > overlap(told.reference, wanted.reference)
    assert found.reference_share == pytest.approx(0.42, abs=0.005)
    np.testing.assert_allclose(mapped(found.geometry, found.query), wanted.reference, atol=3)
    pixels, kept = agreeing(query, square(picture(8)), told, size, other)
    assert pixels.coarse < 0.6
    assert kept is told


@pytest.mark.parametrize("turn", [1, -1])
def test_pixels_inside_are_those_that_the_polygon_contains(turn: int) -> None:
    corners = np.array([[0.1, 0.2], [0.9, -0.1], [1.2, 0.6], [0.4, 0.95]])[::turn].copy()
    expected = contains(corners, centres(56)).reshape(56, 56)
    assert 0.3 < expected.mean() < 0.9
    assert np.array_equal(pixels._inside(corners, 56), expected)
    assert pixels._inside(WHOLE, 4).all()


@pytest.mark.parametrize("samples", [1, 3])
def test_warping_is_the_plain_way(samples: int) -> None:
    rng = np.random.default_rng(samples)
    image = rng.uniform(0, 255, (20, 20)).astype(np.float32)
    geometry = np.array([[1.1, 0.2, -0.2], [-0.1, 0.9, 0.1], [0.2, 0.1, 1.0]])
    warped, seen = pixels._warped(image, geometry, samples, 0, 20, 0, 20)
    at = (np.arange(20) + 0.5) / 20
    fine = (np.arange(20 * samples) + 0.5) / (20 * samples)

    def sampled(axis: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        places = transformed(geometry[None], np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))[0]
        x, y = np.clip(places * 20 - 0.5, 0, 19).T
        left, top = np.minimum(x.astype(int), 18), np.minimum(y.astype(int), 18)
        px, py = x - left, y - top
        rows = [(1 - px) * image[top + i, left] + px * image[top + i, left + 1] for i in (0, 1)]
        return (1 - py) * rows[0] + py * rows[1], ((places >= 0) & (places <= 1)).all(1)

    inside = sampled(at)[1].reshape(20, 20)
    expected = sampled(fine)[0].reshape(20, samples, 20, samples).mean((1, 3))
    assert np.array_equal(seen, inside)
    np.testing.assert_allclose(warped, np.where(inside, expected, 0), atol=1e-3)
    part, known = pixels._warped(image, geometry, samples, 3, 15, 6, 20)
    window = np.zeros((20, 20), bool)
    window[3:15, 6:20] = True
    assert np.array_equal(part, np.where(window, warped, 0))
    assert np.array_equal(known, seen & window)


@pytest.mark.parametrize("seed", range(3))
def test_a_window_holds_all_that_the_blocks_of_a_region_ask_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    region = rectangle(*rng.uniform(0.1, 0.5, 2), *rng.uniform(-0.1, 0.6, 2))
    for level in LEVELS:
        inside = pixels._inside(region, level.side)
        for reach in level.reaches:
            top, bottom, left, right = pixels._window(region, level.side, reach)
            coarse = square(picture(seed)).reshape(level.side, SIDE // level.side, level.side, -1).mean((1, 3))
            warped = np.roll(coarse, (2, -1), (0, 1))
            kept = np.zeros_like(warped)
            kept[top:bottom, left:right] = warped[top:bottom, left:right]
            found, every = (pixels._compared(coarse, one, inside, reach, level.stride) for one in (kept, warped))
            np.testing.assert_allclose(found, every, atol=1e-4)


@pytest.mark.parametrize("used", [6, 8])
def test_moves_of_blocks_are_fitted_as_by_least_squares(used: int) -> None:
    rng = np.random.default_rng(used)
    true = np.array([[1.02, 0.01, 0.01], [-0.02, 0.97, -0.01], [0.03, -0.02, 1.0]])
    if used == 6:
        true[2, :2] = 0
    places = rng.uniform(10, 46, (30, 2))
    moves = mapped(true, places / 56 - 0.5) * 56 + 28 - places
    moves[:3] += 5  # outliers
    blocks = np.column_stack([places, moves, rng.uniform(0.2, 1, 30)])
    middle = np.array([0.5, 0.5])
    found = pixels._move(blocks, middle, 56, used)

    at, there = places / 56 - middle, (places + moves) / 56 - middle
    rows, wanted = [], []
    for (x, y), (u, v) in zip(at, there, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -x * u, -y * u][:used], [0, 0, 0, x, y, 1, -x * v, -y * v][:used]]
        wanted += [u - x, v - y]
    columns, moved = np.array(rows), np.array(wanted)
    sure = np.maximum(blocks[:, 4] - 0.3, 0) ** 2 + 1e-6
    weight = sure.copy()
    for _ in range(5):
        root = np.sqrt(np.repeat(weight, 2))[:, None]
        stiff = np.diag(np.sqrt(pixels._STIFF[:used] * weight.sum()))
        h = np.linalg.lstsq(
            np.concatenate([columns * root, stiff]), np.concatenate([moved * root[:, 0], np.zeros(used)])
        )[0]
        off = np.abs(columns @ h - moved).reshape(-1, 2).max(1) * 56
        weight = sure / np.maximum(off, 1)
    h = np.append(h, np.zeros(8 - used))
    fitted = np.array([[1 + h[0], h[1], h[2]], [h[3], 1 + h[4], h[5]], [h[6], h[7], 1]])
    to_middle = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1.0]])
    np.testing.assert_allclose(found, np.linalg.inv(to_middle) @ fitted @ to_middle, atol=1e-9)
    inner = np.array([[0.3, 0.4], [0.6, 0.7]])
    np.testing.assert_allclose(
        mapped(found, inner), mapped(np.linalg.inv(to_middle) @ true @ to_middle, inner), atol=0.02
    )


@pytest.mark.parametrize(("side", "stride", "reach"), [(56, 4, 3), (40, 16, 1), (16, 8, 2)])
def test_blocks_are_compared_as_correlations_are(side: int, stride: int, reach: int) -> None:
    rng = np.random.default_rng(side)
    coarse = np.asarray(picture(3, 168).resize((side, side)), np.float32)
    coarse[: side // 2, : side // 2] = 128  # without structure
    warped = np.roll(coarse, (1, -1), (0, 1)) + rng.normal(0, 3, (side, side)).astype(np.float32)
    usable = rng.random((side, side)) < 0.97
    found = pixels._compared(coarse, warped, usable, reach, stride)
    rows = []
    padded = np.pad(warped.astype(np.float64), reach, mode="edge")
    for top in range(0, side - 15, stride):
        for left in range(0, side - 15, stride):
            here = np.s_[top : top + 16, left : left + 16]
            block = coarse[here].astype(np.float64)
            if usable[here].sum() < 0.9 * 256 or block.std() <= 6:
                continue
            best = (-2.0, 0, 0)
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    other = padded[top + dy + reach : top + dy + reach + 16, left + dx + reach : left + dx + reach + 16]
                    product = ((block - block.mean()) * (other - other.mean())).mean()
                    best = max(best, (product / (block.std() * max(other.std(), 2)), dx, dy), key=lambda one: one[0])
            rows.append((left + 8, top + 8, best[1], best[2], best[0]))
    assert len(rows) > 0
    np.testing.assert_allclose(found, np.array(rows, np.float64), atol=1e-4)
