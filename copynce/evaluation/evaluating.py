"""What every evaluation shares: folder, broken pictures, who is told of progress, how results are judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copynce.data import EvaluationSplit, Quarantine
from copynce.errors import ConfigError
from copynce.evaluation.metrics import GroundTruthLike, Predictions, Rule
from copynce.evaluation.tables import Row, judge
from copynce.files import atomic_text
from copynce.retrieval.extract import Alone, Processes

#: The files that an evaluation may leave and that tell of its results; features and scores, kept for the next one, and
#: skipped.jsonl are not among them.
RESULTS = (
    "metrics.json",
    "table.md",
    "report.html",
    "precision_recall.png",
    "predictions.csv",
    "predictions-local-views.csv",
    "predictions-matcher.csv",
    "predictions-lce.csv",
    "predictions-search.csv",
)


@dataclass(frozen=True)
class Judging:
    """How predictions become a row: the rule of average precision, and the bootstrap of the intervals (0: none)."""

    rule: Rule = "step"
    repetitions: int = 0
    seed: int = 0

    def row(self, name: str, predictions: Predictions, ground_truth: GroundTruthLike) -> Row:
        """The row called `name`."""
        return judge(name, predictions, ground_truth, rule=self.rule, repetitions=self.repetitions, seed=self.seed)


class Evaluating:
    """An evaluation of `split` that leaves its files in the folder `out`.

    progress: called as progress(role, done, total). say: receives sentences. processes: those that share the reading
    of pictures and the scoring of pairs; the first alone searches, judges and writes. Nothing is written before
    `prepare`.
    """

    def __init__(
        self,
        out: Path,
        split: EvaluationSplit,
        progress: Callable[[str, int, int], None] | None = None,
        say: Callable[[str], None] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.out, self.split = out, split
        self.processes = Alone() if processes is None else processes
        self.progress = progress or (lambda role, done, total: None)
        self.say = say if say is not None and self.is_main else (lambda text: None)
        self.quarantine = Quarantine()
        self.positives = sum(map(len, split.ground_truth.values()))
        self._prepared = self._forgotten = False

    @property
    def is_main(self) -> bool:
        """True on the process that judges and writes."""
        return self.processes.rank == 0

    def prepare(self, *folders: str) -> None:
        """Make the folder; `folders` will stand in it, beside files of `RESULTS`.

        Raises ConfigError if one of these names is taken by the other kind of thing. The first time the skipped.jsonl
        of an earlier evaluation goes, and what was left out of the manifests is told.
        """
        with self.processes.together():
            if self.is_main:
                self._prepare(folders)

    def _prepare(self, folders: tuple[str, ...]) -> None:
        for folder in (self.out / name for name in (*folders, ".")):
            for part in (folder, *folder.parents):
                if part.exists() and not part.is_dir():
                    raise ConfigError(
                        f"out: {part} must be a folder, or not there yet, but it is a file; choose another out"
                    )
        for name in (*RESULTS, "skipped.jsonl"):
            if (self.out / name).is_dir():
                raise ConfigError(f"out: {self.out / name} must be a file, or not there yet, but it is a folder")
        if self._prepared:
            return
        self._prepared = True
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "skipped.jsonl").unlink(missing_ok=True)
        self.quarantine = Quarantine(self.out / "skipped.jsonl")
        if not self.positives:
            self.say(
                f"split {self.split.name!r} has no ground truth (no file, or no pair in it): there will be "
                "predictions, but nothing to score"
            )
        for manifest in (self.split.queries, self.split.references, self.split.training):
            if manifest is not None:
                manifest.report(self.say, self.quarantine.add)

    def forget(self) -> None:
        """Remove the results of an earlier evaluation, the first time: predictions are about to be others, and what
        this evaluation does not leave would tell of another model or other rows."""
        if not self._forgotten:
            for name in RESULTS:
                (self.out / name).unlink(missing_ok=True)
        self._forgotten = True

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """metrics.json."""
        with atomic_text(self.out / "metrics.json") as file:
            json.dump(metrics, file, indent=2)
            file.write("\n")
