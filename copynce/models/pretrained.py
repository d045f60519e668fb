"""A model as a folder: `model.safetensors`, `config.json`, and a card for people, `README.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from copynce.errors import ConfigError, DataError
from copynce.files import atomic_text
from copynce.models.settings import MatcherConfig

if TYPE_CHECKING:
    from copynce.models.kinds import AnyModel

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

#: Figures that an evaluation leaves in a card's metadata, and what people call them.
_FIGURES = {
    "uap": "uAP",
    "rp90": "RP90",
    "map": "mAP",
    "recall_at_1": "recall@1",
    "uap_sn": "uAP with score normalisation",
    "rp90_sn": "RP90 with score normalisation",
}


class Pretrained:
    """What gives a model the two methods that are usual for such folders.

    They alone look up, from a model to what reads and writes every kind of it, and import that when they are called.
    """

    def save_pretrained(self, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the model as a folder; each file appears whole or not at all, the weights last.

        folder: a new or empty one, or one of this method, whose model is replaced.

        metadata: as for `save_checkpoint`; what of it people ask for stands in the card too: `trained_on`, `start`,
        `step`, `epoch`, `commit`, `license`, figures (`uap`, `rp90`, `map`, `recall_at_1`, ...). Raises DataError if
        `folder` is a file, ConfigError if it holds anything else, WriteError if it takes none.
        """
        from copynce.models.checkpoints import save_checkpoint, stored_config

        model, folder = cast("AnyModel", self), Path(folder)
        config = stored_config(model)
        require_place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_text(folder / CONFIG) as file:  # the first: it says whose folder this is
            file.write(json.dumps({"library_name": "copynce", **config}, indent=2) + "\n")
        with atomic_text(folder / CARD) as file:
            file.write(model_card(config["model"], model, dict(metadata or {})))
        save_checkpoint(folder / WEIGHTS, model, metadata)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model in a folder of `save_pretrained`, or in whatever else `load_checkpoint` takes, in evaluation mode.

        Raises DataError if it is of another kind; else as `load_checkpoint`.
        """
        from copynce.models.checkpoints import load_checkpoint, of_kind

        return cast("Self", of_kind(cast("Any", cls), load_checkpoint(folder), folder))


def require_place(folder: Path) -> None:
    """Raise, as `save_pretrained`, unless a model can be written as `folder` without a loss of anything else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file, expected a folder for {WEIGHTS}, {CONFIG} and {CARD}")
    names = {entry.name for entry in folder.iterdir()}
    of_run = sorted(names & {"config.yaml", "checkpoints"})
    if of_run:
        raise ConfigError(
            f"{folder} is a run (it has {' and '.join(of_run)}), and a model in it would be taken for the run's; "
            "choose a new folder"
        )
    ours = WEIGHTS in names or names <= {CONFIG, CARD}  # without weights: writing was cut short
    if names and not (ours and _is_config(folder / CONFIG)):
        raise ConfigError(
            f"{folder} holds other things than a model of copynce ({min(names)}, ...), which {CONFIG} and {CARD} might "
            "replace; choose a new folder"
        )


def _is_config(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("library_name") == "copynce"


def model_card(kind: str, model: AnyModel, metadata: Mapping[str, Any]) -> str:
    """The card of a model, Markdown: what it is, what it was trained on, its figures as far as they are known."""
    config = model.config
    facts = {
        "backbone": f"{config.backbone} (timm)",
        "input": f"RGB, {config.img_size} x {config.img_size} px, ImageNet's mean and deviation",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "patches": f"{model.grid} x {model.grid} of {model.patch_size} px, tokens of {model.channels} channels",
        **_made(model),
    }
    known = {
        "trained on": metadata.get("trained_on"),
        "started from": _line_of_starts(metadata.get("start")),
        "steps": metadata.get("step"),
        "epochs": metadata.get("epoch"),
        "commit": metadata.get("commit"),
    }
    figures = {name: metadata[key] for key, name in _FIGURES.items() if isinstance(metadata.get(key), int | float)}
    front = ["library_name: copynce", "tags:", "- image-copy-detection"]
    if isinstance(metadata.get("license"), str):
        front.insert(0, f"license: {json.dumps(metadata['license'])}")
    parts = ["---", *front, "---", "", f"# An image copy {kind}", "", _WHAT[kind], ""]
    parts += [f"- {name}: {value}" for name, value in facts.items()]
    parts += ["", "## Training", ""]
    parts += [f"- {name}: {value}" for name, value in known.items() if value is not None] or ["Nothing was noted."]
    if figures:
        parts += ["", "## Figures", "", "| metric | value |", "| --- | --- |"]
        parts += [f"| {name} | {value:.4f} |" for name, value in figures.items()]
    use = f"from copynce.models import load_{kind}\n\nmodel = load_{kind}(FOLDER)  # this folder\n{_USE[kind]}"
    return "\n".join([*parts, "", "## Use", "", "```python", use, "```", ""])


_WHAT = {
    "descriptor": "It makes one unit vector of a picture; the cosine of two tells whether one copies the other.",
    "matcher": "It tells of two pictures whether one copies the other: the sigmoid of a logit.",
}
_USE = {
    "descriptor": "descriptors, patch_tokens = model(images)  # float [B, 3, S, S], normalised",
    "matcher": "probabilities = model(queries, references).sigmoid()  # float [B, 3, S, S] each, normalised",
}


def _made(model: AnyModel) -> dict[str, str]:
    if isinstance(model.config, MatcherConfig):
        return {"blocks": f"{model.config.encoder_blocks} for one picture, then {model.config.fusion_blocks} for both"}
    return {"descriptor": f"{model.dim} numbers"}


def _line_of_starts(start: Any) -> str | None:
    """The files that a model and its forerunners started from, the nearest first."""
    files: list[str] = []
    while isinstance(start, Mapping) and "file" in start:
        files.append(f"`{start['file']}`")
        start = (start.get("card") or {}).get("start")
    return ", which started from ".join(files) or None
