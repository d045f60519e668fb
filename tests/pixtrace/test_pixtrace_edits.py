"""Edits, programs and sampling: limits, JSON, determinism, policies."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from copynce.pixtrace import (
    POLICIES,
    Affine,
    Blur,
    Clahe,
    ColorJitter,
    ColorMatrix,
    Convolve,
    Crop,
    Edit,
    EditProgram,
    Equalize,
    Erase,
    Grayscale,
    HorizontalFlip,
    Jpeg,
    Lens,
    Matte,
    Median,
    Mesh,
    Noise,
    Overlay,
    Pad,
    PasteOnto,
    Perspective,
    Photometric,
    Pixelate,
    Policy,
    Rain,
    Relative,
    RelativeErase,
    RelativeMatte,
    RelativeOverlay,
    RelativePad,
    RelativePasteOnto,
    RelativeStamp,
    Remap,
    Resize,
    ResizedCrop,
    Rotation,
    Shift,
    ShufflePixels,
    Stamp,
    Stretch,
    Swirl,
    Tilt,
    ToneCurve,
    VerticalFlip,
    Wave,
    bits_of,
    mask_of,
    sample_program,
    stroke_bits,
    text_bits,
)
from copynce.pixtrace.edits import PHOTOMETRIC_ORDER

EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
SHAPES = ((0.4, 0.7), (0.3, 2.0))
EVERY_EDIT: tuple[Edit, ...] = (
    Crop(1, 2, 3, 4),
    Resize(5, 6),
    HorizontalFlip(),
    VerticalFlip(),
    Affine(((1.5, 0.1, 2.0), (0.0, 1.0, -3.0), (0.0, 0.0, 1.0))),
    Perspective(((1.0, 0.0, 2.0), (0.0, 1.0, 0.0), (0.001, 0.0, 1.0))),
    Pad(1, 2, 3, 4),
    PasteOnto(20, 30, 1, 2, 0.7, 0.25),
    Overlay(0, 1, 2, 3, 0.5, 0.75),
    Erase(0, 1, 2, 3, 99),
    Stamp(("10", "01"), 0, 1, 2, 3, (0.1, 0.2, 0.3), 0.9),
    Matte(("101", "010"), EYE, 7, 8, 0.9, 0.1),
    Remap(np.array([[[0.5, 0.25], [1.0, 2.0]]])),
    ColorJitter(0.5, 1.5, 0.7, -0.1),
    Grayscale(),
    Blur(1.25),
    Jpeg(20),
    ColorMatrix(((1.0, 0.0, 0.0, 0.1), (0.0, 0.5, 0.5, 0.0), (0.0, 0.0, -1.0, 1.0))),
    ToneCurve((0.0, 0.7, 1.0)),
    Equalize(),
    Clahe(),
    Convolve(((0.5, 0.25, 0.25),)),
    Median(5),
    Pixelate(0.4),
    ShufflePixels(),
    Noise(0.1, 0.2, 5),
    Rain(7, 5),
    ResizedCrop(SHAPES, 0.1, 0.9),
    Rotation(33.0, 5.0),
    Stretch(0.7, 1.2),
    Shift(0.1, -0.2),
    Tilt(((0.1, 0.2), (0.3, 0.1), (0.0, 0.2), (0.4, 0.0))),
    RelativePad(0.1, 0.2, 0.3, 0.4),
    RelativePasteOnto(SHAPES, 0.5, 0.6, 0.7, 0.8),
    RelativeOverlay(SHAPES, 0.5, 0.6, 0.7, 0.8),
    RelativeErase(SHAPES, 0.5, 0.6, 7),
    RelativeStamp(("1",), 0.2, 0.3, 0.4),
    RelativeMatte(("01", "10"), 0.5, 20.0, 0.4, 0.6),
    Swirl(0.2),
    Wave(0.01, 0.02),
    Lens(0.3),
    Mesh((((0.0, 0.0), (0.1, 0.0)), ((0.0, 0.1), (0.0, 0.0)))),
)


def test_json_round_trip_of_every_edit() -> None:
    program = EditProgram(EVERY_EDIT)
    again = EditProgram.from_json(program.to_json())
    assert again == program
    assert hash(again) == hash(program)
    assert again.to_json() == program.to_json()


def test_json_is_a_file_format() -> None:
    """Written by an earlier version, whose classes and parameters had other names; read, and written the same."""
    text = (
        '[{"edit": "ResizedCrop", "shapes": [[0.4, 0.7]], "x": 0.1, "y": 0.9, "aspect_limits": [0.33, 3.0]}, '
        '{"edit": "PadShare", "left": 0.1, "top": 0.2, "right": 0.3, "bottom": 0.4}, '
        '{"edit": "PasteShare", "shapes": [[0.4, 0.7]], "x": 0.5, "y": 0.6, "opacity": 0.7, "picture": 0.8}, '
        '{"edit": "OverlayShare", "shapes": [[0.4, 0.7]], "x": 0.5, "y": 0.6, "opacity": 0.7, "picture": 0.8}, '
        '{"edit": "StampShare", "bits": ["1"], "size": 0.2, "x": 0.3, "y": 0.4, "color": [0.0, 0.0, 0.0], '
        '"opacity": 1.0}, '
        '{"edit": "MatteShare", "mask": ["01", "10"], "scale": 0.5, "angle": 20.0, "x": 0.4, "y": 0.6, "opacity": 1.0, '
        '"picture": 0.25}, '
        '{"edit": "EraseShare", "shapes": [[0.4, 0.7]], "x": 0.5, "y": 0.6, "noise": 7}, '
        '{"edit": "PasteOnto", "canvas_height": 20, "canvas_width": 30, "top": 1, "left": 2, "opacity": 0.7, '
        '"picture": 0.25}, '
        '{"edit": "Overlay", "top": 0, "left": 1, "height": 2, "width": 3, "opacity": 0.5, "picture": 0.75}, '
        '{"edit": "Matte", "mask": ["101"], "matrix": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], '
        '"canvas_height": 7, "canvas_width": 8, "opacity": 0.9, "picture": 0.1}, '
        '{"edit": "Erase", "top": 0, "left": 1, "height": 2, "width": 3, "noise": 99}, '
        '{"edit": "Noise", "luma": 0.1, "chroma": 0.2, "noise": 5}, {"edit": "Rain", "slant": 7, "noise": 5}]'
    )
    program = EditProgram.from_json(text)
    assert program.to_json() == text
    assert RelativePad(0.1, 0.2, 0.3, 0.4) in program.edits
    assert RelativeErase(((0.4, 0.7),), 0.5, 0.6, noise_seed=7) in program.edits
    assert Overlay(0, 1, 2, 3, 0.5, picture_choice=0.75) in program.edits


@pytest.mark.parametrize("policy", POLICIES)
def test_json_round_trip_of_sampled_programs(policy: str) -> None:
    for k in range(100):
        program = sample_program(policy, seed=1, epoch=2, uuid=str(k))
        again = EditProgram.from_json(program.to_json())
        assert again == program
        assert (again.trace((60, 80), (32, 32)).index == program.trace((60, 80), (32, 32)).index).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a JSON list of edits, got text that is no JSON"),
        ('{"edit": "Crop"}', "a JSON list of edits, got a dict"),
        ('[{"edit": "Copr"}]', "each edit names one of .*'Crop'.* got {'edit': 'Copr'}"),
        ("[3]", "each edit names one of .* got 3"),
        ('[{"edit": "Geometry"}]', "each edit names one of"),
        ('[{"edit": "RelativePad"}]', "each edit names one of .*'PadShare'"),
        ('[{"edit": "Erase", "noise_seed": 1}]', r"Erase has the parameters \['height', 'left', 'noise', 'top'"),
        ('[{"edit": "Crop", "top": 1}]', "Crop cannot be made of {'top': 1}"),
        ('[{"edit": "Blur", "sgima": 1}]', r"Blur has the parameters \['sigma'\], got \['sgima'\]"),
        ('[{"edit": "Blur", "sigma": -1}]', r"Blur.sigma must be a number in \[0, 100\], got -1"),
        ('[{"edit": "Affine", "matrix": [[1, 0, 0], [0, 1, 0]]}]', "Affine.matrix must be 3x3 numbers"),
    ],
)
def test_json_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditProgram.from_json(text)


INVALID: list[tuple[Callable[[], object], str]] = [
    (lambda: Crop(-1, 0, 2, 2), r"Crop.top must be a whole number of pixels in \[0, .* got -1"),
    (lambda: Crop(0, 0, 0, 2), r"Crop.height must be a whole number of pixels in \[1, .* got 0"),
    (lambda: Crop(0, 0, 2.5, 2), "Crop.height must be a whole number .* got 2.5"),  # type: ignore[arg-type]
    (lambda: Resize(3, 0), "Resize.width must be"),
    (lambda: Resize(True, 3), "Resize.height must be .* got True"),
    (lambda: Pad(0, 0, -2, 0), "Pad.right must be"),
    (lambda: Affine(((1, 0, 0), (2, 0, 0), (0, 0, 1))), "Affine.matrix must be invertible, got the singular"),
    (lambda: Affine(((1, 0, math.nan), (0, 1, 0), (0, 0, 1))), "Affine.matrix must be finite"),
    (lambda: Affine(((1, 0, math.inf), (0, 1, 0), (0, 0, 1))), "Affine.matrix must be finite"),
    (lambda: Affine(((1, 0, 0), (0, 1, 0), (0.1, 0, 1))), r"Affine.matrix must be affine, with last row \(0, 0, 1\)"),
    (lambda: Perspective(((1, 0, 0), (0, 1, 0), (0, 0, 0))), "Perspective.matrix must be invertible"),
    (lambda: Perspective(np.eye(2)), "Perspective.matrix must be 3x3 numbers"),  # type: ignore[arg-type]
    (lambda: PasteOnto(0, 5, 0, 0), "PasteOnto.canvas_height must be"),
    (lambda: PasteOnto(5, 5, 0, 0, 1.5), r"PasteOnto.opacity must be a number in \[0, 1\], got 1.5"),
    (lambda: PasteOnto(5, 5, 0, 0, 0.5, 1.0), "PasteOnto.picture_choice must be"),
    (lambda: Overlay(0, 0, 2, 2, math.nan), "Overlay.opacity must be a number .* got nan"),
    (lambda: Erase(0, 0, 2, 2, -1), "Erase.noise_seed must be"),
    (lambda: Stamp((), 0, 0, 2, 2), "Stamp.bits must be rows of 0 and 1"),
    (lambda: Stamp(("01", "1"), 0, 0, 2, 2), "Stamp.bits must be rows of 0 and 1 of one length"),
    (lambda: Stamp(("0x",), 0, 0, 2, 2), "Stamp.bits must be rows of 0 and 1"),
    (lambda: Stamp(("1",), 0, 0, 2, 2, (2.0, 0.0, 0.0)), "Stamp.color must be red, green and blue in"),
    (lambda: Matte(np.zeros((2, 2, 3)), EYE, 5, 5), r"Matte.mask must be 2-D .* got shape \[2, 2, 3\]"),  # type: ignore[arg-type]
    (lambda: Remap(np.zeros((3, 4))), r"Remap.field must have the shape \[H, W, 2\].* got \[3, 4\]"),
    (lambda: Remap(np.full((3, 4, 2), np.nan)), r"Remap.field must be finite, got nan at \[0, 0, 0\]"),
    (lambda: Jpeg(0), "Jpeg.quality must be"),
    (lambda: ColorJitter(hue=0.6), "ColorJitter.hue must be"),
    (lambda: Tilt(((0, 0), (0, 0), (0, 0))), "Tilt.corners must be four"),
    (lambda: Mesh((((0, 0),),)), "Mesh.moves must be at least 2 x 2"),
    (lambda: Rotation(math.inf), "Rotation.angle must be"),
    (lambda: text_bits(""), "text must have at least one character"),
    (lambda: stroke_bits(((0.0, 0.0),), 0.1), "a stroke needs at least 2 points"),
    (lambda: Policy(crop=1.5), r"Policy.crop must be a number in \[0, 1\], got 1.5"),
    (lambda: Policy(crop_area=(0.5, 0.2)), r"Policy.crop_area must be \(low, high\)"),
    (lambda: Policy(text="always"), "Policy.text must be"),  # type: ignore[arg-type]
    (lambda: sample_program("phase3", seed=0, epoch=0, uuid=""), "policy must be one of .*'phase2'.* got 'phase3'"),
]


@pytest.mark.parametrize(("make", "message"), INVALID, ids=[message[:30] for _, message in INVALID])
def test_limits_are_checked_where_an_edit_is_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_programs_hold_edits_only() -> None:
    with pytest.raises(TypeError, match="edits must be edits of"):
        EditProgram(("flip",))  # type: ignore[arg-type]


def test_geometry_only() -> None:
    program = EditProgram(EVERY_EDIT).geometry_only()
    assert not any(isinstance(edit, Photometric) for edit in program.edits)
    assert all(getattr(edit, "opacity", 1.0) == 1.0 for edit in program.edits)
    assert len(program.edits) == len(EVERY_EDIT) - len(PHOTOMETRIC_ORDER)


def test_relative_edits_fit_any_picture() -> None:
    for height, width in ((1, 1), (1, 400), (333, 1), (37, 1001), (224, 224)):
        for edit in (edit for edit in EVERY_EDIT if isinstance(edit, Relative)):
            h, w = height, width
            for absolute in edit.absolute(height, width, (48, 64)):
                h, w = absolute.output_size(h, w)
            assert min(h, w) >= 1


def test_bits_and_masks_are_inverse() -> None:
    mask = np.random.default_rng(0).integers(0, 2, (5, 7))
    assert (mask_of(bits_of(mask)) == mask).all()
    assert {len(row) for row in text_bits("COPY 12?")} == {8 * 6 - 1}
    line = mask_of(stroke_bits(((0.1, 0.5), (0.9, 0.5)), 0.2, 40))
    assert line[20, 4:36].all()
    assert not line[:15].any()


# ------------------------------------------------------------------------------------------ sampling


def digest(policy: str) -> str:
    text = "".join(sample_program(policy, seed=7, epoch=k % 3, uuid=f"T{k}").to_json() for k in range(50))
    return hashlib.sha256(text.encode()).hexdigest()


def test_programs_are_equal_in_another_process() -> None:
    code = (
        "import hashlib; from copynce.pixtrace import sample_program as s;"
        "print(hashlib.sha256(''.join(s('matcher', seed=7, epoch=k % 3, uuid=f'T{k}').to_json() for k in range(50))"
        ".encode()).hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest("matcher")


def test_programs_depend_on_seed_epoch_and_uuid() -> None:
    programs = {
        sample_program("descriptor", seed=s, epoch=e, uuid=u) for s in (0, 1) for e in (0, 1) for u in ("a", "b")
    }
    assert len(programs) == 8


def rates(policy: Policy | str, count: int) -> dict[str, float]:
    found = Counter(
        name
        for k in range(count)
        for name in {type(edit).__name__ for edit in sample_program(policy, seed=0, epoch=0, uuid=str(k)).edits}
    )
    return {name: number / count for name, number in found.items()}


@pytest.mark.parametrize(
    ("policy", "crop", "warp", "pad", "jpeg", "edges"),
    [("descriptor", 0.3, 0.25, 0.15, 0.25, 0.25), ("matcher", 0.5, 0.35, 0.25, 0.35, 0.3)],
)
def test_rates_are_the_released_ones(
    policy: str, crop: float, warp: float, pad: float, jpeg: float, edges: float
) -> None:
    found = rates(policy, 4000)
    close = {"abs": 0.03}  # four standard deviations of the rarest
    assert found["RelativePasteOnto"] == pytest.approx(crop / 3, **close)
    assert found["RelativeOverlay"] == pytest.approx(crop / 3, **close)
    assert found["ResizedCrop"] == pytest.approx(crop / 3 * 2, **close)  # itself, and half of each of the two others
    assert found["HorizontalFlip"] == pytest.approx(0.5, **close)
    assert found["VerticalFlip"] == pytest.approx(0.1, **close)
    assert found["Tilt"] + found["Rotation"] == pytest.approx(warp, **close)
    assert found["RelativePad"] == pytest.approx(pad, **close)
    assert found["RelativeErase"] == pytest.approx(pad, **close)
    assert found["Jpeg"] == pytest.approx(jpeg, **close)
    assert found["ShufflePixels"] == pytest.approx(pad, **close)
    assert found["Pixelate"] == pytest.approx(pad * (1.0 - 0.22) / (2.2 - 0.22), **close)  # else it changes nothing
    assert found["Convolve"] == pytest.approx(edges + 0.15 / 12, **close)  # two of the 24 extra operations are kernels
    assert found["Median"] == pytest.approx(0.15 / 24, abs=0.005)
    assert found["Grayscale"] == pytest.approx(0.25, **close)
    assert found["ColorJitter"] == 1.0


def test_half_of_the_rotations_snap() -> None:
    angles = [
        edit.angle
        for k in range(6000)
        for edit in sample_program("matcher", seed=0, epoch=0, uuid=str(k)).edits
        if isinstance(edit, Rotation)
    ]
    assert np.mean([angle % 90 == 0 for angle in angles]) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("policy", POLICIES)
def test_named_policies_stay_with_what_can_be_drawn(policy: str) -> None:
    for k in range(200):
        view = sample_program(policy, seed=0, epoch=0, uuid=str(k)).composed((48, 64), (32, 32))
        assert sum(layer.color is None for layer in view.pictures()) <= 2


@pytest.mark.parametrize(
    ("name", "text", "rate"),
    [
        ("descriptor", "configured", 0.25),
        ("descriptor", "effective", 0.75),
        ("matcher", "configured", 0.35),
        ("matcher", "effective", 0.65),
    ],
)
def test_both_text_probabilities(name: str, text: str, rate: float) -> None:
    policy = dataclasses.replace(POLICIES[name], text=text, emoji=0.0, stroke=0.0)
    assert rates(policy, 1500)["RelativeStamp"] == pytest.approx(rate, abs=0.05)


@pytest.mark.parametrize(("name", "emoji", "stroke"), [("descriptor", 0.25, 0.25), ("matcher", 0.35, 0.3)])
def test_emoji_and_strokes_at_the_released_rates(name: str, emoji: float, stroke: float) -> None:
    for field, rate in (("emoji", emoji), ("stroke", stroke)):
        policy = dataclasses.replace(POLICIES[name], **{"text": "none", "emoji": 0.0, "stroke": 0.0, field: rate})
        assert getattr(POLICIES[name], field) == rate
        assert rates(policy, 800)["RelativeStamp"] == pytest.approx(rate, abs=0.06)


def test_the_optional_edits_are_sampled_too() -> None:
    policy = dataclasses.replace(POLICIES["matcher"], matte=0.5, remap=0.5, stretch=0.5)
    painted, mapped = set(), set()
    for k in range(30):
        program = sample_program(policy, seed=0, epoch=0, uuid=str(k))
        assert EditProgram.from_json(program.to_json()) == program
        view = program.composed((48, 64), (32, 32))
        painted.add(any(layer.color is not None for layer in view.pictures()))
        mapped.add(view.below is not None)
        assert program.trace((48, 64), (32, 32)).shape == (32, 32)
    assert painted == mapped == {True, False}


def test_extra_operations_are_drawn_evenly_and_in_the_executors_order() -> None:
    policy = Policy(extra=1.0)
    names = Counter[str]()
    for k in range(400):
        edits = [e for e in sample_program(policy, seed=0, epoch=0, uuid=str(k)).edits if isinstance(e, Photometric)]
        places = [PHOTOMETRIC_ORDER.index(type(edit)) for edit in edits]
        assert places == sorted(places)
        names.update({type(edit).__name__ for edit in edits})
    assert names["ColorMatrix"] / 400 == pytest.approx(10 / 24, abs=0.1)
    assert names["ToneCurve"] / 400 == pytest.approx(5 / 24, abs=0.08)
    assert {"Equalize", "Clahe", "Median", "Noise"} <= names.keys()
