"""``copynce index``"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from copynce.cli.console import complain, progress_bars, whole_number, writing_into
from copynce.cli.settings_help import Command

if TYPE_CHECKING:
    from copynce.index import Index

_ACTIONS = """actions:
  add INDEX SOURCE...     describe files and put them in: folders, pictures, CSVs (uuid,path), shards, or - for paths on
                          the standard input; what is unchanged since the last time is skipped
  remove INDEX WHAT...    take pictures out, by id, path or folder; their files stay
  prune INDEX [FOLDER...] take out pictures whose files are gone, and compact the index
  info INDEX              how many rows, bytes, versions, fragments; the model; the recall of approximate search

A killed add loses nothing that it has reported; the same command goes on. Several may add at once."""


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "index",
        help="a growing index of pictures: add, remove, prune, info",
        description="Keep the descriptors of an archive of pictures in a folder, up to date with its files.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("add", "remove", "prune", "info"), help="see below")
    parser.add_argument("index", metavar="INDEX", help="folder of the index; add makes it")
    parser.add_argument("what", nargs="*", metavar="WHAT", help="what to add, remove or prune")
    parser.add_argument("--model", metavar="MODEL", help="a run, one of its checkpoints, or a weights file (default: "
                        "that of the index; of a new one the package's, `default`)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="add: stop at the first broken picture")
    parser.add_argument("--ray", metavar="ADDRESS", nargs="?", const=True, default=False, help="add: describe by "
                        "workers of Ray, a local one or that of a cluster (extra [ray]; docs/scale.md)")  # fmt: skip
    parser.add_argument("--ray-workers", metavar="N", type=whole_number, help="with --ray: workers, each on a GPU or "
                        "`threads` cores (default: as many as there is room for)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="prune: list what is gone, and leave it in")
    parser.add_argument("--json", action="store_true", help="info: as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.settings = _settings
    parser.more_help = lambda: _ACTIONS
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.index import IndexConfig

    return IndexConfig


def run(options: argparse.Namespace) -> None:
    """Do one of the actions, and print what came of it."""
    from copynce.config import load_config
    from copynce.errors import ConfigError
    from copynce.index import Index, IndexConfig

    names = {field.name for field in dataclasses.fields(IndexConfig)}
    given: list[str] = list(options.overrides)
    what: list[str] = []
    for word in options.what:
        # A file may be called like a setting; then it is the file.
        setting = re.match(r"([a-z_]+)=", word)
        is_setting = setting is not None and not os.path.lexists(word) and (setting[1] in names or "/" not in word)
        (given if is_setting else what).append(word)
    config = load_config(IndexConfig, None, given)
    if options.action in ("add", "remove") and not what:
        raise ConfigError(f"{options.action} needs at least one {'source' if options.action == 'add' else 'picture'}")
    if options.action == "info" and what:
        raise ConfigError(f"info takes an index and nothing else, got {what[0]!r}")
    model = _model(options.model)
    index = Index(options.index, model, **dataclasses.asdict(config))
    with writing_into(options.index):
        {"add": _add, "remove": _remove, "prune": _prune, "info": _info}[options.action](index, what, options)


def _model(name: str | None) -> Any:
    """The weights file that a name means, a run's newest whole checkpoint."""
    if name is None:
        return None
    from copynce.training import find_model

    return find_model(name)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _add(index: Index, what: list[str], options: argparse.Namespace) -> None:
    from copynce.index.index import SKIPPED

    with progress_bars("") as report:
        added = index.add(
            *what,
            strict=options.strict,
            ray=options.ray,
            ray_workers=options.ray_workers,
            progress=lambda done, total: report("index", done, total),
            say=_say,
        )
    print(f"{added}; {len(index)} pictures in {options.index}")
    if added.broken and "://" in options.index:  # no file beside that table
        for path, reason in added.broken:
            complain("index", f"{path}: {reason}; skipped")
    elif added.broken:
        _say(f"{len(added.broken)} broken pictures were skipped; {os.path.join(options.index, SKIPPED)} lists them")


def _remove(index: Index, what: list[str], options: argparse.Namespace) -> None:
    print(f"{index.remove(*what)} removed; {len(index)} pictures in {options.index}")


def _prune(index: Index, what: list[str], options: argparse.Namespace) -> None:
    gone = index.prune(*what, dry_run=options.dry_run)
    if options.dry_run:
        print(*gone, sep="\n", end="\n" if gone else "")
        _say(f"{len(gone)} of {len(index)} are gone")
    else:
        print(f"{len(gone)} were gone; {len(index)} pictures in {options.index}")


def _info(index: Index, what: list[str], options: argparse.Namespace) -> None:
    info = index.info()
    if options.json:
        print(json.dumps(info, indent=1))
        return
    model, size = info["model"], info["model"]["config"]["img_size"]
    print(f"{info['rows']} pictures, {info['bytes'] / 2**20:.1f} MiB in {info['path']}")
    print(f"  model     {model['file']}, SHA-256 {model['sha256'][:12]}")
    print(f"  numbers   {model['dim']} of {info['descriptor']} a picture of {size} px, computed in {info['precision']}")
    print(f"  versions  {info['versions']} kept, the newest is {info['version']}; format {info['format']}")
    print(f"  fragments {info['fragments']}")
    print(f"  search    {info['search']}")
    if (found := info["approximate"]) is not None:
        recall = "not measured" if found["recall"] is None else f"{found['recall']:.1%} of the exact ten"
        print(f"  IVF-PQ    {found['rows']} pictures, {found['rows_to_come']} to come; {found['probes']} lists a query")
        print(f"  recall    {recall}, at {found['recall_at_rows']} pictures")
