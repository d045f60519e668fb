"""The published evaluations: what each asks for where the settings leave it open, and how one is run as a whole.

    copynce   dev set I and II: 10 predictions a query, step rule, normalisation of ranks 1 to 4 (PROTOCOLS 2, 3)
    phase2    the same for the challenge's last 50,000 queries, at most 10 pairs a query over all (PROTOCOLS 1.4, 1.5).
              No query is looked at for another: precision=auto, which looks at the first ones, is fp32
    ndec      that of copynce (PROTOCOLS 13.3)
    copydays  100 predictions a query, trapezoid rule, "strong" by itself (PROTOCOLS 13.2)
    sscd      10 predictions a query, normalisation of ranks 0 to 2, raw and whitened (PROTOCOLS 13.1)

A table is a row per result: the descriptor, with score normalisation, by local views of the queries, the matcher on
the descriptor's candidates, with local crops ensembling, and a search with all that a box has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from copynce.data import EvaluationSplit
from copynce.errors import ConfigError
from copynce.evaluation.descriptor import DescriptorOptions, judge_descriptor
from copynce.evaluation.evaluating import RESULTS, Evaluating, Judging
from copynce.evaluation.local_views import judge_local_views
from copynce.evaluation.matcher import MatcherOptions, judge_matcher
from copynce.evaluation.metrics import Rule, mean_average_precision
from copynce.evaluation.predictions import read_candidates
from copynce.evaluation.settings import CANDIDATES, START, EvalConfig
from copynce.evaluation.tables import Metrics, Row, markdown_table, row_facts, told_in_rows
from copynce.files import atomic_text
from copynce.models import Descriptor, Matcher
from copynce.retrieval.extract import Precision, Processes
from copynce.retrieval.matching import MEMORY

if TYPE_CHECKING:
    from copynce.model import Model


@dataclass(frozen=True)
class Protocol:
    """k: predictions of a query. start, end: ranks of score normalisation. rule: of average precision. per_query:
    pairs over all queries, times their number. precision: what "auto" stands for. whiten: dimensions. note: what
    differs here."""

    k: int = 10
    start: int = START
    end: int = 5
    rule: Rule = "step"
    per_query: int | None = None
    precision: Precision = "auto"
    whiten: int | None = None
    note: str = ""


PROTOCOLS = {
    "copynce": Protocol(),
    "phase2": Protocol(per_query=10, precision="fp32"),
    "ndec": Protocol(),
    "copydays": Protocol(k=100, rule="trapezoid"),
    "sscd": Protocol(
        start=0,
        end=3,
        whiten=512,
        note="pictures are squeezed to the model's square input, where SSCD keeps their aspect ratio (short side 288) "
        "or uses 288 x 288 or 320 x 320",
    ),
}


@dataclass(frozen=True)
class Loaded:
    """A model, the file that it was read from, and the file's hash, for a training may replace it meanwhile."""

    model: Descriptor | Matcher
    file: Path
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """metrics: what metrics.json holds. rows: of the table, none where there is no ground truth. protocol: its name."""

    metrics: Metrics
    rows: list[Row] = field(default_factory=list)
    protocol: str = "copynce"


def evaluate(
    config: EvalConfig,
    split: EvaluationSplit,
    model: Loaded,
    matcher: Loaded | None,
    out: Path,
    *,
    searching: Model | None = None,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluate a descriptor, with a `matcher` on its candidates where one is given; or a matcher by itself on a file of
    candidates; and `searching`, a descriptor with its calibration, where the config asks for a search. Leaves in `out`:
    predictions.csv, predictions-local-views.csv, predictions-matcher.csv, predictions-lce.csv,
    predictions-matcher-local-views.csv, predictions-search.csv, metrics.json, table.md.

    processes: those that share the work; the first writes, and alone has the whole result.
    Raises ConfigError for models and settings that do not fit each other; other errors as of `evaluate_descriptor` and
    `judge_matcher`.
    """
    if isinstance(model.model, Matcher):
        if matcher is not None:
            raise ConfigError(f"{model.file} is a matcher's; with matcher=, the first model is a descriptor's")
        if config.candidates is None:
            raise ConfigError(
                f"{model.file} is a matcher's, which scores pairs: give candidates=FILE, or a descriptor that finds "
                f"them, as in copynce eval DESCRIPTOR matcher={model.file}"
            )
        descriptor, matcher = None, model
    else:
        descriptor = model
        if matcher is not None and not isinstance(matcher.model, Matcher):
            raise ConfigError(f"matcher: {matcher.file} is a descriptor's, expected a matcher's")

    name, settings = settle(config, split, descriptor=descriptor is not None, matcher=matcher is not None)
    _check_inputs(config, out)
    if config.search and processes is not None and processes.size > 1:
        raise ConfigError("search works in one process: start copynce eval without torchrun, or leave out search")
    evaluating = Evaluating(out, split, progress, say, processes)
    if note := PROTOCOLS[name].note:
        evaluating.say(f"protocol {name}: {note}")
    candidates = views = None
    if config.candidates is not None:
        candidates = read_candidates(
            config.candidates, queries=set(split.queries.uuids), references=set(split.references.uuids)
        )
    judging = Judging(settings.rule, config.repetitions, config.seed)
    metrics: Metrics = {}
    rows: list[Row] = []
    if descriptor is not None:
        wanted = (config.candidates_k or CANDIDATES) if matcher is not None and candidates is None else 0
        options = DescriptorOptions(
            batch_size=config.batch_size,
            device=device,
            precision=settings.precision,
            k=settings.k,
            global_candidates=settings.global_candidates,
            score_normalization=settings.score_normalization,
            alpha=1.0 if config.alpha is None else config.alpha,
            start=settings.start,
            end=settings.end,
            threads=config.threads,
            whiten=settings.whiten,
            candidates=wanted,
            judging=judging,
        )
        result = judge_descriptor(descriptor.model, evaluating, options, descriptor.file, descriptor.sha256)
        metrics, rows = dict(result.metrics), list(result.rows)
        found_by, found_in = result.candidates, None
        if config.local_views:
            local = judge_local_views(
                descriptor.model, evaluating, options, result.metrics["precision"], descriptor.sha256
            )
            metrics |= local.metrics
            rows += local.rows
            found_by, found_in = local.candidates, local.views
        if candidates is None:
            candidates, views = found_by, found_in
    if matcher is not None:
        assert isinstance(matcher.model, Matcher), "checked above"
        assert candidates is not None, "as well"
        matching = MatcherOptions(
            local_crops=config.local_crops is not False,
            batch_size=config.batch_size,
            device=device,
            precision=settings.precision,
            threads=config.threads,
            memory=MEMORY if config.memory is None else round(config.memory * 1e9),
            global_candidates=settings.pairs,
            judging=judging,
        )
        found = judge_matcher(matcher.model, candidates, evaluating, matching, matcher.file, matcher.sha256, views)
        metrics |= found.metrics
        if descriptor is None and found.rows:  # the first row of a table is at the top
            metrics = {"split": split.name, **found.rows[0].metrics, **metrics}
        rows += found.rows
    if config.search:
        # Not before: an index's engine starts threads, which a training that evaluates, and forks, must not have.
        from copynce.evaluation.searching import judge_search

        assert searching is not None, "whoever asks for a search gives it"
        facts, searched = judge_search(searching, evaluating, judging, config.threads, settings.pairs)
        metrics |= facts
        rows += searched
    with evaluating.processes.together():
        if evaluating.is_main:
            _write(evaluating, metrics, rows, settings.rule, {"protocol": name, "ap": settings.rule,
                   "repetitions": config.repetitions, "seed": config.seed})  # fmt: skip
    return Evaluation(metrics, rows, name)


def _write(evaluating: Evaluating, metrics: Metrics, rows: list[Row], rule: Rule, facts: Metrics) -> None:
    """table.md and metrics.json; `metrics` receives the `facts` and what is told of the rows and groups."""
    split = evaluating.split
    metrics |= facts
    if rows and split.groups:
        truth = {}
        for group, names in split.groups.items():
            its = set(names)
            truth[group] = {query: found if query in its else [] for query, found in split.ground_truth.items()}
        scored = {group: part for group, part in truth.items() if any(part.values())}
        with told_in_rows():
            metrics |= {
                f"map_{group}": mean_average_precision(rows[0].predictions, part, rule=rule)
                for group, part in scored.items()
            }
    metrics["rows"] = [row_facts(row) for row in rows]
    if rows:
        with atomic_text(evaluating.out / "table.md") as file:
            file.write(markdown_table(rows))
    evaluating.write_metrics(metrics)


def _check_inputs(config: EvalConfig, out: Path) -> None:
    """Raise ConfigError if a file to read is one that the evaluation replaces."""
    results = {(out / name).resolve() for name in RESULTS}
    for name in ("candidates", "ground_truth", "queries", "references", "training"):
        file = getattr(config, name)
        if file is not None and Path(file).resolve() in results:
            raise ConfigError(f"{name}: {file} is a file that this evaluation would replace; choose another out")


@dataclass(frozen=True)
class Settled:
    """What the settings and the protocol say together."""

    k: int
    start: int
    end: int
    rule: Rule
    global_candidates: int | None
    pairs: int | None  # the same for a matcher, whose candidates may be any number
    precision: Precision
    score_normalization: bool
    whiten: int | None


def settle(config: EvalConfig, split: EvaluationSplit, *, descriptor: bool, matcher: bool) -> tuple[str, Settled]:
    """The protocol's name, and what it and the settings say together, with such models.

    Raises ConfigError for a setting that was given but has no use.
    """
    name = split.protocol if config.protocol == "auto" else config.protocol
    settled = _settled(config, PROTOCOLS[name], split, with_matcher=matcher)
    config.check_use(descriptor=descriptor, matcher=matcher, normalised=settled.score_normalization)
    return name, settled


def _settled(config: EvalConfig, protocol: Protocol, split: EvaluationSplit, *, with_matcher: bool) -> Settled:
    k = protocol.k if config.k is None else config.k
    most = None if protocol.per_query is None else protocol.per_query * len(split.queries)
    pairs = most if config.global_candidates is None else config.global_candidates
    capped = pairs if config.global_candidates is not None or k > (protocol.per_query or k) else None
    end = protocol.end if config.end is None else config.end
    normalised = config.score_normalization
    if normalised is None:
        asked = with_matcher or protocol is PROTOCOLS["sscd"]
        normalised = asked and split.training is not None and len(split.training) >= end
    return Settled(
        k=k,
        start=protocol.start if config.start is None else config.start,
        end=end,
        rule=protocol.rule if config.ap == "auto" else config.ap,
        global_candidates=capped,
        pairs=pairs,
        precision=protocol.precision if config.precision == "auto" else config.precision,
        score_normalization=normalised,
        whiten=(config.whiten or None) if config.whiten is not None else protocol.whiten if split.training else None,
    )
