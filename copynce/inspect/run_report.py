"""What one or several trainings did, as a report: curves, last values, settings that differ, and what happened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from copynce.errors import DataError
from copynce.inspect.curves import LOSS_PARTS, draw_curves
from copynce.inspect.report import Figure, Report, Section, Table
from copynce.training.log import read_events, read_log

_PATCHES = {
    "patch_retrieval": "patch retrieval accuracy",
    "affinity_entropy": "entropy, copied patches",
    "affinity_entropy_uncopied": "entropy, other patches",
    "traced_patches": "share of traced patches",
    "prior_mass": "mass of the prior",
}
_TITLES = {
    **LOSS_PARTS,
    **_PATCHES,
    "lr": "learning rate",
    "gradient_norm": "gradient norm",
    "pictures_per_second": "pictures/s",
    "data_wait_share": "share of time waiting for data",
    "mfu": "MFU",
    "peak_memory_gib": "peak memory, GiB",
}
_EVALUATED = {"uap": "uAP", "rp90": "RP90", "map": "mAP", "recall_at_1": "recall@1", "recall_at_10": "recall@10"}
_NO_CURVES = ("step", "epoch", "eta_seconds")
_MOST_EVENTS = 20  # of a run, the last ones


def run_report(runs: Sequence[str | os.PathLike[str]]) -> Report:
    """The report of the run folders ``runs``. Raises DataError for a folder without a log that holds a number."""
    folders = [Path(run) for run in runs]
    names = _names(folders)
    logs = {name: _log(folder) for name, folder in zip(names, folders, strict=True)}
    keys = list(dict.fromkeys(key for lines in logs.values() for line in lines for key in line))
    titles = {key: _TITLES.get(key, key.replace("_", " ")) for key in keys if key not in _NO_CURVES}
    sections = [
        Section(title, "", [Figure(draw_curves(logs, parts), wide=True)])
        for title, parts in (
            ("Losses", {key: name for key, name in titles.items() if key in LOSS_PARTS}),
            ("Patches", {key: name for key, name in titles.items() if key in _PATCHES}),
            ("Beside them", {key: name for key, name in titles.items() if key not in LOSS_PARTS | _PATCHES}),
        )
        if parts
    ]
    evaluated = {
        name: [event for event in read_events(folder / "log.jsonl") if event["event"] == "evaluation"]
        for name, folder in zip(names, folders, strict=True)
    }
    if any(evaluated.values()):
        sections.insert(0, Section("Evaluations", "", [Figure(draw_curves(evaluated, _EVALUATED), wide=True)]))
    sections.append(Section("Last values", "", [_last_values(logs, titles)]))
    settings = _settings_table({name: _settings(folder) for name, folder in zip(names, folders, strict=True)})
    if settings.rows:
        text = "" if len(folders) == 1 else "Only those in which the runs differ."
        sections.append(Section("Settings", text, [settings]))
    events = [
        [name, str(event["step"]), event["event"], str(event.get("text", ""))]
        for name, folder in zip(names, folders, strict=True)
        for event in read_events(folder / "log.jsonl")[-_MOST_EVENTS:]
    ]
    if events:
        sections.append(Section("What happened", "", [Table(["run", "after step", "what", ""], events)]))
    steps = ", ".join(f"{name}: {int(lines[-1]['step'])} steps" for name, lines in logs.items())
    return Report("Training" if len(folders) == 1 else f"{len(folders)} trainings", steps, sections=sections)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"the same run is given twice: {', '.join(map(str, folders))}")


def _log(folder: Path) -> list[dict[str, float]]:
    path = folder / "log.jsonl"
    if not path.is_file():
        raise DataError(f"{folder}: no training's folder, it has no log.jsonl")
    lines = read_log(path)
    if not lines:
        raise DataError(f"{path}: holds no line with numbers yet; a line is written every log_every steps")
    return lines


def _last_values(logs: Mapping[str, Sequence[Mapping[str, float]]], titles: Mapping[str, str]) -> Table:
    """Each number's mean over the last tenth of the run's lines."""
    rows = []
    for key, title in titles.items():
        cells = []
        for lines in logs.values():
            values = [line[key] for line in lines[-max(1, len(lines) // 10) :] if key in line]
            cells.append(f"{sum(values) / len(values):.4g}" if values else "-")
        rows.append([title, *cells])
    return Table(["mean of the last tenth", *logs], rows)


def _settings(folder: Path) -> dict[str, Any]:
    """The run's settings by dotted name; none where its file is absent or no longer readable."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return dict(_flat(found, "")) if isinstance(found, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _settings_table(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for one in settings.values() for name in one))
    rows = [[name, *(str(one.get(name, "-")) for one in settings.values())] for name in names]
    if len(settings) > 1:
        rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table(["", *settings], rows)
