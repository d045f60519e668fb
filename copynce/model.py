"""A trained model in the hand: pictures in, descriptors and copies out.

model = copynce.load_model("default")
model.describe(["a.jpg", "b.jpg"]) @ model.describe([array]).T
model.compare("a.jpg", "b.jpg").probability
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from copynce.copies.calibration import Calibration
from copynce.errors import ConfigError, DataError
from copynce.files import file_sha256
from copynce.models import Descriptor, Matcher
from copynce.models.box import BACKGROUND, CALIBRATION, DESCRIPTOR, MATCHER, box_of
from copynce.models.checkpoints import load_descriptor, load_matcher, stored_config
from copynce.models.weight_files import file_of, read_weights
from copynce.retrieval.extract import WAY, Precision, Views, stream_descriptors
from dali_pipelines.sources import AnyPath, Content, pnm_bytes, to_rgb

if TYPE_CHECKING:
    from copynce.copies.pair import CopyPair

#: What can be described: a file, a picture of Pillow, or uint8 [H, W, 3] (RGB) or [H, W] (grey).
Picture = AnyPath | Image.Image | NDArray[np.uint8]


def load_model(name_or_path: str | os.PathLike[str], *, device: Literal["auto", "cpu", "gpu"] = "auto") -> Model:
    """The descriptor that a run, a checkpoint folder, a weights file or a released file holds; `default`: the model in
    the package, and a folder of its form: also its matcher, background and calibration.

    device: where it computes; auto: on the GPU where there is one. Raises DataError or RunError if there is no such
    file or it holds no descriptor, ConfigError for a device that is not there.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"device must be auto, cpu or gpu, got {device!r}")
    if device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("device is gpu, but torch sees none here; take cpu or auto")
    file = file_of(Path(name_or_path))
    gpu = device == "gpu" or (device == "auto" and torch.cuda.is_available())
    module = load_descriptor(file)
    found = Model(module, file, file_sha256(file), torch.device("cuda" if gpu else "cpu"))
    box = box_of(file.parent if file.name == DESCRIPTOR else Path(name_or_path))
    return found if box is None else _with_box(found, box)


def _with_box(model: Model, box: Path) -> Model:
    """The model with what else lies in its box."""
    matcher = load_matcher(box / MATCHER) if (box / MATCHER).is_file() else None
    background = None
    if (box / BACKGROUND).is_file():
        background = read_weights(box / BACKGROUND).tensors["descriptors"].numpy()
        if background.ndim != 2 or background.shape[1] != model.dim:
            raise DataError(f"{box / BACKGROUND} must hold descriptors [N, {model.dim}], got {list(background.shape)}")
    calibration = Calibration.load(box / CALIBRATION) if (box / CALIBRATION).is_file() else None
    return replace(
        model,
        matcher=matcher,
        background=background,
        calibration=calibration,
        one_pass=matcher is not None and _begins_with(model.module, matcher),
    )


def _begins_with(descriptor: Descriptor, matcher: Matcher) -> bool:
    """Whether the matcher's encoder is the beginning of the descriptor's."""
    mine, its = descriptor.encoder.state_dict(), matcher.encoder.state_dict()
    same = descriptor.img_size == matcher.img_size and its.keys() <= mine.keys()
    return same and all(torch.equal(tensor, mine[name]) for name, tensor in its.items())


@dataclass(frozen=True)
class Model:
    """A descriptor, the file it is from with the SHA-256 of its content, and where it computes.

    Of a box also: matcher; background: float32 [N, D], descriptors of pictures that nobody asks for; calibration: from
    what a pair shows to a probability; one_pass: whether the matcher's encoder is the descriptor's beginning.
    """

    module: Descriptor = field(repr=False)
    file: Path
    sha256: str
    device: torch.device
    matcher: Matcher | None = field(default=None, repr=False)
    background: NDArray[np.float32] | None = field(default=None, repr=False)
    calibration: Calibration | None = None
    one_pass: bool = False

    @property
    def dim(self) -> int:
        """Numbers of a descriptor, D."""
        return self.module.dim

    def calibrated(self) -> Calibration:
        """Its calibration. Raises DataError where it has none."""
        if self.calibration is None:
            raise DataError(
                f"{self.file} has no calibration, so its scores are no probabilities; take `default`, or make a box "
                "of this model: python -m scripts.make_box --help"
            )
        return self.calibration

    def compare(self, query: Picture, reference: Picture) -> CopyPair:
        """How likely one picture is a copy of the other, and where: polygons in pixels of both. See `describe` for what
        pictures can be.

        Raises DataError for a broken picture, or if the model has no calibration.

        >>> match = model.compare("a.jpg", "b.jpg")  # doctest: +SKIP
        >>> match.probability, match.score, match.query_region  # doctest: +SKIP
        """
        from copynce.copies.searching import compared

        self.calibrated()

        def broken(path: AnyPath, reason: str) -> None:
            raise DataError(f"{os.fspath(path)}: {reason}")

        pair = compared(self, _as_path(query, 0), _as_path(reference, 1), broken)
        assert pair is not None, "broken ones raise"
        return pair

    def card(self) -> dict[str, Any]:
        """What tells whether descriptors can be compared: the model's `sha256`, `config` and the `way` that pictures
        are prepared; and its `file` and `dim` for people. JSON can hold it."""
        config = json.loads(json.dumps(stored_config(self.module)))
        return {"sha256": self.sha256, "file": str(self.file.absolute()), "dim": self.dim, "way": WAY, "config": config}

    def describe(
        self,
        pictures: Sequence[Picture],
        *,
        batch_size: int = 64,
        precision: Precision = "auto",
        threads: int = 2,
        on_broken: Callable[[str, str], None] | None = None,
    ) -> NDArray[np.float32]:
        """The descriptors float32 [N, D] of N pictures, rows of length 1; their products are cosines.

        pictures: files, pictures of Pillow, or arrays uint8 [H, W, 3] (RGB) or [H, W] (grey), in any mixture. They are
        resized to the model's input as `copynce extract` does it; EXIF orientation is not applied. batch_size,
        precision, threads: as its settings. on_broken: told as on_broken(name, reason), in the order of `pictures`,
        of each that cannot be decoded, whose row is NaN; without it that is a DataError.
        Raises TypeError or ValueError, with its place, for what is no picture.

        >>> descriptors = model.describe(["a.jpg", Image.new("RGB", (640, 480))])  # doctest: +SKIP
        """
        if isinstance(pictures, str | bytes | os.PathLike | Image.Image):
            raise TypeError(f"pictures must be a list, got one {type(pictures).__name__}: put it into brackets")
        found = np.full((len(pictures), self.dim), np.nan, np.float32)
        if not len(pictures):
            return found
        paths = [_as_path(picture, place) for place, picture in enumerate(pictures)]
        broken: list[tuple[str, str]] = []
        batches = self.stream(
            paths,
            lambda path, reason: broken.append((os.fspath(path), reason)),
            batch_size=batch_size,
            precision=precision,
            threads=threads,
        )
        for places, descriptors, _ in batches:
            found[places] = descriptors
        place_of = {os.fspath(path): place for place, path in enumerate(paths)}
        for name, reason in sorted(broken, key=lambda told: place_of[told[0]]):  # several threads read
            if on_broken is None:
                raise DataError(f"{name}: {reason}")
            on_broken(name, reason)
        return found

    def stream(
        self,
        paths: Sequence[AnyPath],
        on_broken: Callable[[AnyPath, str], None],
        *,
        batch_size: int = 64,
        precision: Precision = "auto",
        threads: int = 2,
        views: Views | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], Precision]]:
        """(places in `paths` int64 [b], descriptors float32 [b, D], of `views` [b, V, D], fp32 or bf16) of one batch
        after the other; see :func:`copynce.retrieval.extract.stream_descriptors`."""
        return stream_descriptors(
            self.module,
            paths,
            on_broken,
            batch_size=batch_size,
            device=self.device,
            precision=precision,
            threads=threads,
            views=views,
            say=say,
        )


class _InMemory(Content):
    """A picture that is no file, under the name of its place."""

    def __init__(self, image: Image.Image, place: int) -> None:
        self._image, self._place = image, place

    def __fspath__(self) -> str:
        return f"picture {self._place}"

    def read_bytes(self) -> bytes:
        try:
            return pnm_bytes(to_rgb(self._image))
        except ValueError as error:  # pixels without a defined white
            raise OSError(str(error)) from error


def _as_path(picture: Picture, place: int) -> AnyPath:
    """A picture as the loader takes it."""
    if isinstance(picture, Image.Image):
        return _InMemory(picture, place)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise TypeError(f"picture {place} must be uint8, got {picture.dtype}")
        if not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)) or 0 in picture.shape:
            raise ValueError(f"picture {place} must be [H, W, 3] or [H, W], got {list(picture.shape)}")
        return _InMemory(Image.fromarray(picture), place)
    if isinstance(picture, str | os.PathLike):
        return picture
    raise TypeError(f"picture {place} must be a path, a picture of Pillow or an array, got {type(picture).__name__}")
