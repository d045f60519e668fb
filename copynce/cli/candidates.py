"""``copynce candidates``"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from copynce.cli.console import progress_bars, writing_into
from copynce.cli.match import two_sides
from copynce.cli.settings_help import Command

if TYPE_CHECKING:
    from copynce.retrieval.candidates import CandidateScores


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "candidates",
        help="candidate pairs for a matcher, from local crops of a descriptor",
        description="Describe 45 views of each query and 9 of each reference, and keep the best references of groups "
        "of query views: candidates.csv and candidates.json (the released form). The same command goes on where it "
        "was stopped; under torchrun the processes share the work.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a run, one of its checkpoints, or a weights file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.settings = _settings
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.retrieval.matching_settings import CandidatesConfig

    return CandidatesConfig


def run(options: argparse.Namespace) -> None:
    """Find candidates, and print where they are."""
    from copynce.config import load_config
    from copynce.data import Quarantine
    from copynce.files import file_sha256
    from copynce.models import load_descriptor
    from copynce.retrieval.candidates import REFERENCE_VIEWS, find_candidates, query_views
    from copynce.retrieval.extract import FeatureStore, extract
    from copynce.retrieval.features import Features
    from copynce.retrieval.matching_settings import CandidatesConfig
    from copynce.training import find_model
    from copynce.training.distributed import announced, world

    with announced():
        config = load_config(CandidatesConfig, None, options.overrides)
        weights = find_model(options.model)
        model = load_descriptor(weights)
        queries, references = two_sides(config)
        out = Path(config.out)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with world(config.device) as here, writing_into(out), progress_bars("", shown=here.is_main) as report:
        model_hash = file_sha256(weights)
        quarantine = Quarantine()
        if here.is_main:
            out.mkdir(parents=True, exist_ok=True)
            (out / "skipped.jsonl").unlink(missing_ok=True)  # of an earlier search
            quarantine = Quarantine(out / "skipped.jsonl")
        precision = config.precision
        found: list[Features] = []
        for role, manifest, views in (
            ("query", queries, query_views(released=config.box == "released")),
            ("reference", references, REFERENCE_VIEWS),
        ):
            if here.is_main:
                manifest.report(say, quarantine.add)

            def described(done: int, name: str = f"{role} views", total: int = len(manifest)) -> None:
                report(name, done, total)

            features = extract(
                model,
                manifest,
                batch_size=config.batch_size,
                device=here.device,
                precision=precision,
                quarantine=quarantine,
                threads=config.threads,
                keep=FeatureStore(out / "features", role, model_hash),
                views=views,
                processes=here,
                progress=described,
                say=say if here.is_main else None,
            )
            precision = features.precision  # one for both
            found.append(features)
        pairs = find_candidates(
            *found,
            mode=config.mode,
            k=config.k,
            merge=config.duplicates == "merge",
            device=here.device,
            folder=out / "parts",
            processes=here,
            progress=lambda done: report("search", done, len(found[0].uuids)),
        )
        if here.is_main:
            _write(out, pairs)
    if here.is_main:
        skipped = len(queries) + len(references) - sum(len(features.uuids) for features in found)
        if skipped:
            say(f"{skipped} broken pictures were skipped; {out / 'skipped.jsonl'} lists them")
        print(
            f"{len(pairs.scores)} candidate pairs of {len(found[0].uuids)} queries and {len(found[1].uuids)} "
            f"references, described in {precision}"
        )
        print(f"candidates: {out / 'candidates.csv'}, {out / 'candidates.json'}")


def _write(out: Path, pairs: CandidateScores) -> None:
    """Both forms, with an entry for each time that a pair is there."""
    from itertools import groupby

    from copynce.data.rows import write_columns
    from copynce.files import atomic_text

    columns = pairs.queries.tolist(), pairs.references.tolist()
    write_columns(out / "candidates.csv", ("query_id", "reference_id", "score"), columns, pairs.scores.tolist())
    with atomic_text(out / "candidates.json") as file:
        separator = "["
        for query, rows in groupby(zip(*columns, pairs.scores.tolist(), strict=True), key=lambda row: row[0]):
            file.write(separator + json.dumps([query, [row[1:] for row in rows]]))
            separator = ",\n"
        file.write("]\n")
