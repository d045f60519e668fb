"""Models as programs for other runtimes: `torch.export`'s `.pt2` and ONNX, each compared with the model itself.

    descriptor   descriptor   images [N, 3, S, S] -> descriptors [N, dim]
                 tokens       images -> descriptors and patch tokens [N, L, C]
    matcher      pair         query and reference images [N, 3, S, S] -> logits [N]
                 encode       images -> tokens [N, P + L, C]
                 fuse         query and reference tokens [N, P + L, C] -> logits [N]

`N` is any number; pictures are float32 and normalised as for the model. The settings of the model stand in the file
under `copynce.config`.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from copynce.errors import ConfigError, ExportError
from copynce.files import whole_file
from copynce.models.checkpoints import stored_config
from copynce.models.descriptor import Descriptor
from copynce.models.kinds import AnyModel, kind_of
from copynce.models.matcher import Matcher

FORMS = (".onnx", ".pt2")
TOLERANCE = 1e-4
"""Largest difference between program and model, relative to the largest output where that is above 1."""

_CONFIG = "copynce.config"
_LARGEST_ONNX = 2**31  # bytes: what its file format holds
_COMPARED = (1, 3)  # pictures or pairs


@dataclass(frozen=True)
class _Part:
    """What of a model is exported: a module, and the names and shapes, without N, of what goes in and comes out."""

    module: nn.Module
    inputs: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]


class _Program(nn.Module):
    """A function of a model as a module."""

    def __init__(self, model: AnyModel, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self.model, *inputs)


def export(model: AnyModel, path: str | Path, part: str | None = None, *, tolerance: float = TOLERANCE) -> float:
    """Write a part of a model (None: the first of its kind in the module's text) as a program; the file appears whole
    or not at all, and only if it computes what the model does.

    path: its suffix chooses the form. Returns the largest difference for batches of 1 and 3, on the CPU in float32.
    Raises ConfigError for another part, suffix, or where a package is missing, ExportError if the program differs by
    more than `tolerance` or cannot be made, WriteError if the disk takes no file.
    """
    path = Path(path)
    if path.suffix not in FORMS:
        raise ConfigError(f"{path}: a program's name must end in {' or '.join(FORMS)}")
    if path.suffix == ".onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    parts = _parts(model)
    part = next(iter(parts)) if part is None else part
    if part not in parts:
        raise ConfigError(f"part of a {kind_of(model).name} must be one of {', '.join(parts)}, got {part}")
    chosen, training = parts[part], model.training
    model.eval()
    try:
        with _quiet(), torch.no_grad():
            content, run = (_onnx if path.suffix == ".onnx" else _pt2)(model, chosen, _trace(path, chosen))
            difference = max(_difference(chosen, run, count) for count in _COMPARED)
    finally:
        model.train(training)
    if not difference <= tolerance:
        raise ExportError(
            f"{path} is not written: the program differs from the model by {difference:.2g}, at most {tolerance:g} are "
            "allowed"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content)
    return difference


def _parts(model: AnyModel) -> dict[str, _Part]:
    image = (3, model.img_size, model.img_size)
    if isinstance(model, Descriptor):
        describe = _Program(model, lambda model, images: model(images, tokens=False)[0])
        both = _Program(model, lambda model, images: model(images))
        return {
            "descriptor": _Part(describe, {"images": image}, ("descriptors",)),
            "tokens": _Part(both, {"images": image}, ("descriptors", "patch_tokens")),
        }
    assert isinstance(model, Matcher), "the two kinds there are"
    tokens = (model.prefix_tokens + model.grid**2, model.channels)
    # Encoded one after the other: a batch of both would have to be cut in half again, whatever N is.
    pair = _Program(model, lambda model, query, reference: model.fuse(model.encode(query), model.encode(reference)))
    encode = _Program(model, lambda model, images: model.encode(images))
    fuse = _Program(model, lambda model, query, reference: model.fuse(query, reference))
    return {
        "pair": _Part(pair, {"query": image, "reference": image}, ("logits",)),
        "encode": _Part(encode, {"images": image}, ("tokens",)),
        "fuse": _Part(fuse, {"query_tokens": tokens, "reference_tokens": tokens}, ("logits",)),
    }


def _trace(path: Path, part: _Part) -> torch.export.ExportedProgram:
    """The part as a graph, for any N."""
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in part.inputs)
    try:
        return torch.export.export(part.module, tuple(_inputs(part, 2)), dynamic_shapes=(shapes,))
    except Exception as error:  # whatever torch raises for what it cannot follow
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(
            f"{path}: torch.export cannot follow this model ({type(error).__name__}: {reason})"
        ) from error


def _pt2(model: AnyModel, part: _Part, program: torch.export.ExportedProgram) -> tuple[bytes, Callable[..., Any]]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={_CONFIG: json.dumps(stored_config(model))})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _onnx(model: AnyModel, part: _Part, program: torch.export.ExportedProgram) -> tuple[bytes, Callable[..., Any]]:
    import onnxruntime

    made: Any = torch.onnx.export(
        program, dynamo=True, input_names=list(part.inputs), output_names=list(part.outputs), verbose=False
    )
    proto = made.model_proto
    if proto.ByteSize() >= _LARGEST_ONNX:
        raise ExportError(f"the model takes {proto.ByteSize() / 1e9:.1f} GB, an ONNX file at most 2.1; choose .pt2")
    entry = proto.metadata_props.add()
    entry.key, entry.value = _CONFIG, json.dumps(stored_config(model))
    content: bytes = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(part.inputs, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(list(part.outputs), given)]

    return content, run


def _inputs(part: _Part, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, *shape, generator=generator) for shape in part.inputs.values()]


def _difference(part: _Part, run: Callable[..., Any], count: int) -> float:
    inputs = _inputs(part, count)
    expected, found = part.module(*inputs), run(*inputs)
    pairs = zip(_listed(expected), _listed(found), strict=True)
    return max(float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1)) for ours, theirs in pairs)


def _listed(outputs: Any) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _require(*packages: str) -> None:
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ConfigError(
            f"ONNX needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'copynce[export]'; a .pt2 needs nothing more"
        )


@contextmanager
def _quiet() -> Any:
    """A block in which torch does not tell of its own inside."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
