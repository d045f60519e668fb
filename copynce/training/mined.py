"""Neighbours that a run mines itself (PROTOCOLS 5 and 6.3): which table a step uses, and how one is made.

``RUN/mined/epoch-0004/`` holds ``neighbours.npy``, the table of the steps from the fourth epoch's end on, and
``made_from.json``, written last: the model's hash, the settings, the pictures and the table's own hash. It is mined by
the model of the checkpoint that is written then, or at the start by another one that is given. So the table of a step
follows from its number and from files in the run's folder: a run that continues takes it from there, or mines it again
with the same weights; features and neighbours that a kill has left serve.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from copynce.data import read_neighbours
from copynce.data.neighbours import no_neighbours
from copynce.data.pairs import PairSource, fingerprint_of
from copynce.data.settings import SupervisedData
from copynce.data.sources import neighbour_columns, open_source, with_neighbours
from copynce.errors import ConfigError, RunError
from copynce.files import atomic_text, file_sha256
from copynce.models import Descriptor, load_checkpoint
from copynce.retrieval.describe import describe_lists
from copynce.retrieval.features import read_features
from copynce.retrieval.mining import mine
from copynce.training.checkpoints import checkpoints, find_model, step_of
from copynce.training.config import TrainConfig
from copynce.training.distributed import World
from copynce.training.run import Event

TABLE, MADE_FROM = "neighbours.npy", "made_from.json"


def open_pairs(config: TrainConfig) -> PairSource:
    """The pairs of a run as it begins; neighbours that are to be mined first are not known yet."""
    source = open_source(config.data, config.seed)
    return with_neighbours(source, no_neighbours(len(source.pictures))) if config.mining.at_start else source


class MinedNeighbours:
    """The neighbours of a run in ``config.out`` with the pairs ``source``; all processes use it alike.

    ``source``: the pairs with the neighbours of the step that was prepared last. Raises ConfigError if the model that
    is to mine at the start is not there, or no descriptor's; nothing is written before :meth:`prepare`.
    """

    def __init__(self, config: TrainConfig, source: PairSource, steps_per_epoch: int, here: World) -> None:
        self.source = self._first = source
        self._settings, self._here, self._steps_per_epoch = config.mining, here, steps_per_epoch
        self._run = Path(config.out)
        self._threads = config.data.threads
        self._card: dict[str, Any] | None = None
        self._k = 0
        if config.mining.wanted:
            assert not isinstance(config.data, SupervisedData), "checked with the settings"
            self._k = config.mining.k or neighbour_columns(config.data)
            self._pictures = fingerprint_of(source.pictures.uuids)
        if config.mining.model is not None and here.is_main and not (self._folder(0) / MADE_FROM).exists():
            _check_given(config.mining.model)

    def due(self, step: int) -> bool:
        """Whether neighbours are mined when ``step`` steps are done."""
        epoch, within = divmod(step, self._steps_per_epoch)
        return within == 0 and self._mined_at(epoch) == epoch

    def spans(self, first: int, last: int) -> Iterator[range]:
        """The steps from ``first`` to ``last`` - 1 in parts of one table each."""
        every = self._settings.every
        length = last if every is None else every * self._steps_per_epoch
        while first < last:
            end = min(last, (first // length + 1) * length)
            yield range(first, end)
            first = end

    def state(self) -> dict[str, Any] | None:
        """The table in use, for a checkpoint; None: none that was mined."""
        return self._card

    def expect(self, state: dict[str, Any] | None, step: int) -> None:
        """Raise RunError unless the run can go on after ``step`` steps with the table of a checkpoint's ``state``."""
        epoch = self._mined_at(step // self._steps_per_epoch)
        if epoch is None or self.due(step):
            return
        found = self._found(epoch) if self._here.is_main else None
        if self._here.is_main and (found is None or state is None or found["sha256"] != state["sha256"]):
            raise RunError(
                f"{self._folder(epoch) / TABLE}: the neighbours that {self._run} was trained with after step {step} "
                "are not there any more as they were; put the folder back, or begin another run"
            )

    def prepare(
        self,
        step: int,
        checkpoint: Path,
        *,
        progress: Callable[[], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Event | None:
        """Have the neighbours of the steps after ``step``, in ``source``: those that are there, or newly mined.

        checkpoint: that of ``step``. progress: called now and then on every process while it works. say: receives
        sentences on the main process. Returns what was done, if anything was.
        """
        epoch = self._mined_at(step // self._steps_per_epoch)
        if epoch is None:
            return None
        here, event = self._here, None
        found: tuple[dict[str, Any], str] = {}, ""
        with here.together():
            if here.is_main:
                found = self._found_or_model(step, epoch, checkpoint)
        made, model = cast(tuple[dict[str, Any], str], here.broadcast_object(found))
        if not made:
            event, made = self._mine(step, epoch, Path(model), progress, say)
        with here.together():
            if here.is_main:
                self._tidy(epoch)
            table = read_neighbours(self._folder(epoch) / TABLE, self._first.pictures, self._k)
            self.source = with_neighbours(self._first, table)
        self._card = {"epoch": epoch, "sha256": made["sha256"]}
        return event

    def _mined_at(self, epoch: int) -> int | None:
        """The epoch at whose begin the neighbours of ``epoch`` are mined; None: they are those of data.neighbours."""
        every = self._settings.every
        begun = 0 if every is None else epoch - epoch % every
        return begun if begun > 0 or self._settings.at_start else None

    def _folder(self, epoch: int) -> Path:
        return self._run / "mined" / f"epoch-{epoch:04d}"

    def _found(self, epoch: int) -> dict[str, Any] | None:
        """What the table of an epoch was made from, if it is there and whole, and of these pictures and settings."""
        folder = self._folder(epoch)
        try:
            made = json.loads((folder / MADE_FROM).read_bytes())
            fits = made["k"] == self._k and made["pictures"] == self._pictures
            return made if fits and file_sha256(folder / TABLE) == made["sha256"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _found_or_model(self, step: int, epoch: int, checkpoint: Path) -> tuple[dict[str, Any], str]:
        """(what the table of an epoch was made from, ""), or ({}, the model that is to mine it)."""
        given = self._settings.model if epoch == 0 else None
        made = self._found(epoch)
        # Mined by other weights, it is that of an attempt whose checkpoint was lost.
        if made is not None and given is None and self.due(step):
            made = made if made["model_sha256"] == file_sha256(find_model(checkpoint)) else None
        return ({}, str(find_model(given or checkpoint))) if made is None else (made, "")

    def _mine(
        self,
        step: int,
        epoch: int,
        model: Path,
        progress: Callable[[], None] | None,
        say: Callable[[str], None] | None,
    ) -> tuple[Event, dict[str, Any]]:
        """Make the table of an epoch; returns what was done, and what the table was made from."""
        here, folder, begin = self._here, self._folder(epoch), time.monotonic()
        pictures, features = self._first.pictures, folder / "features"
        report = None if progress is None else lambda *_: progress()
        with here.together():
            if here.is_main:
                (folder / MADE_FROM).unlink(missing_ok=True)
        describe_lists(
            model,
            {"train": pictures},
            features,
            batch_size=self._settings.batch_size,
            device=here.device,
            threads=self._threads,
            processes=here,
            progress=report,
            say=say if here.is_main else None,
        )
        with here.together():
            rows = read_features(features, side="train")
        gpus = [] if here.device.type == "cpu" else None if here.size == 1 else [here.device.index or 0]
        mine(rows, rows, folder / TABLE, k=self._k, gpus=gpus, processes=here, progress=report)
        made: dict[str, Any] = {}
        with here.together():
            if here.is_main:
                made = {
                    "step": step,
                    "model": str(model.absolute()),
                    "model_sha256": file_sha256(model),
                    "k": self._k,
                    "pictures": self._pictures,
                    "sha256": file_sha256(folder / TABLE),
                }
                with atomic_text(folder / MADE_FROM) as file:
                    json.dump(made, file, indent=1)
        made = here.broadcast_object(made)  # type: ignore[assignment]
        seconds, count = time.monotonic() - begin, len(rows.features.uuids)
        text = f"{self._k} neighbours of {count} pictures mined after step {step} by {model}, in {seconds:.1f} s"
        if count < len(pictures):
            text += f"; {len(pictures) - count} broken pictures have none"
        told = {"epoch": epoch, "model_sha256": made["model_sha256"], "sha256": made["sha256"], "seconds": seconds}
        return Event("neighbours mined", text, told), made

    def _tidy(self, epoch: int) -> None:
        """Remove what served to make the table of ``epoch``, and tables that no checkpoint needs."""
        shutil.rmtree(self._folder(epoch) / "features", ignore_errors=True)
        steps = [step_of(checkpoint) for checkpoint in checkpoints(self._run)]
        needed = {epoch} | {self._mined_at(step // self._steps_per_epoch) for step in steps}
        names = {self._folder(kept).name for kept in needed if kept is not None}
        for folder in (self._run / "mined").glob("epoch-*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)


def _check_given(model: str) -> None:
    """Raise ConfigError unless a descriptor is there to mine with."""
    try:
        loaded = load_checkpoint(find_model(model))
    except RunError as error:
        raise ConfigError(f"mining.model: {error}") from error
    if not isinstance(loaded, Descriptor):
        raise ConfigError(f"mining.model={model} is a {type(loaded).__name__.lower()}'s, expected a descriptor's")
