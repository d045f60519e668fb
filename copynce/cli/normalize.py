"""``copynce normalize``"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from copynce.cli.console import progress_bars, writing_into
from copynce.cli.settings_help import Command

if TYPE_CHECKING:
    from copynce.retrieval.changes import Change, Work
    from copynce.retrieval.features import FeatureFile
    from copynce.retrieval.settings import NormalizeConfig

_PREDICTIONS = (".csv", ".json")
_HDF5 = (".h5", ".hdf5")


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "normalize",
        help="score normalisation, stretching, whitening: of features or of predictions",
        description="Normalise the scores of predictions (.csv, .json), or features: a folder of them, or HDF5. Score "
        "normalisation adds a column, so that inner products are normalised scores. The same command goes on where it "
        "was stopped; under torchrun the processes share the work.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="INPUT", help="predictions, or features")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="predictions, a folder, or an .h5 file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.settings = _settings
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.retrieval.settings import NormalizeConfig

    return NormalizeConfig


def run(options: argparse.Namespace) -> None:
    """Normalise, and print what was written."""
    from copynce.config import load_config
    from copynce.retrieval.changes import Work
    from copynce.retrieval.features import read_features
    from copynce.retrieval.settings import NormalizeConfig
    from copynce.training.distributed import announced, world

    predictions = Path(options.input).suffix.lower() in _PREDICTIONS
    with announced():
        config = load_config(NormalizeConfig, None, options.overrides)
        change = _change(config)
        _check_out(options, config, predictions)
        found, roles = ({}, {}) if predictions else _inputs(options.input, config)
        if config.training is not None:
            training = read_features(config.training, side=config.training_side, ids=config.training_ids)
        else:
            training = _training_of(options.input, found, roles)
    with (
        world(config.device) as here,
        writing_into(options.out.parent),
        progress_bars("", shown=here.is_main) as report,
    ):
        gpus = [] if here.device.type == "cpu" else None if here.size == 1 else [here.device.index or 0]
        work = Work(training, here, gpus, report)
        if predictions:
            _predictions(options, config, change, work)
        else:
            _features(options.out, found, roles, change, work)
    if here.is_main:
        print(f"{'predictions' if predictions else 'features'}: {options.out}")


def _check_out(options: argparse.Namespace, config: NormalizeConfig, predictions: bool) -> None:
    """Raise ConfigError where what is read would be written over, and for a folder of other files."""
    from copynce.errors import ConfigError
    from copynce.retrieval.features import check_folder

    folder = _folder(options.out)
    for name, given in (("INPUT", options.input), ("training", config.training), ("queries", config.queries)):
        if given is None:
            continue
        path = Path(given)
        # A file of a series is written over with its folder.
        for read in (path, path.resolve().parent) if path.suffix == ".safetensors" else (path,):
            if any(read.exists() and out.exists() and read.samefile(out) for out in (options.out, folder)):
                raise ConfigError(f"--out {options.out} would write over {name}, {given}; choose another place")
    if not predictions:
        check_folder(folder)


def _folder(out: Path) -> Path:
    """Where features are written, for a while if `out` is HDF5."""
    return Path(f"{out}.features") if out.suffix.lower() in _HDF5 else out


def _change(config: NormalizeConfig) -> Change:
    from copynce.retrieval.changes import Change
    from copynce.retrieval.normalization import BIASES, Bias

    bias = None
    if (known := BIASES.get(config.recipe)) is not None:
        end = known.end if config.end is None else config.end
        # The challenge's baseline takes the last of n neighbours.
        default = end - 1 if config.recipe == "isc" else known.start
        weight = known.weight if config.weight is None else config.weight
        bias = Bias(default if config.start is None else config.start, end, weight)
    names = ("scale", "dims", "beta", "neighbours", "iterations", "augment")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return Change(recipe=config.recipe, bias=bias, replace=config.recipe == "vsc", **given)


def _inputs(path: str, config: NormalizeConfig) -> tuple[dict[str, FeatureFile], dict[str, str]]:
    """The features by name, and what each is."""
    from copynce.errors import ConfigError
    from copynce.retrieval.features import read_features, sides_of

    known, role = ("query", "reference", "training"), None if config.role == "auto" else config.role
    sides = sides_of(path) if config.side is None else [config.side]
    found = {side: read_features(path, side=side) for side in sides}
    if not sides:
        found = {role or "features": read_features(path, ids=config.ids)}
    roles = {name: role or (name if name in known else "") for name in found}
    if role is not None and len(found) > 1:
        raise ConfigError(f"role is of one set of features, but {path} holds {', '.join(found)}; choose side=NAME")
    unknown = [name for name, role in roles.items() if not role]
    if unknown and config.recipe not in ("whiten", "negative"):
        raise ConfigError(f"role must be given, query or reference: the features {unknown[0]!r} do not tell")
    return found, roles


def _training_of(path: str, found: dict[str, FeatureFile], roles: dict[str, str]) -> FeatureFile:
    from copynce.errors import ConfigError
    from copynce.retrieval.features import read_features, sides_of

    for name, role in roles.items():
        if role == "training":
            return found[name]
    if found and "training" in sides_of(path):
        return read_features(path, side="training")
    raise ConfigError("training must name features of training pictures, for example training=FOLDER")


def _predictions(options: argparse.Namespace, config: NormalizeConfig, change: Change, work: Work) -> None:
    from copynce.errors import ConfigError
    from copynce.evaluation import Predictions, read_predictions, write_predictions
    from copynce.retrieval.changes import change_scores
    from copynce.retrieval.features import read_features, sides_of

    with work.group.together():
        if config.queries is None:
            raise ConfigError("queries must name the features of the predictions' queries")
        if options.out.suffix.lower() not in _PREDICTIONS:
            raise ConfigError(f"--out must end in .csv or .json for predictions, got {options.out}")
        side = config.queries_side
        if side is None and len(sides_of(config.queries)) > 1:
            side = "query"
        features = read_features(config.queries, side=side, ids=config.queries_ids)
        plain = read_predictions(options.input)
    scores = change_scores(change, plain.queries, plain.scores, features, work, Path(f"{options.out}.parts"))
    with work.group.together():
        if work.group.rank == 0:
            write_predictions(options.out, Predictions(plain.queries, plain.references, scores))


def _features(out: Path, found: dict[str, FeatureFile], roles: dict[str, str], change: Change, work: Work) -> None:
    from copynce.errors import ConfigError
    from copynce.retrieval.changes import change_features
    from copynce.retrieval.feature_formats import write_hdf5
    from copynce.retrieval.features import read_features

    packed = out.suffix.lower() in _HDF5
    if packed and not {"query", "reference"} <= found.keys():
        raise ConfigError(f"--out {out}: an HDF5 file holds queries and references, INPUT has {', '.join(found)}")
    folder = _folder(out)
    change_features(change, found, roles, folder, work)
    with work.group.together():
        if packed and work.group.rank == 0:
            query, reference = (read_features(folder, side=side) for side in ("query", "reference"))
            write_hdf5(
                out,
                query.features,
                reference.features,
                made_from=(query.made_from, reference.made_from),
                say=lambda text: print(text, file=sys.stderr, flush=True),
            )
            shutil.rmtree(folder)
