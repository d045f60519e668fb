"""Edit programs: a sequence of edits as plain numbers, shared by the pixel executor and PixTrace."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

import copynce.pixtrace.edits as edits
import copynce.pixtrace.shares as shares
from copynce.pixtrace.compose import RenderPlan, compose
from copynce.pixtrace.edits import Edit, Photometric, Resize, Size
from copynce.pixtrace.tables import CoordinateTable, Mode, trace, trace_plan

_FAMILIES = {"Edit", "Geometry", "Layered", "Photometric", "SizeFree"}
_EDITS: dict[str, type[Edit]] = {
    name: value
    for module in (edits, shares)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, Edit) and name not in _FAMILIES
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

    def plan(self, source_shape: Size, grid: Size = (224, 224)) -> RenderPlan:
        """The composed view for a source of (height, width) pixels, of the grid's size."""
        return compose(self.edits, source_shape, grid, end_at_grid=True)

    def trace(self, source_shape: Size, grid: Size = (224, 224), mode: Mode = "exact") -> CoordinateTable:
        """The table of the view: int32 [grid height, grid width] into the source scaled to the grid.

        ``mode`` as in :func:`copynce.pixtrace.trace`.
        """
        if mode == "exact":
            return trace_plan(self.plan(source_shape, grid), grid)
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
        items = [{"edit": type(edit).__name__, **dataclasses.asdict(edit)} for edit in self.edits]
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


def _edit_from(item: object) -> Edit:
    if not isinstance(item, dict) or item.get("edit") not in _EDITS:
        raise ValueError(f"each edit names one of {sorted(_EDITS)} under 'edit', got {item!r}")
    kind = _EDITS[item["edit"]]
    known = {field.name for field in dataclasses.fields(kind)}
    parameters = {name: _tuples(value) for name, value in item.items() if name != "edit"}
    if not parameters.keys() <= known:
        raise ValueError(f"{kind.__name__} has the parameters {sorted(known)}, got {sorted(parameters)}")
    try:
        return kind(**parameters)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot be made of {parameters}: {error}") from error


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
