"""Evaluations of a run's checkpoints on a split while it trains (PROTOCOLS 2 to 4); the best by uAP is kept.

``RUN/evaluations/step-00000500/`` holds what ``copynce eval`` leaves (metrics.json, table.md, predictions) of the
checkpoint of that step, and ``evaluation.json``, written last. All processes describe pictures, or score pairs, each
its part; the main one searches and judges, while the others wait however long it takes. They read the checkpoint's
file, with ``ema`` the mean, so nothing of the training is touched. Features and scores that a kill has left serve;
they go when the evaluation is done.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from copynce.data import EvaluationSplit, open_dataset, open_pictures
from copynce.errors import ConfigError
from copynce.evaluation.predictions import read_candidates
from copynce.evaluation.protocols import Loaded, evaluate
from copynce.evaluation.settings import EvalConfig
from copynce.files import atomic_text, file_sha256
from copynce.models import load_checkpoint
from copynce.training.checkpoints import MODEL, best_checkpoint, mark_best, prune, step_of
from copynce.training.config import TrainConfig
from copynce.training.distributed import World
from copynce.training.run import Event

DONE = "evaluation.json"
#: What is logged of an evaluation; the best is chosen by the first.
LOGGED = ("uap", "rp90", "map", "recall_at_1", "recall_at_10")


class Evaluations:
    """The evaluations of the run in ``config.out``, which makes ``total`` steps; all processes use it alike.

    The split is read and checked when this is made, nothing is written before :meth:`evaluate`. Raises DataError or
    ConfigError for a split that is not right, or that has no ground truth.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int, total: int, here: World) -> None:
        self._here, self._total, self._run = here, total, Path(config.out)
        self._keep = config.keep_checkpoints
        self._every: int | None = None
        wanted = config.evaluate
        if not wanted.wanted:
            return
        self._every = wanted.every or steps_per_epoch * (wanted.every_epochs or 0)
        self._settings = EvalConfig(
            dataset=wanted.dataset,
            split=wanted.split,
            lists=wanted.lists,
            queries=wanted.queries,
            references=wanted.references,
            ground_truth=wanted.ground_truth,
            candidates=wanted.candidates,
            local_crops=False,
            score_normalization=False,
            whiten=0,
            batch_size=wanted.batch_size,
            threads=config.data.threads,
            repetitions=0,
        )
        self._split = _open(self._settings)
        if wanted.candidates is not None and here.is_main:
            ids = {"queries": self._split.queries.uuids, "references": self._split.references.uuids}
            read_candidates(wanted.candidates, **{side: set(names) for side, names in ids.items()})
        #: What is measured: uAPs of other pictures do not compare.
        self._measures = [wanted.dataset, wanted.split, wanted.lists, wanted.queries, wanted.references]
        self._measures += [wanted.ground_truth, wanted.candidates]

    def due(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is to be evaluated."""
        return self._every is not None and step > 0 and (step % self._every == 0 or step == self._total)

    def evaluate(
        self,
        checkpoint: Path,
        *,
        progress: Callable[[], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Event | None:
        """Evaluate ``checkpoint``, unless that is done; it becomes ``best`` if no other has so high a uAP.

        progress: called now and then on every process while it works. say: receives sentences on the main process.
        Returns what is to be logged, on the main process.
        """
        here, out = self._here, self._run / "evaluations" / checkpoint.name
        found: tuple[bool, str] = False, ""
        with here.together():
            if here.is_main:
                digest = file_sha256(checkpoint / MODEL)
                done = self._read(checkpoint.name)
                found = done is not None and done["model_sha256"] == digest, digest
        is_done, digest = cast(tuple[bool, str], here.broadcast_object(found))
        if not is_done:
            self._measure(checkpoint, digest, out, progress, say if here.is_main else None)
        event = None
        with here.together():
            if here.is_main:
                for folder in ("features", "scores"):
                    shutil.rmtree(out / folder, ignore_errors=True)
                event = self._judge(checkpoint)
        return event

    def _measure(
        self,
        checkpoint: Path,
        digest: str,
        out: Path,
        progress: Callable[[], None] | None,
        say: Callable[[str], None] | None,
    ) -> None:
        """Leave the results of a checkpoint in ``out``."""
        here, file, begin = self._here, checkpoint / MODEL, time.monotonic()
        with here.together():
            loaded = Loaded(load_checkpoint(file), file, digest)
            if here.is_main:
                (out / DONE).unlink(missing_ok=True)
        result = evaluate(
            self._settings,
            self._split,
            loaded,
            None,
            out,
            device=here.device,
            processes=here,
            progress=None if progress is None else lambda *_: progress(),
            say=say,
        )
        with here.together():
            if here.is_main:
                done = {
                    "step": step_of(checkpoint),
                    "model_sha256": digest,
                    "measures": self._measures,
                    "seconds": time.monotonic() - begin,
                    **{name: result.metrics[name] for name in LOGGED},
                }
                with atomic_text(out / DONE) as text:
                    json.dump(done, text, indent=1)

    def _judge(self, checkpoint: Path) -> Event:
        """Mark ``checkpoint`` as the best if it is; returns what is to be logged."""
        done = self._read(checkpoint.name)
        assert done is not None, "just written"
        before = best_checkpoint(self._run)
        best = None if before is None else self._read(before.name)
        is_best = before == checkpoint or best is None or done["uap"] > best["uap"]
        numbers = {name: done[name] for name in LOGGED}
        if is_best:
            mark_best(checkpoint, {**numbers, "split": self._split.name})
            prune(self._run, self._keep)  # the best before is one of many now
        listed = f"uAP {done['uap']:.4f}, RP90 {done['rp90']:.4f}, recall@1 {done['recall_at_1']:.4f}"
        text = f"step {done['step']}: {listed} on {self._split.name}, in {done['seconds']:.1f} s"
        if is_best:
            text += "; the best so far"
        elif best is not None:
            text += f"; the best is that of step {best['step']}, {best['uap']:.4f}"
        told = {**numbers, "best": is_best, "seconds": done["seconds"], "model_sha256": done["model_sha256"]}
        return Event("evaluation", text, told)

    def _read(self, name: str) -> dict[str, Any] | None:
        """What was written of a checkpoint's evaluation on these pictures, if it was done."""
        try:
            done = json.loads((self._run / "evaluations" / name / DONE).read_bytes())
            return done if done["measures"] == self._measures else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _open(settings: EvalConfig) -> EvaluationSplit:
    if settings.dataset is not None:
        split = open_dataset(settings.dataset, settings.split, lists=settings.lists, ground_truth=settings.ground_truth)
    else:
        assert settings.queries is not None, "checked with the settings"
        assert settings.references is not None, "as well"
        split = open_pictures(settings.queries, settings.references, ground_truth=settings.ground_truth)
    if not any(split.ground_truth.values()):
        raise ConfigError(
            f"evaluate: split {split.name!r} has no ground truth (no file, or no pair in it), so there is no uAP; give "
            "evaluate.ground_truth=FILE or another split"
        )
    return split
