"""The box: a folder with all that finding copies takes, under fixed names; the package's own is called `default`.

descriptor.safetensors    the descriptor
matcher.safetensors       a matcher, if there is one; without an encoder of its own it has the descriptor's blocks
background.safetensors    descriptors of pictures that nobody asks for, for score normalisation
calibration.json          from scores to a probability
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from copynce.errors import DataError

#: The name of the model in the package.
DEFAULT = "default"

DESCRIPTOR, MATCHER = "descriptor.safetensors", "matcher.safetensors"
BACKGROUND, CALIBRATION = "background.safetensors", "calibration.json"


def box_of(path: str | Path) -> Path | None:
    """The folder of a box, by the name `default` (unless a file of that name is there) or by its path; None for what is
    none."""
    path = Path(path)
    if str(path) == DEFAULT and not path.exists():
        path = Path(str(files("copynce"))) / "weights"
    return path if os.path.isfile(path / DESCRIPTOR) else None  # not Path.is_file, which raises for too long a name


def in_box(path: str | Path, name: str = DESCRIPTOR) -> Path:
    """The file `name` of the box that `path` means; `path` itself where it means none.

    Raises DataError for a box without that file.
    """
    box = box_of(path)
    if box is None:
        if str(path) == DEFAULT and not Path(path).exists():
            raise DataError("this installation of copynce has no model of its own; name a run or a weights file")
        return Path(path)
    if not (box / name).is_file():
        raise DataError(f"{box} holds no {name}")
    return box / name
