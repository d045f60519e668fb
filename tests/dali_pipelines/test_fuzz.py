"""Damaged files of every format, through both loaders: nothing crashes or hangs, each file is delivered or told.

The files are real pictures and small made ones, changed by numbers drawn from a fixed seed: flipped bits, cut ends,
runs of zeros, bytes moved, and headers that lie about sizes, channels and offsets. The loaders run in a process of
their own (this file as a script), so a crash of native code is one failed test. COPYNCE_FUZZ sets how many files of
each format are made (default 30).
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from copynce.pixtrace import EditProgram, sample_program
from dali_pipelines import LoaderOptions, Pair, PairLoader, PictureLoader

FILES = int(os.environ.get("COPYNCE_FUZZ", "30"))
FORMATS = ("jpg", "png", "webp", "bmp", "tiff", "gif")
BATCH = 64
OPTIONS = LoaderOptions(size=32, batch_size=BATCH)
#: Memory that damaged headers of pictures of some kilobytes may make the process take.
MOST_BYTES = 4 * 2**30


def saved(image: Image.Image, suffix: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, {"jpg": "JPEG", "tiff": "TIFF"}.get(suffix, suffix.upper()), **options)
    return content.getvalue()


def whole_files(suffix: str, photographs: list[Image.Image]) -> list[bytes]:
    """Files of one format in its variants."""
    photo, other = photographs[0], photographs[1]
    grey, palette = photo.convert("L"), photo.convert("P", palette=Image.Palette.ADAPTIVE)
    alpha = photo.copy()
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    match suffix:
        case "jpg":
            exif = Image.Exif()
            exif[0x0112] = 6
            return [
                *(saved(each, "jpg", quality=85) for each in photographs),
                saved(photo, "jpg", progressive=True, exif=exif),
                saved(grey, "jpg"),
                saved(photo.convert("CMYK"), "jpg"),
                saved(photo, "jpg", subsampling=0, restart_marker_blocks=2),
            ]
        case "png":
            images = (photo, other, grey, palette, alpha, grey.convert("1"), deep, alpha.convert("LA"))
            return [*(saved(each, "png") for each in images), saved(palette, "png", transparency=3)]
        case "webp":
            frames = [other.resize(photo.size)]
            return [
                saved(photo, "webp"),
                saved(photo, "webp", lossless=True),
                saved(alpha, "webp"),
                saved(photo, "webp", save_all=True, append_images=frames),
            ]
        case "bmp":
            return [saved(each, "bmp") for each in (photo, other, grey, palette, grey.convert("1"), alpha)]
        case "tiff":
            return [
                saved(photo, "tiff"),
                saved(deep, "tiff", compression="tiff_lzw"),
                saved(photo, "tiff", compression="tiff_adobe_deflate", big_tiff=True),
                saved(photo, "tiff", compression="jpeg"),
                saved(grey.convert("1"), "tiff", compression="group4"),
                saved(palette, "tiff", compression="packbits"),
                saved(photo.convert("CMYK"), "tiff"),
                saved(photo, "tiff", compression="tiff_lzw", save_all=True, append_images=[other]),
            ]
        case "gif":
            frames = [other.resize(photo.size).convert("P")]
            return [
                saved(palette, "gif"),
                saved(grey, "gif"),
                saved(palette, "gif", save_all=True, append_images=frames),
            ]
    raise ValueError(suffix)


def lie(content: bytearray, suffix: str, draw: random.Random) -> None:
    """Overwrite one number of the header, checksums put right where there are any."""
    wrong = draw.choice((0, 1, 3, 255, 9_999, 30_000, 65_535, 2**31 - 1, 2**32 - 1))
    at = len(content) - 8
    width = 2
    match suffix:
        case "jpg":  # a field of the frame header: precision, height, width, components
            frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
            at, width = draw.choice(((frame + 4, 1), (frame + 5, 2), (frame + 7, 2), (frame + 9, 1), (frame + 11, 1)))
            content[at : at + width] = (wrong & (256**width - 1)).to_bytes(width, "big")
            return
        case "png":
            at, width = draw.choice(((16, 4), (20, 4), (24, 1), (25, 1), (28, 1)))
            content[at : at + width] = (wrong & (256**width - 1)).to_bytes(width, "big")
            content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
            return
        case "bmp":
            at, width = draw.choice(((10, 4), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 4), (46, 4)))
        case "webp":
            at, width = draw.choice(((4, 4), (16, 4), (20, 3), (24, 3), (27, 3), (26, 2), (28, 2)))
        case "gif":
            image = content.find(b",")
            at, width = draw.choice(((6, 2), (8, 2), (10, 1), (image + 1, 2), (image + 5, 2), (image + 7, 2)))
        case "tiff":  # type, count or value of an entry of the first directory
            order = "<" if content[:2] == b"II" else ">"
            (start,) = struct.unpack_from(f"{order}I", content, 4)
            if content[2] != 43 and start + 2 < len(content):
                (entries,) = struct.unpack_from(f"{order}H", content, start)
                entry = start + 2 + 12 * draw.randrange(max(1, entries))
                at, width = draw.choice(((entry + 2, 2), (entry + 4, 4), (entry + 8, 4), (entry + 8, 2)))
            else:
                at, width = draw.randrange(8, len(content) - 4), 4
    content[at : at + width] = (wrong & (256**width - 1)).to_bytes(width, "little")


def damaged(content: bytes, suffix: str, draw: random.Random) -> bytes:
    """The file with one kind of damage."""
    data = bytearray(content)
    kind = draw.randrange(8)
    at, run = draw.randrange(len(data)), 1 + int(draw.random() ** 3 * len(data) / 2)
    if kind in (0, 1):  # bits, anywhere or near the start
        for _ in range(draw.choice((1, 2, 8, 64))):
            data[draw.randrange(len(data) if kind == 0 else min(len(data), 256))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at : at + run] = bytes(len(data[at : at + run]))
    elif kind == 4:
        del data[at : at + run]
    elif kind == 5:
        data[at:at] = data[at : at + run]
    else:
        lie(data, suffix, draw)
    return bytes(data)


def make(folder: Path, suffix: str, count: int, photographs: list[Image.Image]) -> list[Path]:
    bases = whole_files(suffix, photographs)
    paths = []
    for i in range(count):
        draw = random.Random(f"{suffix}/{i}")
        paths.append(folder / f"{i:05}.{suffix}")
        paths[-1].write_bytes(damaged(draw.choice(bases), suffix, draw))
    return paths


@pytest.fixture(scope="module")
def photographs(minidisc: Path) -> list[Image.Image]:
    """Real pictures, small, so that damage hits every part of a file."""
    found = []
    for k, path in enumerate(sorted((minidisc / "train").glob("*.jpg"))[:4]):
        with Image.open(path) as image:
            found.append(image.convert("RGB").resize((90 + 30 * k, 120 - 17 * k)))
    return found


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, photographs: list[Image.Image]
) -> tuple[list[Path], dict[str, Any], str]:
    """The damaged files, what became of them, and what the loaders' process wrote to its standard error."""
    folder = tmp_path_factory.mktemp("fuzz")
    good, out, damaged_files = folder / "good.jpg", folder / "found.json", folder / "damaged"
    photographs[3].save(good)
    damaged_files.mkdir()
    paths = [path for suffix in FORMATS for path in make(damaged_files, suffix, FILES, photographs)]
    done = subprocess.run(
        [sys.executable, __file__, str(good), str(damaged_files), str(out)],
        capture_output=True,
        text=True,
        timeout=300 + 6 * FILES,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return paths, json.loads(out.read_text()), done.stderr


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files_are_delivered_or_told(run: tuple[list[Path], dict[str, Any], str], suffix: str) -> None:
    paths, found, _ = run
    names = [path.name for path in paths if path.suffix == f".{suffix}"]
    for loader in ("pairs", "pictures"):
        delivered = [name for name in found[loader]["delivered"] if name.endswith(suffix)]
        told = [(name, reason) for name, reason in found[loader]["told"] if name.endswith(suffix)]
        assert sorted([*delivered, *(name for name, _ in told)]) == names
        assert all(reason and "\n" not in reason for _, reason in told), told
        print(f"{suffix}, {loader}: {len(names)} files, {len(delivered)} delivered, {len(told)} told")


def test_damaged_files_mean_the_same_to_both_loaders(run: tuple[list[Path], dict[str, Any], str]) -> None:
    _, found, _ = run
    assert found["pairs"] == found["pictures"]


def test_damaged_files_take_no_memory_and_no_lines_of_the_terminal(
    run: tuple[list[Path], dict[str, Any], str],
) -> None:
    _, found, written = run
    print(f"{found['bytes'] >> 20} MiB at most")
    assert found["bytes"] < MOST_BYTES
    # The JPEG and PNG libraries inside of DALI cannot be silenced; Pillow and libtiff can.
    assert not [line for line in written.splitlines() if any(word in line for word in ("PIL", "TIFF", "Decode:"))]


def through_pairs(paths: list[Path], good: Path) -> dict[str, list[Any]]:
    """Names delivered and (name, reason) told by the training loader, each file the picture of a positive pair."""
    told: list[tuple[str, str]] = []

    def pair(path: Path) -> Pair:
        program = sample_program("matcher", seed=0, epoch=0, uuid=path.name)
        return Pair(path, program, path, EditProgram(), positive=True, uuid=path.name)

    batches = PairLoader(
        [[pair(path) for path in paths[i : i + BATCH]] for i in range(0, len(paths), BATCH)],
        [good],
        OPTIONS,
        substitute=lambda wanted, attempt: pair(good),
        on_broken=lambda path, reason: told.append((Path(path).name, reason)),
    )
    shown = [uuid for batch in batches for uuid in batch.uuids]
    assert len(shown) == len(paths), "every batch is full"
    return accounted((uuid for uuid in shown if uuid != good.name), told)


def through_pictures(paths: list[Path]) -> dict[str, list[Any]]:
    """Names delivered and (name, reason) told by the evaluation loader."""
    told: list[tuple[str, str]] = []
    report: Callable[[Any, str], None] = lambda path, reason: told.append((Path(path).name, reason))  # noqa: E731
    pictures = PictureLoader(paths, OPTIONS, on_broken=report)
    return accounted((paths[i].name for indices, _ in pictures for i in indices.tolist()), told)


def accounted(delivered: Iterable[str], told: list[tuple[str, str]]) -> dict[str, list[Any]]:
    shown = sorted(delivered)  # runs the loader
    return {"delivered": shown, "told": sorted(told)}


def main(good: str, folder: str, out: str) -> None:
    paths = sorted(Path(folder).iterdir())
    found: dict[str, Any] = {"pairs": through_pairs(paths, Path(good)), "pictures": through_pictures(paths)}
    found["bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
