"""Lists of pictures described by a file of weights, into a folder: what the commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from copynce.data import Manifest, Quarantine
from copynce.errors import DataError
from copynce.files import file_sha256
from copynce.models import Descriptor, load_checkpoint
from copynce.retrieval.extract import Alone, FeatureStore, Precision, Processes, extract
from copynce.retrieval.features import Features

#: The list of broken pictures in a folder of features.
SKIPPED = "skipped.jsonl"


def describe_lists(
    model_file: str | Path,
    lists: Mapping[str, Manifest],
    folder: str | Path,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    threads: int = 2,
    processes: Processes | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Features]:
    """The descriptors of each list of pictures, kept in `folder` as a series of the list's name.

    model_file: weights of a descriptor. What the folder holds already serves, if it was made from the same; the first
    list decides for all what precision "auto" means. progress: called as progress(name, done, total). The other
    arguments are those of `extract`. Broken pictures are listed in `folder`/skipped.jsonl. Raises DataError as
    `extract`, and where the weights are no descriptor's.
    """
    group = Alone() if processes is None else processes
    folder = Path(folder)
    model = load_checkpoint(model_file)
    if not isinstance(model, Descriptor):
        raise DataError(f"{model_file} holds a {type(model).__name__.lower()}; features come from a descriptor")
    model_hash = file_sha256(model_file)
    quarantine = Quarantine()
    if group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SKIPPED).unlink(missing_ok=True)
        quarantine = Quarantine(folder / SKIPPED)
    found: dict[str, Features] = {}
    for name, manifest in lists.items():
        if group.rank == 0:
            manifest.report(say or (lambda line: None), quarantine.add)

        def report(done: int, name: str = name, total: int = len(manifest)) -> None:
            if progress is not None:
                progress(name, done, total)

        found[name] = extract(
            model,
            manifest,
            batch_size=batch_size,
            device=device,
            precision=precision,
            quarantine=quarantine,
            threads=threads,
            keep=FeatureStore(folder, name, model_hash),
            processes=processes,
            progress=report,
            say=say,
        )
        precision = found[name].precision
    return found
