"""Edit programs: a sequence of edits as plain numbers, shared by the pixel executor and PixTrace."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

import copynce.pixtrace.edits as edits
from copynce.pixtrace.edits import Edit, Photometric, Resize
from copynce.pixtrace.edits.base import Size
from copynce.pixtrace.tables.released import Mode
from copynce.pixtrace.tables.table import CoordinateTable
from copynce.pixtrace.tables.trace import trace, trace_view
from copynce.pixtrace.view.compose import compose
from copynce.pixtrace.view.composed_view import ComposedView

# JSON is a file format, older than some names of the code: what is written, where it differs from them.
_WRITTEN_NAMES = {
    "RelativePad": "PadShare",
    "RelativePasteOnto": "PasteShare",
    "RelativeOverlay": "OverlayShare",
    "RelativeErase": "EraseShare",
    "RelativeStamp": "StampShare",
    "RelativeMatte": "MatteShare",
}
_WRITTEN_PARAMETERS = {"picture_choice": "picture", "noise_seed": "noise"}
_PARAMETERS = {written: name for name, written in _WRITTEN_PARAMETERS.items()}
#: Every edit but the families, by its written name.
_EDITS: dict[str, type[Edit]] = {
    _WRITTEN_NAMES.get(name, name): value
    for name, value in vars(edits).items()
    if isinstance(value, type) and issubclass(value, Edit) and value.__module__ != Edit.__module__
}


@dataclass(frozen=True)
class EditProgram:
    """The edits that make one view of a picture, in order; the view is resized to the model's input in the end.

    Without edits it is the plain resize, the reference of a released training pair.

    >>> from copynce.pixtrace import Crop, EditProgram, HorizontalFlip
    >>> program = EditProgram((Crop(0, 0, 50, 80), HorizontalFlip()))
    >>> EditProgram.from_json(program.to_json()) == program
    True
    """

    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        for edit in self.edits:
            if not isinstance(edit, Edit):
                raise TypeError(f"edits must be edits of copynce.pixtrace, got {edit!r}")

    def composed(self, source_shape: Size, grid: Size = (224, 224)) -> ComposedView:
        """The view of a source of (height, width) pixels, composed, of the grid's size."""
        return compose(self.edits, source_shape, grid, end_at_grid=True)

    def trace(self, source_shape: Size, grid: Size = (224, 224), mode: Mode = "exact") -> CoordinateTable:
        """The table of the view: int32 [grid height, grid width] into the source scaled to the grid.

        ``mode`` as in :func:`copynce.pixtrace.trace`.
        """
        if mode == "exact":
            return trace_view(self.composed(source_shape, grid), grid)
        return trace((*self.edits, Resize(*grid)), source_shape, grid, mode)

    def geometry_only(self) -> EditProgram:
        """The same geometry and layers, layers opaque, no photometric edit."""
        kept: list[Edit] = []
        for edit in self.edits:
            if isinstance(edit, Photometric):
                continue
            has_opacity = any(field.name == "opacity" for field in dataclasses.fields(edit))
            kept.append(dataclasses.replace(edit, **{"opacity": 1.0}) if has_opacity else edit)
        return EditProgram(tuple(kept))

    def to_json(self) -> str:
        """One line of JSON: a list of edits, each an object with its name under ``edit`` and its parameters."""
        items = [_written(edit) for edit in self.edits]
        return json.dumps(items, default=np.ndarray.tolist)

    @classmethod
    def from_json(cls, text: str) -> EditProgram:
        """Read :meth:`to_json`; raises ``ValueError`` naming an unknown edit or a wrong parameter."""
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"an edit program is a JSON list of edits, got text that is no JSON: {error}") from error
        if not isinstance(items, list):
            raise ValueError(f"an edit program is a JSON list of edits, got a {type(items).__name__}")
        return cls(tuple(_edit_from(item) for item in items))


def _written(edit: Edit) -> dict[str, object]:
    name = type(edit).__name__
    parameters = {_WRITTEN_PARAMETERS.get(key, key): value for key, value in dataclasses.asdict(edit).items()}
    return {"edit": _WRITTEN_NAMES.get(name, name), **parameters}


def _edit_from(item: object) -> Edit:
    if not isinstance(item, dict) or item.get("edit") not in _EDITS:
        raise ValueError(f"each edit names one of {sorted(_EDITS)} under 'edit', got {item!r}")
    name = item["edit"]
    kind = _EDITS[name]
    known = {_WRITTEN_PARAMETERS.get(field.name, field.name) for field in dataclasses.fields(kind)}
    parameters = {key: _tuples(value) for key, value in item.items() if key != "edit"}
    if not parameters.keys() <= known:
        raise ValueError(f"{name} has the parameters {sorted(known)}, got {sorted(parameters)}")
    try:
        return kind(**{_PARAMETERS.get(key, key): value for key, value in parameters.items()})
    except TypeError as error:
        raise ValueError(f"{name} cannot be made of {parameters}: {error}") from error


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
