"""Pictures per second of `copynce index add`, where the time goes, and files per second where nothing is new.

    python -m benchmarks.index_add default PICTURES --cores 1 [--unchanged 40000] [--json add.json]

On so many pinned cores. Whole: `Index.add` of a folder into a new index, after a small one that warms everything up.
Its parts, each by itself, one after the other on the same files: reading (with what the index notes of a file: hash,
size, EXIF), decoding, the loader (which reads, decodes and resizes), the model on pictures that are there already. In
the command they overlap, so on more than one core their sum is more than the whole.

Unchanged: so many small files of a folder which the index holds already, by `copynce index add` in a process of its
own, by its clock, imports and all, and without what a command with nothing to look at takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.index_search import rows_of
from copynce.index import Index
from copynce.index.listing import list_files
from copynce.index.reading import NotedFile
from copynce.index.table import PictureTable
from copynce.model import Model, load_model
from copynce.provenance import processor_name, running_commit
from dali_pipelines import LoaderOptions, PictureLoader
from dali_pipelines.graph import build_decoder

_BATCH = 64
_BLOCK = 50_000  # rows written together


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def read(files: Sequence[str]) -> None:
    for file in files:
        NotedFile(file).read_bytes()


def decode(files: Sequence[str]) -> None:
    """All files, in batches; each must be one that DALI decodes."""
    batches = [
        [np.fromfile(file, np.uint8) for file in files[start : start + _BATCH]]
        for start in range(0, len(files), _BATCH)
    ]
    left = iter(batches)
    pipeline = build_decoder(lambda: next(left), batch_size=_BATCH, device="cpu")
    pipeline.build()
    for _ in batches:
        pipeline.run()


def load(files: Sequence[str], size: int, threads: int) -> None:
    options = LoaderOptions(size=size, batch_size=_BATCH, device="cpu", threads=threads)
    for _ in PictureLoader(files, options, on_broken=lambda path, reason: None):
        pass


def describe(model: Model, count: int) -> None:
    images = torch.randn(_BATCH, 3, model.module.img_size, model.module.img_size)
    with torch.inference_mode():
        for start in range(0, count, _BATCH):
            model.module(images[: count - start], tokens=False)


def pictures(model: Model, source: Path, cores: int, most: int | None) -> dict[str, Any]:
    """The rate of `Index.add` and its parts, in fp32."""
    listed = list_files([source], lambda path, reason: None, lambda text: None)
    files = [file for file in listed.files if isinstance(file, str)][:most]
    settings: dict[str, Any] = {"threads": cores, "precision": "fp32", "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        Index(f"{folder}/warm", model, **settings).add(*files[:_BATCH])
        index = Index(f"{folder}/index", model, **settings)
        found: dict[str, Any] = {"whole": seconds(lambda: index.add(*files))}
        count = len(index)
    size = model.module.img_size
    found["reading"] = seconds(lambda: read(files))
    found["decoding"] = seconds(lambda: decode(files))
    found["loader"] = seconds(lambda: load(files, size, cores))
    found["model"] = seconds(lambda: describe(model, count))
    return {"pictures": count, "pictures_per_second": count / found["whole"], "seconds": found}


def unchanged(model: Model, count: int) -> dict[str, float]:
    """Seconds of `copynce index add` over `count` files that it knows, and over one."""
    with tempfile.TemporaryDirectory() as folder:
        source, one = Path(folder, "many"), Path(folder, "one")
        for number in range(count):
            place = source / f"{number // 1000:04d}"
            if number % 1000 == 0:
                place.mkdir(parents=True)
            (place / f"{number:06d}.jpg").write_bytes(b"x")
        one.mkdir()
        (one / "0.jpg").write_bytes(b"x")
        found = {}
        for what in (one, source):
            listing = list_files([what], lambda path, reason: None, lambda text: None)
            table = PictureTable.create(f"{folder}/{what.name}.index", model.card(), "float32")
            draw = np.random.default_rng(0)
            for start in range(0, len(listing), _BLOCK):
                part = slice(start, start + _BLOCK)
                names = listing.names[part].to_pylist()
                descriptors = draw.standard_normal((len(names), model.dim), np.float32)
                table.engine.add(rows_of(table, names, descriptors, listing.size[part], listing.mtime_ns[part]))
            command = [sys.executable, "-m", "copynce.cli", "index", "add", table.place, str(what)]
            times = []
            for _ in range(3):
                begun = time.perf_counter()
                said = subprocess.run(command, check=True, capture_output=True, text=True)
                times.append(time.perf_counter() - begun)
                assert f"{len(listing)} unchanged" in said.stdout, said.stdout
            found[what.name] = min(times)
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--most", type=int, help="pictures (default: all)")
    parser.add_argument("--unchanged", type=int, default=0, metavar="FILES")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    torch.set_num_threads(options.cores)
    model = load_model(options.model, device="cpu")
    found: dict[str, Any] = {"cores": options.cores, "machine": processor_name(), "commit": running_commit()}
    found |= pictures(model, options.pictures, options.cores, options.most)
    told = found["seconds"]
    resizing = max(told["loader"] - told["reading"] - told["decoding"], 0.0)
    print(f"{found['pictures']} pictures: {found['pictures_per_second']:.1f} a second on {options.cores} cores, fp32")
    for name, one in (
        ("reading", told["reading"]),
        ("decoding", told["decoding"]),
        ("resizing (the loader less both)", resizing),
        ("model", told["model"]),
    ):
        print(f"  {name:32} {1e3 * one / found['pictures']:6.2f} ms a picture, {one / told['whole']:6.1%}")
    if options.unchanged:
        found["unchanged"] = {"files": options.unchanged, "seconds": unchanged(model, options.unchanged)}
        many, one = (found["unchanged"]["seconds"][name] for name in ("many", "one"))
        rates = options.unchanged / many, (options.unchanged - 1) / (many - one)
        print(f"nothing new among {options.unchanged} files: {many:.2f} s, {rates[0]:,.0f} files a second;")
        print(f"{rates[1]:,.0f} a second beside the {one:.2f} s that one file takes")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
