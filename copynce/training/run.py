"""A run's folder: who may write into it, what a run starts with, and as what it continues.

Everything is checked before anything in the folder is made or changed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from copynce.config import load_config, save_config
from copynce.errors import ConfigError, RunError
from copynce.files import atomic_text, file_sha256
from copynce.models import start_card, weights_file
from copynce.training.checkpoints import (
    checkpoints,
    find_model,
    newest_whole,
    read_state,
    remove_parts,
    set_aside,
    step_of,
)
from copynce.training.config import EvaluateConfig, TrainConfig
from copynce.training.distributed import World
from copynce.training.signals import tell

#: Settings, or sections of them, that a run keeps for its whole life, and why.
FIXED = {
    "objective": "it is what is trained",
    "data": "it makes the batches",
    "seed": "it makes the batches and the first weights",
    "model": "it is what is trained",
    "weights": "they are what the run began with",
    "loss": "it is what the run minimises",
    "ema": "its mean began with the run",
    "optim": "the optimiser's state and the learning rate's curve follow from it",
    "mining": "it makes the batches",
}
#: Settings that may change when a run continues, and why; these go before FIXED. A change is printed and logged, but
#: for that of a setting that speaks of the call rather than of the run ("").
FREE = {
    "out": "",
    "resume": "",
    "data.batch_size": "the items of a step over all processes are what must stay, and they are checked",
    "optim.accumulate": "as data.batch_size",
    "data.threads": "batches do not depend on it",
    "data.processes": "batches do not depend on it",
    "optim.epochs": "the run becomes longer or shorter, and with it what is left of the learning rate's curve",
    "optim.steps": "as optim.epochs",
    "device": "the same numbers but for rounding",
    "precision": "the same numbers but for rounding",
    "checkpoint_activations": "the same numbers",
    "compile_blocks": "the same numbers but for rounding",
    "threads": "the same numbers but for rounding",
    "checkpoint_every": "it says when, not what",
    "keep_checkpoints": "it says for how long, not what",
    "log_every": "it says when, not what",
    "tensorboard": "it says where, not what",
    "wandb": "it says where, not what",
    "mining.batch_size": "the same numbers but for rounding",
    **{f"evaluate.{known.name}": "it says what is measured, not what is trained" for known in fields(EvaluateConfig)},
}
#: Settings that name a file or folder: one place may be written in several ways.
_PATHS = {
    f"data.{name}" for name in ("train", "root", "neighbours", "queries", "references", "ground_truth", "labelled_root")
} | {"weights", "mining.model"}


@dataclass(frozen=True)
class Start:
    """What a run begins with: nothing, or a checkpoint.

    ``damaged``: newer checkpoints that are not whole, and what is wrong. ``changes``: {setting: (before, now)}.
    ``card``: what is known of the file of weights that the run began with (``start_card``), None if with none.
    """

    checkpoint: Path | None
    damaged: tuple[tuple[Path, str], ...] = ()
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    card: Mapping[str, Any] | None = None

    @property
    def step(self) -> int:
        """The number of steps already done."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)


@dataclass(frozen=True)
class Event:
    """Something that happened to a run, for stderr and the log: arguments of :meth:`RunLog.event`."""

    kind: str
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)


class RunFolder:
    """A run's folder, held by one training at a time: that of its ``with`` block, on all of its processes.

    The lock ends with the process, however it ends. If the block ends before :meth:`begin`, nothing in the folder has
    changed, and a folder that was not there is not there again. Raises RunError where another training holds it, or
    where ``path`` cannot be made or written.
    """

    def __init__(self, path: Path, here: World) -> None:
        self.path = path
        self._here = here
        self._lock: _Lock | None = None

    def __enter__(self) -> RunFolder:
        with self._here.together():
            if self._here.is_main:
                self._lock = _Lock(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def examine(self, config: TrainConfig, batches: Mapping[str, int | str], place: Mapping[str, str]) -> Start:
        """What the run starts with, the same on every process; reads only.

        ``batches``: what makes the batches beyond the settings, which must be as it was. ``place``: machine and code,
        which may change. Raises RunError for a folder that cannot be continued with these settings.
        """
        found: list[Start] = []
        with self._here.together():
            if self._here.is_main:
                found.append(_examine(self.path, config, batches, place))
        start = self._here.broadcast_object(found[0] if found else None)
        assert isinstance(start, Start), "that of the main process"
        return start

    def begin(self, config: TrainConfig, start: Start, commit: str) -> list[Event]:
        """Make the folder that of this run: its settings, damaged checkpoints set aside, remains of a kill removed.

        Returns what is to be told and logged, on the main process.
        """
        events: list[Event] = []
        with self._here.together():
            if self._here.is_main:
                assert self._lock is not None, "taken by __enter__"
                self._lock.keep()
                remove_parts(self.path)
                for checkpoint, reason in start.damaged:
                    text = f"{checkpoint} is damaged: {reason}; the run continues from step {start.step}"
                    events.append(Event("checkpoint damaged", f"{text}, and it is now {set_aside(checkpoint).name}"))
                _note_settings(self.path, config)
                with atomic_text(self.path / "commit.txt") as file:
                    file.write(commit + "\n")
                if start.changes:
                    listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in start.changes.items())
                    text = f"{self.path} continues after step {start.step} with other settings: {listed}"
                    if config.objective == "descriptor" and "optim.accumulate" in start.changes:
                        text += "; InfoNCE and KoLeo compare the pairs of another number of processes and batches"
                    events.append(Event("settings changed", text, {"changes": dict(start.changes)}))
        return events


def compare(before: TrainConfig, now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ: {name: (before, now)}; those of the call alone are left out."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return {
        name: (old.get(name), new.get(name))  # sections of another class have other settings
        for name in old | new
        if FREE.get(name) != "" and _comparable(name, old.get(name)) != _comparable(name, new.get(name))
    }


def changes_of(run: Path, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which ``config`` differs from what the folder ``run`` was trained with, as :func:`compare` tells
    them; none where no checkpoint is whole. Reads only. Raises RunError for a folder whose settings cannot be read,
    ConfigError for weights that are not there."""
    whole, _ = newest_whole(run)
    if whole is None:
        return {}
    weights = None if config.weights is None else _weights_file(config.weights, config.model.backbone)
    return _changes(_settings(run), config, read_state(whole).get("start"), weights)


def _examine(run: Path, config: TrainConfig, batches: Mapping[str, int | str], place: Mapping[str, str]) -> Start:
    weights = None if config.weights is None else _weights_file(config.weights, config.model.backbone)
    found = checkpoints(run)
    if not found:
        return Start(None, card=None if weights is None else start_card(weights) | _named(config.weights))
    if config.resume == "never":
        raise RunError(f"{run} already holds {found[-1].name}; choose another out, or resume=auto to continue it")
    before = _settings(run)
    whole, damaged = newest_whole(run)
    if whole is None:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged)
        raise RunError(f"{run} cannot continue, none of its checkpoints is whole ({reasons}); choose another out")
    state = read_state(whole)
    card = state.get("start")
    changes = _changes(before, config, card, weights)
    if weights is None:
        changes.pop("weights", None)  # given once, when the run began
    refused = {name: pair for name, pair in changes.items() if name not in FREE}
    if refused:
        raise RunError(_refusal(run, step_of(whole), refused))
    for name, value in batches.items():
        recorded = state.get(name, value)  # older checkpoints tell less
        if recorded != value:
            raise RunError(
                f"{run} was trained with {name}={recorded}, got {value}; a run continues only as it began "
                "(items = those of one step over all processes, pictures = their names in their order)"
            )
    recorded_place = state.get("place", {})
    changes.update((k, (recorded_place[k], v)) for k, v in place.items() if recorded_place.get(k, v) != v)
    return Start(whole, tuple(damaged), changes, card)


def _changes(
    before: TrainConfig | None, config: TrainConfig, card: Mapping[str, Any] | None, weights: Path | None
) -> dict[str, tuple[Any, Any]]:
    """As :func:`compare`, but weights are compared by what is in their file, the ``card`` being of those before."""
    changes = {} if before is None else compare(before, config)
    if weights is not None and card is not None and Path(str(config.weights)).is_file():
        changes.pop("weights", None)
        if file_sha256(weights) != card["sha256"]:
            old = "another file" if before is None else before.weights
            changes["weights"] = (old, f"{config.weights}, which holds others")
    return changes


def _named(weights: str | None) -> dict[str, str]:
    """The name of weights of timm's own, whose files all have one name."""
    return {"weights": weights} if weights is not None and not Path(weights).exists() else {}


def _weights_file(weights: str, backbone: str) -> Path:
    path = weights_file(weights, backbone)
    if not path.exists():
        raise ConfigError(
            f"weights={weights}: no such file or folder; expected a backbone's weights, a checkpoint, a run, or timm "
            "(a run that is continued needs them no more: leave weights out)"
        )
    return find_model(path)


def _settings(run: Path) -> TrainConfig | None:
    """The settings that stand in the run's folder; None if it has none."""
    path = run / "config.yaml"
    if not path.exists():
        tell(f"{run} has no config.yaml, so the settings given now are taken as the run's")
        return None
    try:
        return load_config(TrainConfig, path, [])
    except (ConfigError, OSError) as error:
        raise RunError(
            f"{path} does not tell the settings of the run ({error}); put a good one (config-N.yaml are older ones) in "
            "its place, or remove it, and the settings given are taken as the run's"
        ) from error


def _refusal(run: Path, step: int, refused: Mapping[str, tuple[Any, Any]]) -> str:
    listed = "; ".join(f"{name} was {old}, got {new} ({_why(name)})" for name, (old, new) in refused.items())
    ways = [f"Choose another out, to which weights={run} gives the model trained so far"]
    if any(name in _PATHS - {"weights"} and None not in pair for name, pair in refused.items()):
        ways.append(f"if the same files only moved, write their new place into {run / 'config.yaml'}")
    return f"{run}, at step {step}, continues only as it began: {listed}. {', or '.join(ways)}"


def _why(name: str) -> str:
    return FIXED.get(name) or FIXED[name.split(".")[0]]


def _note_settings(run: Path, config: TrainConfig) -> None:
    """Write config.yaml, if it says anything else; the one that was there stays under the next free number."""
    path = run / "config.yaml"
    if path.exists():
        try:
            if load_config(TrainConfig, path, []) == config:
                return
        except ConfigError:
            pass  # of a run that made no step, or removed by hand and written otherwise: it stays all the same
        number = 1
        while (older := run / f"config-{number}.yaml").exists():
            number += 1
        shutil.copyfile(path, older)
    save_config(config, path)


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for known in fields(config):
        value = getattr(config, known.name)
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{known.name}.")
        else:
            yield f"{prefix}{known.name}", value


def _comparable(name: str, value: Any) -> Any:
    if name in _PATHS and value is not None:
        return os.path.realpath(value)
    return list(value) if isinstance(value, tuple) else value


class _Lock:
    """An exclusive lock on a folder, by flock on its file ``.lock``, in which stands who holds it.

    The system releases it when the process ends, so a kill leaves none. Folder and file are made if absent, and removed
    on release unless :meth:`keep` was called.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / ".lock"
        self._kept = False
        self._made: list[Path] = []  # deepest last
        try:
            for parent in [*reversed(folder.parents), folder]:
                if not parent.exists():
                    parent.mkdir(exist_ok=True)
                    self._made.append(parent)
            if not folder.is_dir():
                raise RunError(f"{folder} is a file, expected a folder for the run; choose another out")
            self._handle = self._take()
        except OSError as error:
            self._unmake()
            raise RunError(f"{folder} cannot be written ({error.strerror or error}); choose another out") from error
        except RunError:
            self._unmake()
            raise

    def _take(self) -> int:
        while True:
            is_new = not self._file.exists()
            handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 1000).decode(errors="replace").strip()
                os.close(handle)
                raise RunError(
                    f"{self._file.parent} is in use by {holder or 'a training that is just starting'}; wait until it "
                    "has ended, or choose another out"
                ) from None
            except OSError as error:
                tell(
                    f"{self._file.parent}: this file system has no locks ({error.strerror}); the run goes on, and a "
                    "second one in the same folder would not be noticed"
                )
            # The one who held it may have removed the file meanwhile; then this lock is on nothing.
            if os.fstat(handle).st_nlink:
                break
            os.close(handle)
        if is_new:
            self._made.append(self._file)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.truncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode(), 0)
        return handle

    def keep(self) -> None:
        """What was made stays."""
        self._kept = True

    def release(self) -> None:
        os.truncate(self._handle, 0)
        self._unmake()
        os.close(self._handle)

    def _unmake(self) -> None:
        if self._kept:
            return
        for path in reversed(self._made):
            try:
                path.rmdir() if path.is_dir() else path.unlink()
            except OSError:
                return  # somebody else's things are in it
