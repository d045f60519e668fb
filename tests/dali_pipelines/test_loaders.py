"""PairLoader and PictureLoader: contents, order, broken files, threads, clean ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.pixtrace import EditProgram, sample_program
from dali_pipelines import BrokenPicture, LoaderOptions, Pair, PairLoader, PictureLoader, render_programs
from dali_pipelines.options import MEAN, STD
from dali_pipelines.packing import FLAGS, input_layouts
from dali_pipelines.renderer import Renderer
from dali_pipelines.sources import AnyPath, EncodedPicture

SIZE = 48


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = []
    for i in range(12):
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        height, width = (60 + 17 * i, 150 - 6 * i)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i:02}.jpg")
        paths.append(folder / f"{i:02}.jpg")
    return paths


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, pictures: list[Path]) -> list[Path]:
    """Every kind of broken file; the last two have a good header and fail only inside of DALI."""
    folder = tmp_path_factory.mktemp("broken")
    content = pictures[0].read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    tables = content.find(b"\xff\xc4")  # Huffman tables: more codes than there are
    (folder / "tables.jpg").write_bytes(content[: tables + 5] + b"\xff" * 16 + content[tables + 21 :])
    Image.open(pictures[0]).save(folder / "stream.png")
    content = (folder / "stream.png").read_bytes()
    start = content.find(b"IDAT")
    end = start + 4 + int.from_bytes(content[start - 4 : start], "big")
    body = b"IDAT" + bytes(end - start - 4)  # no compressed data, with the right checksum
    (folder / "stream.png").write_bytes(
        content[:start] + body + zlib.crc32(body).to_bytes(4, "big") + content[end + 4 :]
    )
    return [folder / name for name in ("missing.jpg", "cut.jpg", "empty.jpg", "text.jpg", "tables.jpg", "stream.png")]


def positive(path: Path, epoch: int = 0) -> Pair:
    query = sample_program("matcher", seed=1, epoch=epoch, uuid=path.name)
    return Pair(path, query, path, EditProgram(), positive=True, uuid=path.stem)


def to_uint8(normalised: torch.Tensor) -> np.ndarray:
    colours = normalised * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (255 * colours).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def refuse(pair: Pair, attempt: int) -> Pair:
    raise AssertionError(f"nothing is broken here, got {pair} at {attempt}")


def ignore(path: AnyPath, reason: str) -> None:
    """Nobody is told."""


def loader(
    batches: Iterable[list[Pair]],
    pictures: list[Path],
    *,
    substitute: Callable[[Pair, int], Pair] = refuse,
    on_broken: Callable[[AnyPath, str], None] = ignore,
    **options: Any,
) -> PairLoader:
    settings = LoaderOptions(**({"size": SIZE, "batch_size": 4, "threads": 1} | options))
    return PairLoader(batches, pictures, settings, substitute=substitute, on_broken=on_broken)


def picture_loader(
    paths: list[Path], *, on_broken: Callable[[AnyPath, str], None] = ignore, **options: Any
) -> PictureLoader:
    return PictureLoader(paths, LoaderOptions(**({"size": SIZE} | options)), on_broken=on_broken)


def test_pairs_are_the_rendered_programs_and_their_tables(pictures: list[Path]) -> None:
    pairs = [positive(path) for path in pictures]
    pairs[1] = Pair(pictures[1], pairs[1].query_program, pictures[5], EditProgram(), positive=False, uuid="negative")
    other_view = sample_program("descriptor", seed=9, epoch=0, uuid="reference")
    pairs[2] = Pair(pictures[2], pairs[2].query_program, pictures[2], other_view, positive=True, uuid="two copies")
    pairs[4] = Pair(
        pictures[4], pairs[4].query_program, pictures[6], EditProgram(), positive=True, uuid="supervised", traced=False
    )
    batches = list(loader([pairs[:4], pairs[4:8], pairs[8:11]], pictures))
    assert [len(batch.uuids) for batch in batches] == [4, 4, 3]
    assert [uuid for batch in batches for uuid in batch.uuids] == [pair.uuid for pair in pairs[:11]]
    for side in ("query", "reference"):
        found = torch.cat([getattr(batch, side) for batch in batches])
        assert found.dtype == torch.float32
        assert found.shape == (11, 3, SIZE, SIZE)
        paths, programs = zip(
            *[(getattr(p, f"{side}_path"), getattr(p, f"{side}_program")) for p in pairs], strict=True
        )
        expected = render_programs(paths[:11], programs[:11], SIZE, pictures=pictures)
        # Undoing the normalisation may round a half the other way.
        np.testing.assert_allclose(to_uint8(found).astype(int), expected, atol=1)
    query_to_reference = torch.cat([batch.query_to_reference for batch in batches])
    reference_to_query = torch.cat([batch.reference_to_query for batch in batches])
    assert query_to_reference.dtype == reference_to_query.dtype == torch.int32
    assert torch.cat([batch.positive for batch in batches]).tolist() == [i != 1 for i in range(11)]
    assert torch.cat([batch.traced for batch in batches]).tolist() == [i != 4 for i in range(11)]
    for i in range(11):
        assert (query_to_reference[i] == -1).all() == (i in (1, 4))
        assert (reference_to_query[i] == -1).all() == (i in (1, 4))
    for i in (0, 3, 10):
        with Image.open(pictures[i]) as image:
            table = pairs[i].query_program.trace((image.height, image.width), (SIZE, SIZE))
        np.testing.assert_array_equal(query_to_reference[i].numpy(), table.index)
        np.testing.assert_array_equal(reference_to_query[i].numpy(), table.reverse().index)


def test_batches_do_not_depend_on_threads(pictures: list[Path]) -> None:
    batches = [[positive(path, epoch) for path in pictures[:7]] for epoch in range(9)]
    batches[2] = []
    one, *others = (list(loader(batches, pictures, batch_size=7, threads=threads)) for threads in (1, 2, 6))
    assert len(one) == 8
    for other in others:
        for a, b in zip(one, other, strict=True):
            for name in ("query", "reference", "query_to_reference", "reference_to_query", "positive", "traced"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert a.uuids == b.uuids


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_views_come_in_half_precision(pictures: list[Path], dtype: str) -> None:
    exact, half = (next(iter(loader([[positive(pictures[0])]], pictures, dtype=d))) for d in ("float32", dtype))
    wanted = getattr(torch, dtype)
    for side in ("query", "reference"):
        assert getattr(half, side).dtype == wanted
        assert torch.equal(getattr(half, side), getattr(exact, side).to(wanted))
    ((_, whole),) = picture_loader(pictures[:2], dtype=dtype, batch_size=2)
    assert whole.dtype == wanted


def test_tensors_outlive_the_loader(pictures: list[Path]) -> None:
    batches = list(loader([[positive(path)] for path in pictures], pictures))
    again = list(loader([[positive(path)] for path in pictures], pictures))
    for kept, fresh in zip(batches, again, strict=True):
        assert torch.equal(kept.query, fresh.query)


def test_broken_pictures_are_replaced_and_told_once(pictures: list[Path], broken: list[Path]) -> None:
    told: list[tuple[str, str]] = []
    asked: list[tuple[str, int]] = []

    def substitute(pair: Pair, attempt: int) -> Pair:
        asked.append((pair.uuid, attempt))
        # The first substitute of the missing file is broken as well.
        path = broken[2] if pair.uuid == "missing" and attempt == 1 else pictures[attempt]
        return positive(path)

    mixed = [positive(path) for pair in zip(broken, pictures, strict=False) for path in pair]
    twice = [mixed[i : i + 4] for i in range(0, 12, 4)] * 2
    batches = list(
        loader(twice, pictures, substitute=substitute, on_broken=lambda path, why: told.append((Path(path).name, why)))
    )
    assert [len(batch.uuids) for batch in batches] == [4] * 6
    shown = [uuid for batch in batches for uuid in batch.uuids]
    expected = [uuid for i in range(6) for uuid in ("02" if i == 0 else "01", f"{i:02}")]
    assert shown == expected * 2
    assert sorted(name for name, _ in told) == sorted(path.name for path in broken)
    assert ("missing", 2) in asked
    reasons = dict(told)
    for name in ("tables.jpg", "stream.png"):
        assert reasons[name] == "the header is fine but the picture cannot be decoded"
    # What came is what a clean run over the substitutes gives.
    clean = list(loader([[positive(next(p for p in pictures if p.stem == u)) for u in shown[8:12]]], pictures))
    assert torch.equal(clean[0].query, batches[2].query)


def test_broken_layer_pictures_give_way_to_the_next(pictures: list[Path], broken: list[Path]) -> None:
    told: list[str] = []
    pairs = [positive(path, epoch) for epoch in range(3) for path in pictures]
    choice = [*broken, pictures[3]]
    (batch,) = loader([pairs], choice, batch_size=36, on_broken=lambda path, _: told.append(Path(path).name))
    only = render_programs(
        [p.query_path for p in pairs], [p.query_program for p in pairs], SIZE, pictures=pictures[3:4]
    )
    np.testing.assert_allclose(to_uint8(batch.query).astype(int), only, atol=1)
    assert set(told) <= {path.name for path in broken}
    assert {"tables.jpg", "stream.png"} & set(told)


def test_an_error_that_no_file_is_to_blame_for_comes_at_once(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding each file of a batch in a pipeline of its own takes seconds a file on a GPU."""
    arrays, decode = Renderer.arrays, Renderer._decode
    looks: list[int] = []

    def bad(self: Renderer, batch: object, arena: object) -> list[object]:
        packed = arrays(self, batch, arena)
        names = list(input_layouts(2))
        on = [name in ("edited", "effects", "convolve") for name in FLAGS]
        packed[names.index("view_0.flags")] = np.array([on] * 4)
        packed[names.index("view_0.kernel")] = [np.ones((3, 3, 3, 3), np.float32)] * 4  # of more dimensions than a view
        return packed

    def counted(self: Renderer, files: list[EncodedPicture]) -> bool:
        looks.append(len(files))
        return decode(self, files)

    monkeypatch.setattr(Renderer, "arrays", bad)
    monkeypatch.setattr(Renderer, "_decode", counted)
    with pytest.raises(RuntimeError, match="filter"):
        list(loader([[positive(path) for path in pictures[:4]]], pictures))
    assert looks == [4]


def test_only_broken_substitutes_end_with_a_sentence(pictures: list[Path], broken: list[Path]) -> None:
    with pytest.raises(ValueError, match="100 substitutes of pair cut are broken too"):
        list(loader([[positive(broken[1])]], pictures, substitute=lambda pair, attempt: positive(broken[2])))


def test_the_samplers_exception_arrives_after_the_good_batches(pictures: list[Path]) -> None:
    def batches() -> Iterator[list[Pair]]:
        yield [positive(pictures[0])]
        raise KeyError("the sampler is out of order")

    seen = []
    with pytest.raises(KeyError, match="out of order") as caught:
        seen.extend(loader(batches(), pictures))
    assert len(seen) <= 1
    assert any(entry.name == "batches" for entry in caught.traceback)


def test_leaving_early_stops_the_threads(pictures: list[Path]) -> None:
    def endless() -> Iterator[list[Pair]]:
        while True:
            yield [positive(path) for path in pictures[:4]]

    before = threading.active_count()
    with loader(endless(), pictures) as batches:
        assert len(next(iter(batches)).uuids) == 4
    assert not [thread for thread in threading.enumerate() if thread.name == "dali_pipelines producer"]
    assert threading.active_count() <= before + 1  # an idle reader thread may still be ending


def test_a_forgotten_loader_does_not_hang_the_interpreter(pictures: list[Path]) -> None:
    script = f"""
import itertools
from copynce.pixtrace import EditProgram
from dali_pipelines import LoaderOptions, Pair, PairLoader
pair = Pair({str(pictures[0])!r}, EditProgram(), {str(pictures[0])!r}, EditProgram(), True, "a")
options = LoaderOptions(size=32, batch_size=4)
loader = PairLoader(itertools.repeat([pair] * 4), [], options, substitute=None, on_broken=None)
batches = iter(loader)
print(next(batches).query.shape[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr


def test_a_loader_is_iterated_once(pictures: list[Path]) -> None:
    batches = loader([[positive(pictures[0])]], pictures)
    list(batches)
    with pytest.raises(RuntimeError, match="iterated once"):
        iter(batches)


def test_traced_positive_pairs_show_one_picture(pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"traced positive pair must show one picture, got .*00\.jpg and .*01\.jpg"):
        Pair(pictures[0], EditProgram(), pictures[1], EditProgram(), positive=True, uuid="a")


def test_settings_are_checked(pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match="device must be 'cpu' or 'gpu', got 'tpu'"):
        loader([], pictures, device="tpu")
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        loader([], pictures, size=0)
    with pytest.raises(ValueError, match="dtype must be 'float32', 'float16' or 'bfloat16', got 'half'"):
        loader([], pictures, dtype="half")
    with pytest.raises(ValueError, match="one length, got 1 and 0"):
        render_programs(pictures[:1], [])


def test_pictures_equal_pillow(pictures: list[Path]) -> None:
    seen = list(picture_loader(pictures, batch_size=5))
    assert [len(indices) for indices, _ in seen] == [5, 5, 2]
    assert torch.cat([indices for indices, _ in seen]).tolist() == list(range(12))
    found = to_uint8(torch.cat([batch for _, batch in seen])).astype(int)
    for path, pixels in zip(pictures, found, strict=True):
        image = Image.open(path).convert("RGB")
        columns_first = image.resize((SIZE, image.height), Image.Resampling.BICUBIC).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
        np.testing.assert_array_equal(pixels, np.asarray(columns_first))
        # In one call, newer Pillow may do the rows first; then the rounding in between falls elsewhere.
        at_once = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(pixels - at_once).mean() < 0.5


def test_broken_pictures_are_left_out_of_evaluation(pictures: list[Path], broken: list[Path]) -> None:
    told: list[str] = []
    paths = [*pictures[:3], *broken, *pictures[3:5]]
    evaluation = picture_loader(paths, batch_size=3, on_broken=lambda path, reason: told.append(Path(path).name))
    seen = list(evaluation)
    assert torch.cat([indices for indices, _ in seen]).tolist() == [0, 1, 2, 9, 10]
    assert sorted(told) == sorted(path.name for path in broken)
    clean = list(picture_loader(pictures[:5], batch_size=5))
    assert torch.equal(torch.cat([batch for _, batch in seen]), clean[0][1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batches_of_which_nothing_is_left(pictures: list[Path], broken: list[Path], threads: int) -> None:
    """One picture a batch: those of broken files are empty, some only once DALI has failed; the order stays."""
    paths = [*pictures[:2], *broken[-2:], pictures[2], *broken, pictures[3], broken[-1], *pictures[4:9]]
    seen = list(picture_loader(paths, batch_size=1, threads=threads))
    assert [paths[i] for indices, _ in seen for i in indices.tolist()] == pictures[:9]
    clean = list(picture_loader(pictures[:9], batch_size=9))
    assert torch.equal(torch.cat([batch for _, batch in seen]), clean[0][1])


def test_a_loader_ends_its_threads_when_it_ends(pictures: list[Path]) -> None:
    """DALI's too, and without waiting for the garbage collector."""

    def threads_after_a_round(stop_early: bool) -> int:
        batches = iter(picture_loader(pictures, batch_size=2))
        next(batches)
        if stop_early:
            batches.close()  # type: ignore[attr-defined]
        else:
            list(batches)
        return len(os.listdir("/proc/self/task"))

    gc.disable()
    try:
        before = threads_after_a_round(stop_early=False)  # what is started once stays
        for stop_early in (False, True, False, True):
            assert threads_after_a_round(stop_early) <= before + 3  # readers may still be ending
    finally:
        gc.enable()


def test_rendering_a_broken_picture_raises(broken: list[Path]) -> None:
    for path in broken:
        with pytest.raises(BrokenPicture, match=path.name):
            render_programs([path], [EditProgram()], SIZE)
