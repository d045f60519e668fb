"""``copynce scan``"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copynce.cli.console import print_table, progress_bars, writing_into
from copynce.cli.search import (
    MATCHED,
    add_judging,
    least_probability,
    prepared,
    quarantine,
    short_names,
    stop_if_strict,
    tell_broken,
)
from copynce.cli.settings_help import Command

if TYPE_CHECKING:
    from copynce.copies.scanning import CopyGroup, Member, Scan
    from copynce.data import Quarantine
    from copynce.inspect.copies_page import PictureGroup

_SHOWN = 200  # rows on the terminal


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "scan",
        help="groups of copies among the pictures of a folder, and which is likely the source",
        description="Find the copies within one collection: folders, pictures, CSVs (uuid,path), JSON lists, tar "
        "shards, - for paths on the standard input, or one index. Every two pictures of a group are copies of each "
        "other. Which is likely the source is told by facts (size, EXIF, what shows more, compression), never by a "
        "score. With --out: groups.csv, groups.jsonl, matches.csv with the copied regions, and report.html with the "
        "pictures. Nothing is ever deleted.",
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="what to look at")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of what is written (default: nothing is)")
    add_judging(parser)
    parser.set_defaults(k=10)
    parser.add_argument("--list", action="store_true", help="print the paths of all in groups but the likely sources, "
                        "one a line, and nothing else on the standard output")  # fmt: skip
    parser.add_argument("-0", "--null", action="store_true", help="with --list: end each path by a zero byte, for "
                        "xargs -0")  # fmt: skip
    parser.add_argument("--move-to", type=Path, metavar="DIR", help="move what --list prints there, by its path from "
                        "FOLDER; DIR/moved.csv says what went where")  # fmt: skip
    parser.add_argument("--undo", type=Path, metavar="MOVED.csv", help="move back what such a list says, do no more")
    parser.add_argument("--fail-on-match", action="store_true", help=f"end with status {MATCHED} if there are copies")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Scan, write what was found, print it, move what was asked."""
    from copynce.copies.moving import require_outside
    from copynce.data import Quarantine
    from copynce.errors import ConfigError

    if options.undo is not None:
        if options.folders or options.move_to is not None or options.list:
            raise ConfigError("--undo MOVED.csv stands alone: it scans nothing")
        return _undo(options.undo)
    if not options.folders:
        raise ConfigError("scan needs at least one FOLDER")
    if options.null and not options.list:
        raise ConfigError("-0 is for --list")
    if options.k < 1 or options.threads < 1:
        raise ConfigError("-k and --threads must be at least 1")
    if options.probability == 0:
        raise ConfigError("--probability must be above 0, for of any two pictures it is at least that")
    if options.move_to is not None:
        require_outside(options.move_to, [folder for folder in options.folders if os.path.isdir(folder)])
    out = None if options.out is None else prepared(options)
    broken = Quarantine() if out is None else quarantine(options)
    found, count, root = _scan(options, broken)
    stop_if_strict(options, broken)
    title = _title(found.groups, count)
    if out is not None:
        _write(out, found, title, options)
    if options.list:
        end = b"\0" if options.null else b"\n"
        sys.stdout.buffer.writelines(os.fsencode(member.path) + end for member in _copies(found.groups))
        sys.stdout.flush()
    else:
        print(title)
        print_table(["group", "picture", "probability", "pixels"], list(_rows(found.groups)), shown=_SHOWN)
        if out is not None:
            print(f"groups, report: {out / 'groups.csv'}, {out / 'report.html'}")
    _tell(found)
    if out is not None:
        tell_broken(broken, out)
    else:
        for path, reason in broken.entries():
            _say(f"skipped: {path}: {reason}")
    if options.move_to is not None:
        _move(found.groups, root, options)
    return MATCHED if options.fail_on_match and found.groups else 0


def _scan(options: argparse.Namespace, broken: Quarantine) -> tuple[Scan, int, str]:
    """(what was found, among how many pictures, the folder that holds them all)."""
    from copynce.copies.judging import judge
    from copynce.copies.moving import common_root
    from copynce.copies.scanning import collect, collect_index, scan
    from copynce.copies.searching import hopeful
    from copynce.errors import ConfigError
    from copynce.index import Index
    from copynce.index.listing import list_files
    from copynce.index.table import is_index
    from copynce.model import load_model

    model = load_model(options.model, device=options.device)
    least = least_probability(options, model)
    indexes = [folder for folder in options.folders if is_index(folder)]
    if indexes and len(options.folders) > 1:
        raise ConfigError(f"{indexes[0]} is an index, which is scanned alone")
    with progress_bars("") as bars:

        def report(what: str, done: int, total: int) -> None:
            stop_if_strict(options, broken)
            bars(what, done, total)

        if indexes:
            index = Index(indexes[0], model, device=options.device, threads=options.threads)
            collection = collect_index(index, broken.add)
        else:
            listing = list_files(options.folders, broken.add, _say)
            collection = collect(listing, model, broken.add, threads=options.threads, progress=report)
        stop_if_strict(options, broken)
        asked = 0

        def ask(pairs: Any) -> Any:
            nonlocal asked
            looked_at = hopeful(model, collection.descriptors, pairs)
            before, asked = asked, asked + int(looked_at.sum())
            judged = judge(
                model,
                collection.files,
                collection.files,
                pairs[looked_at],
                on_broken=broken.add,
                progress=lambda done: report("pairs", before + done, asked),
                threads=options.threads,
            )
            answers = iter(judged)
            return [next(answers) if looked else None for looked in looked_at]

        found = scan(collection, ask, k=options.k, probability=least)
    names = [collection.name(place) for place in range(len(collection))]
    count = sum(name not in broken for name in names)
    return found, count, common_root([] if indexes else options.folders, names) if names else os.getcwd()


def _write(out: Path, found: Scan, title: str, options: argparse.Namespace) -> None:
    from copynce.copies.group_files import write_groups_csv, write_groups_jsonl
    from copynce.copies.pair import write_pairs_csv
    from copynce.inspect.copies_page import write_copies_report

    with writing_into(out):
        write_groups_csv(out / "groups.csv", found.groups)
        write_groups_jsonl(out / "groups.jsonl", found.groups)
        write_pairs_csv(out / "matches.csv", found.pairs)
        write_copies_report(
            out / "report.html", list(_sections(found)), title=title, link=options.link, threads=options.threads
        )


def _title(groups: Sequence[CopyGroup], count: int) -> str:
    pictures = sum(len(group.members) for group in groups)
    return f"{len(groups)} group{'' if len(groups) == 1 else 's'} of copies, {pictures} of {count} pictures"


def _rows(groups: Sequence[CopyGroup]) -> Iterator[list[str]]:
    """Of the table: a row a picture, the likely source first with the reason below."""
    shown = short_names(member.path for group in groups for member in group.members)
    for number, group in enumerate(groups, start=1):
        for member in group.members:
            first = member.pair is None
            size = f"{member.facts.width} x {member.facts.height}"
            yield [str(number) if first else "", shown[member.path], _probability(member), size]
            if first:
                yield ["", f"  {_why(group)}", "", ""]


def _probability(member: Member) -> str:
    if member.pair is None:
        return ""
    return "same bytes" if member.same_bytes else f"{member.pair.probability:.3f}"


def _why(group: CopyGroup) -> str:
    return group.why if group.source is None else f"likely source: {group.why}"


def _sections(found: Scan) -> Iterator[PictureGroup]:
    """Of the report."""
    from copynce.inspect.copies_page import GroupMember, PictureGroup

    for number, group in enumerate(found.groups, start=1):
        members = []
        for member in group.members:
            facts = member.facts
            notes = [f"{facts.size:,} bytes", *([f"taken {facts.taken}"] if facts.taken else [])]
            because = group.why if member.path == group.source else ""
            members.append(
                GroupMember(member.path, (max(facts.width, 1), max(facts.height, 1)), ", ".join(notes), because)
            )
        pairs = [member.pair for member in group.members if member.pair is not None]
        note = group.why if group.source is None else ""
        yield PictureGroup(f"group {number}, {len(members)} pictures", pairs, note, members)
    if found.across:
        note = "Copies whose pictures are not in one group: not every two of those they would join are copies."
        yield PictureGroup("across groups", found.across, note)


def _tell(found: Scan) -> None:
    unknown = sum(group.source is None for group in found.groups)
    if unknown:
        _say(
            f"{unknown} of {len(found.groups)} groups have no likely source: facts are equal, or contradict each other"
        )
    if found.across:
        _say(f"pairs of copies across groups: {len(found.across)}; not every two of what they would join are copies")
    if found.unfinished:
        _say(f"the copies of up to {max(found.unfinished)} pictures are connected, too many to ask all pairs of them; "
             "a larger -k makes their groups larger")  # fmt: skip


def _copies(groups: Sequence[CopyGroup]) -> list[Member]:
    """All but the likely sources, of groups that have one."""
    return [member for group in groups if group.source is not None for member in group.members[1:]]


def _move(groups: Sequence[CopyGroup], root: str, options: argparse.Namespace) -> None:
    from copynce.copies.moving import move_files, planned

    files = []
    for member in _copies(groups):
        reason = _stays(member)
        if reason is None:
            files.append(member.path)
        else:
            _say(f"not moved: {member.path}, {reason}")
    if not files:
        _say("nothing to move")
        return
    record = move_files(planned(files, root, options.move_to), options.move_to)
    _say(f"{len(files)} pictures moved to {options.move_to}; `copynce scan --undo {record}` brings them back")


def _stays(member: Member) -> str | None:
    """Why a file is not to be moved, if there is a reason."""
    try:
        status = os.lstat(member.path)
    except FileNotFoundError:
        return "no file by itself but a part of a shard, or gone"
    except NotADirectoryError:
        return "no file by itself but a part of a shard"
    if os.path.islink(member.path):
        return "a link"
    if status.st_size != member.facts.size or abs(status.st_mtime - member.facts.changed) > 1e-3:
        return "it has changed meanwhile"
    return None


def _undo(record: Path) -> int:
    from copynce.copies.moving import undo

    back, left = undo(record)
    for path, reason in left:
        _say(f"not moved back: {path}, {reason}")
    print(f"{back} pictures are back")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
