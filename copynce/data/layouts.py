"""Evaluation sets on disk: queries, references, training pictures and the ground truth that joins them.

Four layouts are known.

Lists: a folder with `references.csv`, one `query_NAME.csv` and `gt_NAME.json` (or `gt_NAME.csv`) per split NAME, and
maybe `train.csv`. Splits `part1` and `part2` together are also the split `dev`. A split whose ground truth is hidden
has no such file, in either layout.

DISC21: the folders `query_images`, `reference_images` and maybe `training_images`, with the ground truth files of the
2021 Image Similarity Challenge beside them or in a folder of their own; a file of several splits serves each of them.
Mind the names: `val` is its development set I (Q00000-Q24999), `dev` its development set II (Q25000-Q49999, where
papers report), `test` its phase 2 (Q50000-Q99999).

SSCD: DISC21 as SSCD's scripts expect it (PROTOCOLS 1.1): the folders `val_query`, `val_ref` and maybe `training`, with
`val_groundtruth_matches.csv`; split `val`.

Copydays: the folders `original`, `strong`, `crops/NN` and `jpeg/NN` (PROTOCOLS 13.2), maybe `distractors`, which are
references too, and `training`. Splits: `all`, and the queries of one of the four folders. A query copies the originals
whose file names begin with the same four characters.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from copynce.data.manifest import Manifest, read_manifest
from copynce.data.rows import read_columns
from copynce.errors import DataError
from dali_pipelines.sources import ShardMember

GroundTruth = dict[str, list[str]]
_NOTHING = ("nan", "none", "null")  # how programs write a field that is empty


@dataclass(frozen=True)
class EvaluationSplit:
    """What one evaluation needs.

    queries, references: pictures to search with, and in. training: pictures for score normalisation, None if the data
    set has none. ground_truth: uuids of the references that each query copies, empty for a distractor and for all
    where there is no ground truth; every query is a key, every reference in it is one of `references`. protocol: what
    the set is evaluated by (`copynce.evaluation.protocols`). groups: {name: queries} that are reported beside all.
    """

    name: str
    queries: Manifest
    references: Manifest
    training: Manifest | None
    ground_truth: GroundTruth
    protocol: str = "copynce"
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Disc21Split:
    first: int  # query numbers, both ends included
    last: int
    query_list: str
    ground_truths: tuple[str, ...]  # file names, the first one found is read
    protocol: str = "copynce"


# The challenge's files of all development queries.
_DEVELOPMENT = ("dev_ground_truth.csv", "dev_queries_groundtruth.csv")

_DISC21 = {
    "val": _Disc21Split(
        0,
        24_999,
        "isc_25k_matching_val_set_query.csv",
        ("isc_25k_matching_val_set_gt.json", "isc_public_ground_truth.csv", "public_ground_truth.csv", *_DEVELOPMENT),
    ),
    "dev": _Disc21Split(
        25_000,
        49_999,
        "isc_25k_matching_dev_set_query.csv",
        ("isc_25k_matching_dev_set_gt.json", *_DEVELOPMENT),
    ),
    "test": _Disc21Split(
        50_000,
        99_999,
        "isc_matching_test_set_query.csv",
        ("isc_matching_test_set_gt.json", "test_ground_truth.csv", "test_queries_groundtruth.csv"),
        "phase2",
    ),
}


def open_dataset(
    root: str | os.PathLike[str],
    split: str,
    *,
    lists: str | os.PathLike[str] | None = None,
    ground_truth: str | os.PathLike[str] | None = None,
) -> EvaluationSplit:
    """The split `split` of the data set in the folder `root` (see this module's text for the layouts).

    lists: folder with the query list and ground truth of a DISC21 split; `root` by default. ground_truth: a file to
    read in place of the data set's own.
    Raises DataError if the folder has neither layout, has no such split (the message lists those it has), or if
    pictures, lists and ground truth do not fit together.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected an evaluation set")
    truth = None if ground_truth is None else Path(ground_truth)
    if (root / "query_images").is_dir():
        return _open_disc21(root, split, root if lists is None else Path(lists), truth)
    if lists is not None and any((root / name).exists() for name in ("references.csv", "val_query", "original")):
        raise DataError(f"lists is for the DISC21 layout, but {root} holds its own lists; leave it out")
    if (root / "references.csv").is_file():
        return _open_lists(root, split, truth)
    if (root / "val_query").is_dir():
        _check_split(root, split, ["val"])
        training = root / "training"
        return open_pictures(
            root / "val_query",
            root / "val_ref",
            training=training if training.is_dir() else None,
            ground_truth=truth or _first_file(root, ("val_groundtruth_matches.csv",)),
            name="val",
            protocol="sscd",
        )
    if (root / "original").is_dir():
        if truth is not None:
            raise DataError(f"{root}: Copydays' file names are its ground truth; leave out ground_truth={truth}")
        return _open_copydays(root, split)
    raise DataError(
        f"{root}: not an evaluation set; expected references.csv with query_NAME.csv and gt_NAME.json, "
        "the folders query_images and reference_images (DISC21), val_query and val_ref (SSCD's DISC21), or original "
        "and strong (Copydays)"
    )


def open_pictures(
    queries: str | os.PathLike[str],
    references: str | os.PathLike[str],
    *,
    training: str | os.PathLike[str] | None = None,
    ground_truth: str | os.PathLike[str] | None = None,
    name: str = "pictures",
    protocol: str = "copynce",
) -> EvaluationSplit:
    """Any queries and references: CSVs, folders or shards (`read_manifest`), with a ground truth in JSON or CSV.

    The ground truth speaks of the manifests' uuids; None: it is hidden. Raises DataError where these do not fit.
    """
    return _checked_split(
        EvaluationSplit(
            name=name,
            queries=read_manifest(queries),
            references=read_manifest(references),
            training=None if training is None else read_manifest(training),
            ground_truth={} if ground_truth is None else read_ground_truth(ground_truth),
            protocol=protocol,
        )
    )


def _open_copydays(root: Path, split: str) -> EvaluationSplit:
    known = ("original", "strong", "crops", "jpeg")
    found = {name: _below(root, name) for name in known if (root / name).is_dir()}
    _check_split(root, split, ["all", *found])
    originals: dict[str, list[str]] = {}
    for uuid in found["original"].uuids:
        originals.setdefault(_block(uuid), []).append(uuid)
    references, training = found["original"], root / "training"
    if (root / "distractors").is_dir():
        references = _joined(root, [references, _below(root, "distractors")])
    queries = _joined(root, list(found.values())) if split == "all" else found[split]
    return _checked_split(
        EvaluationSplit(
            name=split,
            queries=queries,
            references=references,
            training=read_manifest(training) if training.is_dir() else None,
            ground_truth={uuid: originals.get(_block(uuid), []) for uuid in queries.uuids},
            protocol="copydays",
            groups={name: list(part.uuids) for name, part in found.items()} if split == "all" else {},
        )
    )


def _block(uuid: str) -> str:
    """The four characters that the names of an original and its copies begin with."""
    return uuid.rpartition("/")[2][:4]


def _below(root: Path, name: str) -> Manifest:
    """The pictures of a folder in `root`; their uuids begin with its name."""
    manifest = read_manifest(root / name)
    return dataclasses.replace(manifest, uuids=[f"{name}/{uuid}" for uuid in manifest.uuids])


def _joined(root: Path, parts: Sequence[Manifest]) -> Manifest:
    uuids = [uuid for part in parts for uuid in part.uuids]
    paths = [path for part in parts for path in part.paths]
    left_out = sum((part.left_out for part in parts), Counter())
    return Manifest(uuids, paths, root, left_out, {k: v for part in parts for k, v in part.no_files.items()})


def _open_lists(root: Path, split: str, truth: Path | None) -> EvaluationSplit:
    parts = {name: (name,) for name in sorted(p.stem.removeprefix("query_") for p in root.glob("query_*.csv"))}
    available: dict[str, tuple[str, ...]] = dict(parts)
    if {"part1", "part2"} <= parts.keys():
        available.setdefault("dev", ("part1", "part2"))
    _check_split(root, split, list(available))

    files = {part: _first_file(root, (f"gt_{part}.json", f"gt_{part}.csv")) for part in available[split]}
    hidden = [part for part, file in files.items() if file is None]
    if truth is None and 0 < len(hidden) < len(files):  # copies among their queries would count as wrong answers
        raise DataError(
            f"{root}: split {split!r} has no ground truth of its part {hidden[0]}; expected gt_{hidden[0]}.json or "
            f"gt_{hidden[0]}.csv as of the other, or evaluate the parts one by one"
        )
    uuids: list[str] = []
    paths: list[Path | ShardMember] = []
    ground_truth: GroundTruth = {}
    for part, file in files.items():
        queries = read_manifest(root / f"query_{part}.csv")
        repeated = set(uuids).intersection(queries.uuids)
        if repeated:
            raise DataError(f"{root}: query {min(repeated)!r} is in more than one part of split {split!r}")
        uuids += queries.uuids
        paths += queries.paths
        ground_truth |= {} if file is None or truth is not None else read_ground_truth(file)
    train = root / "train.csv"
    return _checked_split(
        EvaluationSplit(
            name=split,
            queries=Manifest(uuids, paths, root),
            references=read_manifest(root / "references.csv"),
            training=read_manifest(train) if train.is_file() else None,
            ground_truth=ground_truth if truth is None else read_ground_truth(truth),
        )
    )


def _open_disc21(root: Path, split: str, lists: Path, truth: Path | None) -> EvaluationSplit:
    _check_split(root, split, list(_DISC21))
    facts = _DISC21[split]
    query_list = lists / facts.query_list
    if query_list.is_file():
        queries = read_manifest(query_list, root=root)
    else:
        pictures = read_manifest(root / "query_images")
        position = {uuid: i for i, uuid in enumerate(pictures.uuids)}
        wanted = [f"Q{number:05d}" for number in range(facts.first, facts.last + 1)]
        absent = [uuid for uuid in wanted if uuid not in position]
        if absent:
            raise DataError(
                f"{root / 'query_images'}: {len(absent)} of the {len(wanted)} queries of split {split!r} are missing, "
                f"the first is {absent[0]}; a list {facts.query_list} would choose fewer"
            )
        queries = pictures.select(position[uuid] for uuid in wanted)
    training = root / "training_images"
    truth = truth or _first_file(lists, facts.ground_truths) or _first_file(root, facts.ground_truths)
    return _checked_split(
        EvaluationSplit(
            name=split,
            queries=queries,
            references=read_manifest(root / "reference_images"),
            training=read_manifest(training) if training.is_dir() else None,
            ground_truth={} if truth is None else _of_split(read_ground_truth(truth), facts, truth),
            protocol=facts.protocol,
        )
    )


def _of_split(ground_truth: GroundTruth, facts: _Disc21Split, path: Path) -> GroundTruth:
    """What a file that may be of several splits says of the queries of one."""
    others = [other for other in _DISC21.values() if other is not facts]

    def number(query: str) -> int:
        return int(query[1:]) if re.fullmatch(r"Q\d{5}", query) else -1

    kept = {
        query: found
        for query, found in ground_truth.items()
        if not any(other.first <= number(query) <= other.last for other in others)
    }
    if not kept:
        raise DataError(
            f"{path}: none of its {len(ground_truth)} queries is of this split (Q{facts.first:05d} to "
            f"Q{facts.last:05d}), the first is {next(iter(ground_truth))!r}"
        )
    return kept


def _check_split(root: Path, split: str, available: list[str]) -> None:
    if split not in available:
        raise DataError(f"{root}: no split {split!r}; available: {', '.join(available) or 'none'}")


def _first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _checked_split(split: EvaluationSplit) -> EvaluationSplit:
    """`split` with every query a key of the ground truth; DataError if the ground truth speaks of absent pictures."""
    queries, references = set(split.queries.uuids), set(split.references.uuids)
    strange = [query for query in split.ground_truth if query not in queries]
    if strange:
        raise DataError(
            f"split {split.name!r}: {len(strange)} queries of the ground truth are not in the query list, "
            f"the first is {strange[0]!r}"
        )
    absent = [r for found in split.ground_truth.values() for r in found if r not in references]
    if absent:
        several = any(references.issuperset(absent[0].split(separator)) for separator in (" ", ",", ", ", ";", "|"))
        raise DataError(
            f"split {split.name!r}: {len(absent)} references of the ground truth are not among the "
            f"{len(references)} reference pictures, the first is {absent[0]!r}"
            + ("; give each reference a line of its own" if several else "")
        )
    # A list of positives only is complete as well: the other queries copy nothing.
    complete = {query: split.ground_truth.get(query, []) for query in split.queries.uuids}
    return dataclasses.replace(split, ground_truth=complete)


def read_ground_truth(path: str | os.PathLike[str]) -> GroundTruth:
    """{query: [references]} of a JSON object of that form, or of a CSV `query_id,reference_id`.

    In the CSV the header is optional (where there is one, other columns are left out), the second field is empty for a
    distractor, and a query with several references has a line for each. Whatever is not called .csv and begins with a
    brace is JSON. Raises DataError where the file has another form.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a ground truth in JSON or CSV")
    if path.suffix.lower() == ".csv":
        return _read_ground_truth_csv(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix.lower() == ".json" or content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        return _ground_truth_of_json(path, content)
    return _read_ground_truth_csv(path)


def _ground_truth_of_json(path: Path, text: bytes) -> GroundTruth:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise DataError(f"{path}: query {repeated!r} is given twice")
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); expected one object {{query: [references]}}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object {{query: [references]}}, got a {type(content).__name__}")
    for query, references in content.items():
        if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
            raise DataError(
                f"{path}: query {query!r} must have a list of reference uuids, got {references!r}; uuids are text in "
                'quotes, as in {"Q1": ["R1"], "Q2": []}'
            )
    return content


def _read_ground_truth_csv(path: Path) -> GroundTruth:
    ground_truth: GroundTruth = {}
    for line, (query, reference) in read_columns(path, ("query_id", "reference_id")):
        if not query:
            raise DataError(f"{path}, line {line}: expected query_id,reference_id, got {[query, reference]}")
        if reference.casefold() in _NOTHING:
            raise DataError(
                f"{path}, line {line}: reference {reference!r}; leave the field empty where a query copies nothing (or "
                "use JSON, if a picture is called so)"
            )
        if any(separator in reference for separator in ",;|"):
            raise DataError(
                f"{path}, line {line}: reference {reference!r}; give each reference a line of its own (or use JSON, if "
                "a picture is called so)"
            )
        references = ground_truth.setdefault(query, [])
        if reference:
            references.append(reference)
    if not ground_truth:
        raise DataError(f"{path}: the file is empty, or only a header; expected lines query_id,reference_id")
    return ground_truth
