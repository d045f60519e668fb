"""Composed views: blending weights and layers against a plain step-by-step rendering of flat colours."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest

import copynce.pixtrace.matrices as matrices
import copynce.pixtrace.view.pointwise as pointwise
from copynce.pixtrace import (
    Crop,
    Edit,
    EditProgram,
    Erase,
    HorizontalFlip,
    Layer,
    Matte,
    Overlay,
    Pad,
    PasteOnto,
    RelativeMatte,
    Remap,
    Resize,
    Rotation,
    Stamp,
    Swirl,
)
from copynce.pixtrace.edits import Geometry
from copynce.pixtrace.tables.stepwise import step

EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def rendered_weights(edits: tuple[Edit, ...], size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """float [pictures + 1, H, W]: each picture's weight in the colour, 0 to 1, the noise last, drawn edit by edit."""
    weights = [np.ones(size), np.zeros(size)]  # the source, the noise
    for edit in edits:
        for absolute in edit.absolute(*weights[0].shape, grid):
            index, _ = step(absolute, weights[0].shape)
            weights = [np.where(index < 0, 0.0, weight.reshape(-1)[index]) for weight in weights]
            if isinstance(absolute, (PasteOnto, Matte)):
                inside = index >= 0
                weights = [weight * absolute.opacity for weight in weights]
                weights.insert(-1, np.where(inside, 1.0 - absolute.opacity, 1.0))
            elif isinstance(absolute, (Overlay, Stamp, Erase)):
                covered = np.zeros(index.shape, bool)
                box = covered[
                    absolute.top : absolute.top + absolute.height, absolute.left : absolute.left + absolute.width
                ]
                if isinstance(absolute, Stamp):
                    rows = ((2 * np.arange(absolute.height) + 1) * len(absolute.bits)) // (2 * absolute.height)
                    columns = ((2 * np.arange(absolute.width) + 1) * len(absolute.bits[0])) // (2 * absolute.width)
                    box[:] = np.array([[absolute.bits[i][j] == "1" for j in columns] for i in rows])
                else:
                    box[:] = True
                opacity = 1.0 if isinstance(absolute, Erase) else absolute.opacity
                weights = [np.where(covered, weight * (1 - opacity), weight) for weight in weights]
                if isinstance(absolute, Erase):
                    weights[-1] = np.where(covered, 1.0, weights[-1])
                else:
                    weights.insert(-1, np.where(covered, opacity, 0.0))
    return np.stack(weights)


CHAINS: dict[str, tuple[Edit, ...]] = {
    "plain": (),
    "pad": (Pad(30, 10, 5, 20),),
    "paste": (PasteOnto(400, 500, 30, 40, 0.7),),
    "paste, turn, pad": (PasteOnto(400, 500, 30, 40, 0.7), Rotation(25.0), Pad(10, 20, 30, 40)),
    "overlay": (Overlay(20, 30, 150, 200, 0.4),),
    "two overlays": (Overlay(20, 30, 150, 200, 0.4), HorizontalFlip(), Overlay(60, 50, 150, 200, 1.0)),
    "overlay, then paste": (Overlay(20, 30, 150, 200, 0.3), PasteOnto(400, 600, 80, 120, 0.6), Crop(50, 60, 300, 400)),
    "erase under an overlay": (Erase(40, 40, 100, 100, 5), Overlay(80, 80, 100, 100, 0.4)),
    "turned, covered, erased": (Rotation(40.0), Overlay(10, 10, 200, 100), Erase(150, 50, 60, 200)),
    "stamp": (Rotation(15.0), Stamp(("110", "011"), 20, 40, 120, 180, (1.0, 0.0, 0.0), 0.8), Crop(5, 5, 250, 300)),
    "matte": (RelativeMatte(("0110", "1111", "1110"), 0.8, 20.0, 0.4, 0.5, 0.9), HorizontalFlip()),
    "paste, then matte": (
        PasteOnto(400, 500, 30, 40, 0.7),
        RelativeMatte(("0110", "1111", "1110"), 0.8, 20.0, 0.4, 0.5, 0.9),
    ),
    "stamp, then matte": (
        Stamp(("110", "011"), 20, 40, 120, 180, (1.0, 0.0, 0.0), 0.8),
        RelativeMatte(("0110", "1111", "1110"), 0.7, -30.0, 0.5, 0.6),
    ),
}


def unerased(edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
    return tuple(edit for edit in edits if not isinstance(edit, Erase))


@pytest.mark.parametrize("name", CHAINS)
def test_weights_equal_a_rendering_of_flat_colours(name: str) -> None:
    edits = (*CHAINS[name], Resize(112, 112))
    view = EditProgram(CHAINS[name]).composed((300, 400), (112, 112))
    expected = rendered_weights(unerased(edits), (300, 400), (112, 112))[:-1]
    erased = rendered_weights(edits, (300, 400), (112, 112))[-1] > 0.5
    weights, rest = np.split(view.blend(), [1 + len(view.layers)])
    assert weights.dtype == np.uint8
    assert weights.shape == (1 + len(view.layers), 112, 112)
    off = np.abs(weights / 255.0 - expected)
    assert (off < 0.01).mean() > 0.985  # all but the edges, which the rendering rounds to whole pixels at each step
    assert (weights.astype(int).sum(axis=0) <= 255 + len(weights)).all()
    assert ((view.erase_mask() == 1) == erased).mean() > 0.985
    assert view.erases() == erased.any()
    assert len(rest) == view.erases() + 3 * view.paints()
    np.testing.assert_array_equal(rest[0] if view.erases() else 0, view.erase_mask())
    flat = [(weights[k + 1], layer.color) for k, layer in enumerate(view.layers) if layer.color is not None]
    assert view.paints() == bool(flat)
    if flat:
        painted = rest[view.erases() :].reshape(112, 112, 3)
        summed = sum(np.floor(weight[..., None] * np.array(color) + 0.5) for weight, color in flat)
        np.testing.assert_array_equal(painted, np.minimum(summed, 255))


def test_layers_lie_where_they_were_laid() -> None:
    """A layer's matrix sends its unit square where the chain moved its box."""
    view = EditProgram(
        (Overlay(30, 40, 50, 60, picture_choice=0.5), HorizontalFlip(), Crop(10, 20, 100, 150))
    ).composed((200, 300), (100, 150))
    (layer,) = view.layers
    assert layer.picture_choice == 0.5
    corners = layer.matrix @ np.array([[0, 0, 1], [1, 1, 1]]).T
    assert pytest.approx(np.array([[300 - 40 - 20, 20], [300 - 100 - 20, 70]])) == corners[:2].T
    canvas = EditProgram((PasteOnto(400, 500, 10, 20, picture_choice=0.25), Resize(200, 100))).composed(
        (100, 100), (200, 100)
    )
    assert canvas.layers[0].matrix == pytest.approx(np.diag([100.0, 200.0, 1.0]))
    assert canvas.source.matrix == pytest.approx(np.array([[20.0, 0, 4.0], [0, 50.0, 5.0], [0, 0, 1]]))


def test_maps_are_the_products_of_the_edits_maps() -> None:
    """Those of layers lead back to the canvas of their birth first."""
    turn = Rotation(20.0).absolute(40, 50, (30, 30))[0]
    assert isinstance(turn, Geometry)
    view = EditProgram((Crop(1, 2, 40, 50), turn, Overlay(3, 4, 10, 12), Pad(1, 2, 3, 4), turn)).composed(
        (60, 70), (30, 30)
    )
    maps = [matrices.scaling(70.0, 60.0), matrices.translation(-2, -1), turn.forward(40, 50)]
    after = [matrices.translation(1, 2), turn.forward(46, 54), matrices.scaling(30 / 54, 30 / 46)]
    source = reduce(lambda a, b: matrices.multiply(b, a), maps + after)
    assert view.source.matrix.ravel() == pytest.approx(source, rel=1e-12, abs=1e-12)
    box = (12.0, 0.0, 4.0, 0.0, 10.0, 3.0, 0.0, 0.0, 1.0)
    layer = reduce(lambda a, b: matrices.multiply(b, a), [box, *after])
    assert view.layers[0].matrix.ravel() == pytest.approx(layer, abs=1e-9)


def test_extent_is_the_size_that_the_whole_picture_would_span() -> None:
    view = EditProgram((Crop(0, 0, 50, 100),)).composed((200, 400), (224, 224))
    assert view.source.extent() == pytest.approx((4 * 224, 4 * 224))
    turned = EditProgram((Rotation(90.0),)).composed((300, 300), (100, 100))
    assert turned.source.extent() == pytest.approx((100.0, 100.0))
    tilted = Layer(np.array([[10.0, 0, 0], [0, 10.0, 0], [0.5, 0, 1]]))
    assert tilted.extent()[1] > 8.0


def test_flags() -> None:
    assert EditProgram(()).composed((30, 40)).plain
    assert EditProgram((Resize(5, 5),)).composed((30, 40)).opaque
    assert not EditProgram((HorizontalFlip(),)).composed((30, 40)).plain
    assert EditProgram((HorizontalFlip(),)).composed((30, 40)).opaque
    assert not EditProgram((Pad(1, 0, 0, 0),)).composed((30, 40)).opaque
    assert EditProgram((Pad(5, 0, 0, 0), Crop(0, 5, 30, 40))).composed((30, 40)).opaque  # the pad was cropped away


def test_pictures_and_surfaces_of_a_dense_map() -> None:
    matte = Matte(("1" * 40,) * 30, EYE, 30, 40, picture_choice=0.75)
    view = EditProgram((matte, Swirl(0.1), Stamp(("1",), 0, 0, 5, 5, (0.0, 1.0, 0.0)))).composed((30, 40))
    assert view.below is not None
    assert [(layer.picture_choice, layer.color) for layer in view.pictures()] == [(0.75, None), (0.0, (0.0, 1.0, 0.0))]
    surfaces = view.surfaces()
    assert [surface.layer.picture_choice for surface in surfaces] == [0.0, 0.75, 0.0]
    u, v, weight = pointwise.pull(view, *pointwise.centres((224, 224)))
    np.testing.assert_array_equal(surfaces[0].weight, weight.round())
    np.testing.assert_allclose(surfaces[0].points[weight > 0], np.stack([u, v], axis=-1)[weight > 0], atol=1e-6)


@pytest.mark.parametrize("name", CHAINS)
def test_a_dense_map_that_moves_nothing_changes_no_weight(name: str) -> None:
    """The compiled way against the one point by point."""
    y, x = np.mgrid[:112, :112] + 0.5
    still = Remap(np.stack([x, y], axis=-1))
    edits = (*CHAINS[name], Resize(112, 112))
    plain, mapped = (EditProgram(e).composed((300, 400), (112, 112)) for e in (edits, (*edits, still)))
    slowly = np.stack([surface.weight for surface in mapped.surfaces()]).astype(int)
    assert np.abs(slowly - plain.blend()[: 1 + len(plain.layers)]).max() <= 1 + len(plain.covers)
    assert mapped.erases() == plain.erases()
    np.testing.assert_array_equal(plain.erase_mask(), mapped.erase_mask())
    # What the noise hides counts before it is erased, as without the edits that erase.
    kept = EditProgram(unerased(edits)).composed((300, 400), (112, 112))
    np.testing.assert_array_equal(plain.blend()[: 1 + len(plain.layers)], kept.blend()[: 1 + len(kept.layers)])


def test_photometric_edits_are_kept_once_and_in_order() -> None:
    from copynce.pixtrace import Blur, Grayscale

    view = EditProgram((Grayscale(), Swirl(0.1), Blur(2.0))).composed((30, 40))
    assert view.photometric == (Grayscale(), Blur(2.0))
    assert view.below is not None
    assert view.below[0].photometric == ()


def test_oracle_and_view_agree_on_the_weights(
    pull: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]], chain_of: Callable[..., tuple[Edit, ...]]
) -> None:
    rng = np.random.default_rng(11)
    for _ in range(20):
        edits = (*chain_of(rng, 5, (120, 90), 20), Resize(64, 48))
        view = EditProgram(edits).composed((120, 90), (64, 48))
        expected = pull(edits, (120, 90), (64, 48))[2]
        slowly = pointwise.pull(view, *pointwise.centres((64, 48)))[2] / 255.0
        assert (np.abs(expected - slowly) < 0.015).mean() > 0.998
        expected = pull(unerased(edits), (120, 90), (64, 48))[2]
        assert (np.abs(expected - view.blend()[0] / 255.0) < 0.015).mean() > 0.998
