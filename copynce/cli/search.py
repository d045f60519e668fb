"""``copynce search``"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copynce.cli.console import print_table, progress_bars, whole_number, writing_into
from copynce.cli.settings_help import Command

if TYPE_CHECKING:
    from copynce.copies.pair import CopyPair
    from copynce.data import Quarantine

#: Exit status of --fail-on-match where there is one.
MATCHED = 4
_SHOWN = 50  # rows on the terminal


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "search",
        help="which pictures of one folder copy pictures of another, and where",
        description="Find copies: of every query its nearest references are judged, and what is a copy by at least the "
        "probability asked for is listed: matches.csv, matches.jsonl with the copied regions in pixels of both files, "
        "and report.html with the pictures. Queries and references are folders, pictures, CSVs (uuid,path), JSON "
        "lists, tar shards, or - for paths on the standard input; references may also be an index.",
    )
    parser.add_argument("queries", metavar="QUERIES", help="the pictures that may be copies")
    parser.add_argument("references", metavar="REFERENCES", help="the pictures that may be originals, or an index")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of what is written")
    add_judging(parser)
    parser.add_argument("--whole", action="store_true", help="ask queries whole only, not in parts too: a fraction of "
                        "their time, but a copy that was laid small on another picture may be missed")  # fmt: skip
    parser.add_argument("--fail-on-match", action="store_true", help=f"end with status {MATCHED} if anything is found")
    parser.set_defaults(run=run)


def add_judging(parser: argparse.ArgumentParser) -> None:
    """The options of whatever looks for copies."""
    parser.add_argument("--model", default="default", help="default, or a box of your own (default: %(default)s)")
    parser.add_argument("--probability", type=probability, metavar="P", help="the least that is listed (default: that "
                        "from which on 95 %% were copies among the pairs the model was calibrated on)")  # fmt: skip
    parser.add_argument("-k", type=whole_number, default=5, help="candidates a query (default: %(default)s)")
    parser.add_argument("--link", action="store_true", help="the report links to the pictures instead of holding them")
    parser.add_argument("--strict", action="store_true", help="stop at the first broken picture")
    parser.add_argument("--threads", type=whole_number, default=2, help="that read pictures (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="(default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Search, write what was found, print it."""
    from copynce.copies.pair import write_pairs_csv, write_pairs_jsonl
    from copynce.copies.searching import find_copies
    from copynce.index.listing import list_files
    from copynce.inspect.copies_page import groups_by_query, write_copies_report
    from copynce.model import load_model

    out = prepared(options)
    model = load_model(options.model, device=options.device)
    least = least_probability(options, model)
    broken = quarantine(options)
    queries = list_files([options.queries], broken.add, _say).files
    references = _references(options, model, broken)
    with progress_bars("") as bars:

        def report(what: str, done: int, total: int) -> None:
            stop_if_strict(options, broken)
            bars(what, done, total)

        pairs = find_copies(
            model,
            queries,
            references,
            k=options.k,
            in_parts=not options.whole,
            threads=options.threads,
            on_broken=broken.add,
            progress=report,
        )
    stop_if_strict(options, broken)
    found = [pair for pair in pairs if pair.probability >= least]
    title = f"{len({pair.query for pair in found})} of {len(queries)} pictures copy one of {len(references)}"
    with writing_into(out):
        write_pairs_csv(out / "matches.csv", found)
        write_pairs_jsonl(out / "matches.jsonl", found)
        write_copies_report(
            out / "report.html",
            groups_by_query(found),
            title=title,
            subtitle=f"Listed from a probability of {least:.2f} on.",
            link=options.link,
        )
    print(f"{title}, by a probability of {least:.2f} or more")
    queries_shown, references_shown = short_names(pair.query for pair in found), short_names(p.reference for p in found)
    shown = [[queries_shown[pair.query], references_shown[pair.reference], *_facts(pair)] for pair in found]
    print_table(["query", "reference", "probability", "of query", "of reference"], shown, shown=_SHOWN)
    tell_broken(broken, out)
    print(f"matches, report: {out / 'matches.csv'}, {out / 'report.html'}")
    return MATCHED if options.fail_on_match and found else 0


def prepared(options: argparse.Namespace) -> Path:
    """The folder that --out names, made."""
    from copynce.errors import ConfigError

    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a folder, or not there yet, but {out} is a file; choose another")
    if options.k < 1 or options.threads < 1:
        raise ConfigError("-k and --threads must be at least 1")
    out.mkdir(parents=True, exist_ok=True)
    return out


def least_probability(options: argparse.Namespace, model: Any) -> float:
    """The probability that was asked for, or the calibration's."""
    calibration = model.calibrated()
    return calibration.threshold if options.probability is None else options.probability


def quarantine(options: argparse.Namespace) -> Quarantine:
    """An empty list of broken pictures, OUT/skipped.jsonl."""
    from copynce.data import Quarantine

    file = options.out / "skipped.jsonl"
    file.unlink(missing_ok=True)
    return Quarantine(file)


def stop_if_strict(options: argparse.Namespace, broken: Quarantine) -> None:
    """With --strict, DataError for the first broken picture."""
    from copynce.errors import DataError

    if options.strict and len(broken):
        path, reason = broken.entries()[0]
        raise DataError(f"{path}: {reason}")


def tell_broken(broken: Quarantine, out: Path) -> None:
    """One line on what was skipped, if anything was."""
    if len(broken):
        _say(f"{len(broken)} broken pictures were skipped; {out / 'skipped.jsonl'} lists them")


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Each path below the folder that all of them share: what a person needs to see of it."""
    names = set(paths)
    common = os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
    return {name: os.path.relpath(name, common) if common else name for name in names}


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a probability from 0 to 1, got {text!r}")
    return value


def _references(options: argparse.Namespace, model: Any, broken: Quarantine) -> Any:
    """An index, or the files of anything else."""
    from copynce.index import Index
    from copynce.index.listing import list_files
    from copynce.index.table import is_index

    if is_index(options.references):
        return Index(options.references, model, device=options.device, threads=options.threads)
    return list_files([options.references], broken.add, _say).files


def _facts(pair: CopyPair) -> list[str]:
    region = pair.region
    shares = [f"{region.query_share:.0%}", f"{region.reference_share:.0%}"] if region.found else ["place", "unknown"]
    return [f"{pair.probability:.3f}", *shares]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
