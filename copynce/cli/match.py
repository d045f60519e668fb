"""``copynce match``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copynce.cli.console import progress_bars, writing_into
from copynce.cli.settings_help import Command

if TYPE_CHECKING:
    from copynce.data import Manifest
    from copynce.retrieval.matching_settings import TwoSides
    from copynce.retrieval.pair_scores import PairScores


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "match",
        help="scores of candidate pairs by a matcher",
        description="Score candidate pairs: predictions.csv (ISC2021) and predictions.json (the released form). Each "
        "picture is encoded once for all of its pairs. Pairs with a broken picture have no score: unscored.csv and "
        "skipped.jsonl list them. The same command goes on where it was stopped; under torchrun the processes share "
        "the work.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("matcher", metavar="MATCHER", help="a run, one of its checkpoints, or a weights file")
    parser.add_argument("candidates", metavar="CANDIDATES", help="pairs or scores as CSV or in the released JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.settings = _settings
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.retrieval.matching_settings import MatchConfig

    return MatchConfig


def run(options: argparse.Namespace) -> None:
    """Score pairs, and print where the scores are."""
    from copynce.config import load_config
    from copynce.data import Quarantine
    from copynce.evaluation import read_candidates
    from copynce.files import file_sha256
    from copynce.models import load_matcher
    from copynce.models.box import MATCHER
    from copynce.retrieval.matching import score_pairs
    from copynce.retrieval.matching_settings import MatchConfig
    from copynce.retrieval.pair_scores import ScoreStore
    from copynce.training import find_model
    from copynce.training.distributed import announced, world

    with announced():
        config = load_config(MatchConfig, None, options.overrides)
        weights = find_model(options.matcher, boxed=MATCHER)
        matcher = load_matcher(weights)
        queries, references = two_sides(config)
        pairs = read_candidates(options.candidates, queries=set(queries.uuids), references=set(references.uuids))
        out = Path(config.out)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with world(config.device) as here, writing_into(out), progress_bars("", "pairs", shown=here.is_main) as report:
        model_hash = file_sha256(weights)
        quarantine = Quarantine()
        if here.is_main:
            out.mkdir(parents=True, exist_ok=True)
            (out / "skipped.jsonl").unlink(missing_ok=True)  # of an earlier matching
            quarantine = Quarantine(out / "skipped.jsonl")
            for manifest in (queries, references):
                manifest.report(say, quarantine.add)
        found = score_pairs(
            matcher,
            pairs,
            queries,
            references,
            local_crops=config.local_crops,
            batch_size=config.batch_size,
            device=here.device,
            precision=config.precision,
            threads=config.threads,
            memory=round(config.memory * 1e9),
            part=config.part,
            quarantine=quarantine,
            keep=ScoreStore(out / "parts", model_hash),
            processes=here,
            progress=lambda done: report("pairs", done, len(pairs.queries)),
            say=say,
        )
        with here.together():
            if here.is_main:
                facts = {
                    "local_crops": config.local_crops,
                    "model": str(Path(weights).absolute()),
                    "model_sha256": model_hash,
                    "candidates": str(Path(options.candidates).absolute()),
                    "candidates_sha256": file_sha256(options.candidates),
                    "batch_size": config.batch_size,
                    "processes": here.size,
                }
                _write(out, found, facts)
    if here.is_main:
        print(
            f"{len(found.scores)} pairs scored in {found.precision}: {found.encodings} encoder passes, "
            f"{found.fusions} fusion passes"
        )
        if found.unscored:
            print(
                f"{len(found.unscored)} pairs have no score, for a picture of theirs is broken: "
                f"{out / 'unscored.csv'} and {out / 'skipped.jsonl'} list them",
                file=sys.stderr,
            )
        print(f"scores: {out / 'predictions.csv'}, {out / 'predictions.json'}")


def two_sides(config: TwoSides) -> tuple[Manifest, Manifest]:
    """The queries and references that the settings name."""
    from copynce.data import open_dataset, read_manifest

    if config.dataset is not None:
        split = open_dataset(config.dataset, config.split, lists=config.lists)
        return split.queries, split.references
    assert config.queries is not None, "checked when the settings were made"
    assert config.references is not None, "as well"
    return read_manifest(config.queries), read_manifest(config.references)


def _write(out: Path, found: PairScores, facts: dict[str, Any]) -> None:
    """The files of a matching. Raises DataError if no pair has a score."""
    import json

    from copynce import __version__
    from copynce.data.rows import write_rows
    from copynce.errors import DataError
    from copynce.evaluation import Predictions, write_predictions
    from copynce.files import atomic_text
    from copynce.provenance import processor_name, running_commit

    (out / "match.json").unlink(missing_ok=True)  # it would speak of other scores
    (out / "unscored.csv").unlink(missing_ok=True)
    if found.unscored:
        write_rows(out / "unscored.csv", [("query_id", "reference_id"), *found.unscored])
    forms = [out / "predictions.csv", out / "predictions.json"]
    if not len(found.scores):
        for path in forms:
            path.unlink(missing_ok=True)  # of an earlier matching
        raise DataError(
            f"{facts['candidates']}: none of the {len(found.unscored)} pairs can be scored, in each a picture is "
            f"broken; {out / 'unscored.csv'} and {out / 'skipped.jsonl'} list them"
        )
    predictions = Predictions(found.queries, found.references, found.scores)
    for path in forms:
        write_predictions(path, predictions)
    facts = {
        "pairs": len(found.scores),
        "unscored": len(found.unscored),
        "encoder_passes": found.encodings,
        "fusion_passes": found.fusions,
        "precision": found.precision,
        **facts,
        "processor": processor_name(),
        "version": __version__,
        "commit": running_commit(),
    }
    with atomic_text(out / "match.json") as file:
        json.dump(facts, file, indent=2)
        file.write("\n")
