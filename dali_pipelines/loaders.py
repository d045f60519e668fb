"""The loaders: pairs for training, plain pictures for evaluation, and programs rendered for people and tests."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from copynce.pixtrace import ComposedView, EditProgram, Layer, trace_pairs
from copynce.pixtrace.view.composed_view import Empty
from dali_pipelines.batch import PairBatch
from dali_pipelines.renderer import MOST_LANES, Batch, Renderer
from dali_pipelines.rooms import Room
from dali_pipelines.sources import MAX_PIXELS, AnyPath, Broken, BrokenPicture, EncodedPicture, read_picture
from dali_pipelines.views import Cut, Scene, View, feed
from dali_pipelines.workers import Workers, require_guard

if TYPE_CHECKING:
    import torch

#: ImageNet statistics on the [0, 1] scale (PROTOCOLS 2).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: Substitutes tried for one broken pair before giving up.
_MAX_SUBSTITUTES = 100


@dataclass(frozen=True)
class Pair:
    """Two views. ``positive``: whether the query's picture is a copy of the reference's.

    ``traced``: whether the programs tell which pixels are copied: of a positive pair whose views show one file, and of
    a negative pair, where none is. A copy that somebody else made is positive but not traced.
    """

    query_path: AnyPath
    query_program: EditProgram
    reference_path: AnyPath
    reference_program: EditProgram
    positive: bool
    uuid: str
    traced: bool = True

    def __post_init__(self) -> None:
        if self.positive and self.traced and os.fspath(self.query_path) != os.fspath(self.reference_path):
            raise ValueError(
                "the views of a traced positive pair must show one picture, "
                f"got {os.fspath(self.query_path)} and {os.fspath(self.reference_path)}"
            )


class _Reader:
    """Reads files for a loader; remembers broken ones, chooses the other pictures of layers."""

    def __init__(
        self, pictures: Sequence[AnyPath], broken: Broken, max_pixels: int, threads: int, apply_exif: bool = False
    ) -> None:
        self._pictures = pictures
        self._broken = broken
        self._max_pixels = max_pixels
        self._apply_exif = apply_exif
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dali_pipelines reader")

    def read(self, path: AnyPath) -> EncodedPicture:
        """Raises :class:`BrokenPicture`, also for a file that failed before."""
        if path in self._broken:
            raise BrokenPicture(path, self._broken.reasons[os.fspath(path)])
        try:
            return read_picture(path, max_pixels=self._max_pixels, apply_exif=self._apply_exif)
        except BrokenPicture as error:
            self._broken.add(error)
            raise

    def try_all(self, paths: Iterable[AnyPath]) -> list[EncodedPicture | BrokenPicture]:
        """Read files side by side; the order of the result is that of ``paths``."""
        return list(self._pool.map(self._try, paths))

    def layers(self, plan: ComposedView) -> list[tuple[AnyPath, EncodedPicture]]:
        """The other pictures of a plan; a broken one is replaced by the next of the list."""
        return [self._layer(layer) for layer in plan.pictures() if layer.color is None]

    def _try(self, path: AnyPath) -> EncodedPicture | BrokenPicture:
        try:
            return self.read(path)
        except BrokenPicture as error:
            return error

    def _layer(self, layer: Layer) -> tuple[AnyPath, EncodedPicture]:
        count = len(self._pictures)
        if count == 0:
            raise ValueError("the program shows another picture, but pictures is empty")
        first = int(layer.picture_choice * count)
        for step in range(count):
            path = self._pictures[(first + step) % count]
            found = self._try(path)
            if isinstance(found, EncodedPicture):
                return path, found
        raise ValueError(f"none of the {count} pictures can be read; the last one: {found}")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def render_programs(
    paths: Sequence[AnyPath],
    programs: Sequence[EditProgram],
    size: int = 224,
    device: str = "cpu",
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
    broken = Broken(None)
    reader = _Reader(pictures, broken, MAX_PIXELS, threads)

    def prepare(at: range) -> Batch[None]:
        scenes: list[Scene] = []
        files: list[tuple[AnyPath, EncodedPicture]] = []
        for i in at:
            picture = reader.read(paths[i])
            plan = programs[i].composed(picture.shape, (size, size))
            layers = reader.layers(plan)
            scenes.append(Scene((picture,), (View(plan, 0, tuple(p for _, p in layers)),)))
            files += [(paths[i], picture), *layers]
        return Batch(scenes, files, None)

    renderer: Renderer[range, None] = Renderer(
        prepare, broken, views=1, size=size, batch_size=batch_size, device=device, threads=threads
    )
    rendered = np.empty((len(paths), size, size, 3), np.uint8)
    handover = _Handover("uint8")
    chunks = [range(i, min(i + batch_size, len(paths))) for i in range(0, len(paths), batch_size)]
    try:
        for chunk, (_, outputs) in zip(chunks, renderer.stream(chunks), strict=True):
            rendered[chunk.start : chunk.stop] = handover.tensors(outputs)[0].cpu().numpy()
    finally:
        reader.close()
    return rendered


@dataclass
class PairPreparation:
    """Prepares batches of pairs, in the loader's process or in a worker; what :meth:`start` makes stays where it is."""

    batches: Any  # a sequence of batches, or (never in a worker) an iterable of them
    pictures: Sequence[AnyPath]
    size: int
    substitute: Callable[[Pair, int], Pair]
    max_pixels: int
    threads: int
    apply_exif: bool

    def start(self, report: Callable[[AnyPath, str], None]) -> None:
        self.broken = Broken(report)
        self.reader = _Reader(self.pictures, self.broken, self.max_pixels, self.threads, self.apply_exif)

    def leave_out(self, broken: dict[str, str]) -> None:
        for path, reason in broken.items():
            self.broken.reasons.setdefault(path, reason)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def batch(self, index: int, empty: Empty) -> tuple[Batch[dict[str, Any]], list[object]] | None:
        prepared = self.prepare(self.batches[index], empty)
        if prepared is None:
            return None
        return dataclasses.replace(prepared, scenes=()), feed(prepared.scenes, self.size, empty)

    def prepare(self, pairs: Sequence[Pair], empty: Empty = np.empty) -> Batch[dict[str, Any]] | None:
        """The scenes of a batch and, as its payload, the rest of what PairLoader gives; ``empty`` for the tables."""
        if not pairs:
            return None
        shape = (len(pairs), self.size, self.size)
        scenes, files, shown, plans = [], [], [], []
        for wanted, found in zip(pairs, self.reader.try_all([p.query_path for p in pairs]), strict=True):
            pair, picture, other = self._readable(wanted, found)
            query = pair.query_program.composed(picture.shape, shape[1:])
            reference = pair.reference_program.composed(other.shape, shape[1:])
            query_layers, reference_layers = self.reader.layers(query), self.reader.layers(reference)
            pictures = (picture,) if other is picture else (picture, other)
            views = (
                View(query, 0, tuple(p for _, p in query_layers)),
                View(reference, len(pictures) - 1, tuple(p for _, p in reference_layers)),
            )
            scenes.append(Scene(pictures, views))
            files += [(pair.query_path, picture), (pair.reference_path, other), *query_layers, *reference_layers]
            plans.append((query, reference) if pair.positive and pair.traced else None)
            shown.append(pair)
        tables = empty(shape, np.int32), empty(shape, np.int32)
        trace_pairs(plans, shape[1:], *tables)
        payload = {
            "query_to_reference": tables[0],
            "reference_to_query": tables[1],
            "positive": np.array([pair.positive for pair in shown]),
            "traced": np.array([pair.traced for pair in shown]),
            "uuids": [pair.uuid for pair in shown],
        }
        return Batch(scenes, files, payload)

    def _readable(
        self, wanted: Pair, found: EncodedPicture | BrokenPicture
    ) -> tuple[Pair, EncodedPicture, EncodedPicture]:
        """The pair or its first substitute whose files can both be read, and these two (one object if one file).

        ``found`` is what reading the pair's query file gave.
        """
        pair = wanted
        for attempt in range(_MAX_SUBSTITUTES + 1):
            if attempt > 0:
                pair = self.substitute(wanted, attempt)
                (found,) = self.reader.try_all([pair.query_path])
            other = found
            if pair.reference_path != pair.query_path and not isinstance(found, BrokenPicture):
                (other,) = self.reader.try_all([pair.reference_path])
            if isinstance(found, EncodedPicture) and isinstance(other, EncodedPicture):
                return pair, found, other
        assert isinstance(other, BrokenPicture), "else it would have been returned"
        tried = f"{_MAX_SUBSTITUTES} substitutes of pair {wanted.uuid} are broken too, this one was the last"
        raise BrokenPicture(other.path, f"{other.reason}; {tried}")


class PairLoader:
    """Iterates training batches as :class:`PairBatch`, of ``dtype`` "float32", "float16" or "bfloat16" on ``device``.

    ``batches`` gives lists of :class:`Pair`, at most ``batch_size`` each; it is consumed ahead in a background thread
    and once only. ``pictures`` are the files from which layers choose. A pair with a broken file is replaced by
    ``substitute(pair, attempt)``, attempt = 1, 2, ..., and each broken file is told once to ``on_broken(path, reason)``
    (called from any thread). ``apply_exif`` turns pictures as their EXIF orientation says. With ``processes`` so many
    worker processes sample, read, plan and trace, instead of a thread beside the caller's; ``batches`` is a sequence
    then, and it and ``substitute`` can be pickled. Batches depend neither on that nor on ``threads``. The background
    work ends with the iteration; leave a ``with`` block or call :meth:`close` to end it earlier.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[Pair]],
        pictures: Sequence[AnyPath],
        *,
        size: int,
        batch_size: int,
        substitute: Callable[[Pair, int], Pair],
        on_broken: Callable[[AnyPath, str], None],
        device: str = "cpu",
        device_id: int | None = None,
        threads: int = 2,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        max_pixels: int = MAX_PIXELS,
        apply_exif: bool = False,
        dtype: str = "float32",
        processes: int = 0,
    ) -> None:
        if processes < 0:
            raise ValueError(f"processes must be at least 0, got {processes}")
        if processes and not isinstance(batches, Sequence):
            raise ValueError(f"with processes, batches must be a sequence, got {type(batches).__name__}")
        if processes:
            require_guard()
        self._batches = batches
        self._processes = processes
        self._dtype = _checked_dtype(dtype)
        self._pinned = device == "gpu"
        self._preparation = PairPreparation(batches, pictures, size, substitute, max_pixels, threads, apply_exif)
        self._preparation.start(on_broken)
        self._renderer: Renderer[Any, dict[str, Any]] = Renderer(
            self._prepare,
            self._preparation.broken,
            views=2,
            size=size,
            batch_size=batch_size,
            device=device,
            device_id=device_id,
            threads=threads,
            lanes=MOST_LANES,
            normalize=(mean, std),
        )
        self._stream: Iterator[PairBatch] | None = None

    @property
    def wait_seconds(self) -> float:
        """Seconds that the consumer spent waiting for batches."""
        return self._renderer.wait_seconds

    @property
    def producer_wait_seconds(self) -> float:
        """The part of ``wait_seconds`` in which files, plans and tables were not ready."""
        return self._renderer.producer_wait_seconds

    def __iter__(self) -> Iterator[PairBatch]:
        if self._stream is not None:
            raise RuntimeError("a PairLoader is iterated once; make a new one for the next batches")
        self._stream = self._iterate()
        return self._stream

    def __enter__(self) -> PairLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the background work; iterating further ends."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]
        self._preparation.reader.close()

    def _iterate(self) -> Iterator[PairBatch]:
        handover = _Handover(self._dtype)
        try:
            for payload, outputs in self._stream_of_batches():
                query, reference = handover.tensors(outputs)
                yield PairBatch(
                    query,
                    reference,
                    self._kept(payload["query_to_reference"]),
                    self._kept(payload["reference_to_query"]),
                    self._kept(payload["positive"]),
                    self._kept(payload["traced"]),
                    payload["uuids"],
                )
        finally:
            handover.finish()
            self._preparation.reader.close()

    def _stream_of_batches(self) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
        if not self._processes:
            return self._renderer.stream(self._batches)
        assert isinstance(self._batches, Sequence), "checked when made"
        broken, count = self._preparation.broken, len(self._batches)
        workers = Workers(self._preparation, self._processes, count, broken)
        return self._renderer.stream(range(count), workers)

    def _prepare(self, item: Any) -> Batch[dict[str, Any]] | None:
        """A batch of pairs, or the batch of that number."""
        return self._preparation.prepare(self._preparation.batches[item] if self._processes else item, self._empty)

    def _empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Memory for a table; for the GPU such as it copies from while the caller goes on."""
        if not self._pinned:
            return np.empty(shape, dtype)
        import torch

        size = math.prod(shape) * np.dtype(dtype).itemsize
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape)

    def _kept(self, array: np.ndarray) -> torch.Tensor:
        """An array as a tensor that no later batch overwrites."""
        import torch

        tensor = torch.from_numpy(array)
        if not self._processes:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned).copy_(tensor)


class _EvaluationLoader:
    """What the evaluation loaders share: files in chunks of ``batch_size``, broken ones left out and told."""

    _renderer: Renderer[range, np.ndarray]

    def __init__(
        self,
        paths: Sequence[AnyPath],
        batch_size: int,
        on_broken: Callable[[AnyPath, str], None],
        threads: int,
        max_pixels: int,
        apply_exif: bool,
        dtype: str,
    ) -> None:
        self._paths = paths
        self._dtype = _checked_dtype(dtype)
        self._batch_size = batch_size
        self._broken = Broken(on_broken)
        self._reading = (max_pixels, threads, apply_exif)

    @property
    def wait_seconds(self) -> float:
        """Seconds that the consumer spent waiting for batches."""
        return self._renderer.wait_seconds

    def __len__(self) -> int:
        """Batches at most; fewer if all pictures of one are broken."""
        return -(-len(self._paths) // self._batch_size)

    def _stream(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(indices int64 [b], what the graph gives for these pictures) of every chunk."""
        import torch

        self._reader = _Reader((), self._broken, *self._reading)
        starts = range(0, len(self._paths), self._batch_size)
        chunks = [range(i, min(i + self._batch_size, len(self._paths))) for i in starts]
        handover = _Handover(self._dtype)
        try:
            for indices, (outputs,) in self._renderer.stream(chunks):
                (pictures,) = handover.tensors((outputs,))
                yield torch.from_numpy(indices), pictures
        finally:
            handover.finish()
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
    """Iterates evaluation batches: (indices int64 [b], pictures ``dtype`` [b, 3, S, S]), as torch tensors.

    Each picture is resized to S x S ignoring its aspect ratio, bicubic and antialiased, to the bit as Pillow does it on
    the CPU backend; EXIF orientation is not applied (PROTOCOLS 2) unless ``apply_exif``. A broken file is left out and
    told to ``on_broken(path, reason)``; the indices say which pictures came.
    """

    def __init__(
        self,
        paths: Sequence[AnyPath],
        *,
        size: int,
        batch_size: int,
        on_broken: Callable[[AnyPath, str], None],
        device: str = "cpu",
        device_id: int | None = None,
        threads: int = 2,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        max_pixels: int = MAX_PIXELS,
        apply_exif: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__(paths, batch_size, on_broken, threads, max_pixels, apply_exif, dtype)
        self._grid = (size, size)
        self._renderer = Renderer(
            self._prepare,
            self._broken,
            views=1,
            size=size,
            batch_size=batch_size,
            device=device,
            device_id=device_id,
            threads=threads,
            lanes=MOST_LANES,
            normalize=(mean, std),
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._stream()

    def _views(self, picture: EncodedPicture) -> tuple[View, ...]:
        return (View(EditProgram().composed(picture.shape, self._grid)),)


class CropLoader(_EvaluationLoader):
    """Iterates (indices int64 [b], views ``dtype`` [b, V, 3, S, S]): views of each picture, cut from one decode.

    ``cuts(width, height)`` gives the V views of a picture of that size, as many for every picture. Each is resized to
    S x S as by :class:`PictureLoader`, boxes to the bit as ``crop`` and ``resize`` of Pillow would. Runs on the CPU;
    broken files are told as there.
    """

    def __init__(
        self,
        paths: Sequence[AnyPath],
        cuts: Callable[[int, int], Sequence[Cut]],
        *,
        size: int,
        batch_size: int,
        on_broken: Callable[[AnyPath, str], None],
        threads: int = 2,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        max_pixels: int = MAX_PIXELS,
        apply_exif: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__(paths, batch_size, on_broken, threads, max_pixels, apply_exif, dtype)
        self._size = size
        self._renderer = _Cutter(
            self._prepare,
            self._broken,
            views=1,
            size=size,
            batch_size=batch_size,
            threads=threads,
            normalize=(mean, std),
            cuts=cuts,
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for indices, tall in self._stream():  # tall [b, 3, V * S, S]
            yield indices, tall.unflatten(2, (-1, self._size)).transpose(1, 2)


@dataclass(kw_only=True)
class _Cutter(Renderer[range, np.ndarray]):
    """Scenes without views, cut by ``cuts``."""

    cuts: Callable[[int, int], Sequence[Cut]]

    def arrays(self, batch: Batch[np.ndarray], room: Room) -> list[object]:
        pictures = [scene.pictures[0] for scene in batch.scenes]
        rows = []
        for height, width in (picture.shape for picture in pictures):
            rows.append(np.array([cut.row(height, width) for cut in self.cuts(width, height)], np.float64))
            if rows[-1].shape != rows[0].shape or not len(rows[0]):
                raise ValueError(f"cuts must give as many views for every picture, got {len(rows[-1])}, {len(rows[0])}")
        like = np.zeros((len(rows[0]) * self.size, self.size, 0), np.uint8)
        return [[picture.data for picture in pictures], rows, [like] * len(rows)]

    def build(self, source: Callable[[], list[object]], threads: int) -> Any:
        from dali_pipelines.graph import build_cutter

        assert self.normalize is not None, "set by CropLoader"
        return build_cutter(
            source, size=self.size, batch_size=self.batch_size, threads=threads, normalize=self.normalize
        )


def _checked_dtype(dtype: str) -> str:
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be 'float32', 'float16' or 'bfloat16', got {dtype!r}")
    return dtype


class _Handover:
    """DALI's batches as torch tensors of ``dtype``, on their device.

    On the CPU a tensor is DALI's memory, which it keeps, unless its dtype is another. On a GPU it is a copy: DALI would
    use its memory again as soon as nobody on the host holds it, though torch's stream has yet to read it.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._copied: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()  # and when

    def tensors(self, outputs: Sequence[Any]) -> list[torch.Tensor]:
        import torch

        dtype = getattr(torch, self._dtype)  # DALI knows no bfloat16
        found = [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs]
        if not found[0].is_cuda:
            return [tensor.to(dtype) for tensor in found]
        copies = [tensor.to(dtype, copy=True) for tensor in found]
        self._copied.append((torch.cuda.current_stream(found[0].device).record_event(), found))
        while self._copied and self._copied[0][0].query():
            self._copied.popleft()
        return copies

    def finish(self) -> None:
        """Wait for the last copies; what they copy is held until then."""
        while self._copied:
            self._copied.popleft()[0].synchronize()
