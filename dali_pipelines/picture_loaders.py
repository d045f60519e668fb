"""The loaders of plain pictures and of their cuts, for evaluation, and programs rendered for people and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from copynce.pixtrace import EditProgram
from dali_pipelines.arena import Arena
from dali_pipelines.cuts import Cuts
from dali_pipelines.options import Device, LoaderOptions
from dali_pipelines.packing import Scene, View
from dali_pipelines.reading import Quarantine, Reader
from dali_pipelines.renderer import MOST_REPLICAS, Batch, Renderer
from dali_pipelines.sources import AnyPath, EncodedPicture

if TYPE_CHECKING:
    import torch


def render_programs(
    paths: Sequence[AnyPath],
    programs: Sequence[EditProgram],
    size: int = 224,
    device: Device = "cpu",
    pictures: Sequence[AnyPath] = (),
    *,
    threads: int = 2,
    batch_size: int = 32,
) -> np.ndarray:
    """The views of ``programs`` on the pictures ``paths``: uint8 [N, size, size, 3].

    ``pictures``: files from which ``picture_choice`` of PasteOnto, Matte and Overlay chooses. Erasing noise is clipped
    to 8 bits. Raises :class:`BrokenPicture` for a file that cannot be used, ``ValueError`` naming an edit that cannot
    be rendered.
    """
    if len(paths) != len(programs):
        raise ValueError(f"paths and programs must have one length, got {len(paths)} and {len(programs)}")
    options = LoaderOptions(size=size, batch_size=batch_size, device=device, threads=threads)
    quarantine = Quarantine(None)
    reader = Reader(pictures, quarantine, options)

    def prepare(at: range) -> Batch[range]:
        scenes: list[Scene] = []
        files: list[tuple[AnyPath, EncodedPicture]] = []
        for i in at:
            picture = reader.read(paths[i])
            composed = programs[i].composed(picture.shape, (size, size))
            layers = reader.layers(composed)
            scenes.append(Scene((picture,), (View(composed, 0, tuple(p for _, p in layers)),)))
            files += [(paths[i], picture), *layers]
        return Batch(scenes, files, at)

    renderer: Renderer[range, range] = Renderer(prepare, quarantine, options, views=1, normalized=False)
    rendered = np.empty((len(paths), size, size, 3), np.uint8)
    try:
        for at, (pixels,) in renderer.stream(_chunks(len(paths), batch_size)):
            rendered[at.start : at.stop] = pixels.cpu().numpy()
    finally:
        reader.close()
    return rendered


class _EvaluationLoader:
    """What the evaluation loaders share: files in chunks of ``batch_size``, broken ones left out and told."""

    _renderer: Renderer[range, np.ndarray]

    def __init__(
        self, paths: Sequence[AnyPath], options: LoaderOptions, on_broken: Callable[[AnyPath, str], None]
    ) -> None:
        self._paths = paths
        self._options = options
        self._quarantine = Quarantine(on_broken)

    def __len__(self) -> int:
        """Batches at most; fewer if all pictures of one are broken."""
        return -(-len(self._paths) // self._options.batch_size)

    def _stream(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(indices int64 [b], what the graph gives for these pictures) of every chunk."""
        import torch

        self._reader = Reader((), self._quarantine, self._options)
        try:
            for indices, (pictures,) in self._renderer.stream(_chunks(len(self._paths), self._options.batch_size)):
                yield torch.from_numpy(indices), pictures
        finally:
            self._reader.close()

    def _prepare(self, chunk: range) -> Batch[np.ndarray] | None:
        found = self._reader.try_all([self._paths[i] for i in chunk])
        good = [(i, picture) for i, picture in zip(chunk, found, strict=True) if isinstance(picture, EncodedPicture)]
        if not good:
            return None
        scenes = [Scene((picture,), self._views(picture)) for _, picture in good]
        files = [(self._paths[i], picture) for i, picture in good]
        return Batch(scenes, files, np.array([i for i, _ in good], np.int64))

    def _views(self, picture: EncodedPicture) -> tuple[View, ...]:
        """The views that the graph renders of a picture."""
        return ()


class PictureLoader(_EvaluationLoader):
    """Iterates evaluation batches: (indices int64 [b], pictures [b, 3, S, S]), as torch tensors.

    Each picture is resized to S x S ignoring its aspect ratio, bicubic and antialiased, to the bit as Pillow does it on
    the CPU backend; EXIF orientation is not applied (PROTOCOLS 2). A broken file is left out and told to
    ``on_broken(path, reason)``; the indices say which pictures came.
    """

    def __init__(
        self, paths: Sequence[AnyPath], options: LoaderOptions, *, on_broken: Callable[[AnyPath, str], None]
    ) -> None:
        super().__init__(paths, options, on_broken)
        self._grid = (options.size, options.size)
        self._renderer = Renderer(self._prepare, self._quarantine, options, views=1, replicas=MOST_REPLICAS)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._stream()

    def _views(self, picture: EncodedPicture) -> tuple[View, ...]:
        return (View(EditProgram().composed(picture.shape, self._grid)),)


class CropLoader(_EvaluationLoader):
    """Iterates (indices int64 [b], views [b, V, 3, S, S]): views of each picture, cut from one decode.

    ``cuts(width, height)`` gives the V views of a picture of that size, as many for every picture; a sequence has such
    a function for each path. Each view is resized to S x S as by :class:`PictureLoader`, boxes to the bit as ``crop``
    and ``resize`` of Pillow would. Runs on the CPU only; broken files are told as there.
    """

    def __init__(
        self,
        paths: Sequence[AnyPath],
        cuts: Cuts | Sequence[Cuts],
        options: LoaderOptions,
        *,
        on_broken: Callable[[AnyPath, str], None],
    ) -> None:
        if options.device != "cpu":
            raise ValueError(f"crops are cut on the CPU: device must be 'cpu', got {options.device!r}")
        if not callable(cuts) and len(cuts) != len(paths):
            raise ValueError(f"cuts must be one function, or one for each of {len(paths)} paths, got {len(cuts)}")
        super().__init__(paths, options, on_broken)
        # One replica: its graph has two operators, and its batches are large.
        self._renderer = _Cutter(self._prepare, self._quarantine, options, views=1, cuts=cuts)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for indices, tall in self._stream():  # tall [b, 3, V * S, S]
            yield indices, tall.unflatten(2, (-1, self._options.size)).transpose(1, 2)


@dataclass(kw_only=True)
class _Cutter(Renderer[range, np.ndarray]):
    """Scenes without views, cut by ``cuts``."""

    cuts: Cuts | Sequence[Cuts]

    def arrays(self, batch: Batch[np.ndarray], arena: Arena) -> list[object]:
        size = self.options.size
        pictures = [scene.pictures[0] for scene in batch.scenes]
        rows = []
        for i, (height, width) in zip(batch.payload.tolist(), (picture.shape for picture in pictures), strict=True):
            cuts = self.cuts if callable(self.cuts) else self.cuts[i]
            rows.append(np.array([cut.row(height, width) for cut in cuts(width, height)], np.float64))
            if rows[-1].shape != rows[0].shape or not len(rows[0]):
                raise ValueError(f"cuts must give as many views for every picture, got {len(rows[-1])}, {len(rows[0])}")
        like = np.zeros((len(rows[0]) * size, size, 0), np.uint8)
        return [[picture.data for picture in pictures], rows, [like] * len(rows)]

    def build(self, source: Callable[[], list[object]], threads: int) -> Any:
        from dali_pipelines.graph import build_cutter

        return build_cutter(source, batch_size=self.options.batch_size, threads=threads)


def _chunks(count: int, size: int) -> list[range]:
    """The numbers below ``count``, ``size`` at a time."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
