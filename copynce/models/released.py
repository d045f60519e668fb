"""The released form of a model: a torch file of `{"model": state dict, "epoch": int}` (PROTOCOLS 9.4)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from copynce.errors import DataError
from copynce.files import whole_file
from copynce.models.kinds import AnyModel, build_model, released_kind
from copynce.models.names import LOG_SCALE, find_encoder
from copynce.models.starts import unseen
from copynce.models.strict import listed
from copynce.models.weight_files import WeightFile


def save_released(path: str | Path, model: AnyModel, metadata: Mapping[str, Any] | None = None) -> list[str]:
    """Write a model in the released form; the file appears whole or not at all.

    Of the metadata the form has a place for `epoch` (else 0) and the loss's `infonce_log_scale`. Returns sentences
    about what the file does not tell. Raises DataError if the released code has no such model.
    """
    path, metadata = Path(path), dict(metadata or {})
    said = _untold(path, model)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if LOG_SCALE in metadata:
        state[LOG_SCALE] = torch.tensor(float(metadata[LOG_SCALE]))
    buffer = io.BytesIO()
    torch.save({"model": state, "epoch": int(metadata.get("epoch") or 0)}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())
    lost = sorted(metadata.keys() - {"epoch", LOG_SCALE})
    return said + ([f"the released form has no place for what was noted: {', '.join(lost)}"] if lost else [])


def _untold(path: Path, model: AnyModel) -> list[str]:
    """What a model has beyond the released form, found by reading it as one."""
    state, ours = model.state_dict(), unseen(model)
    found = find_encoder(WeightFile(path, dict(state), {}))
    said = []
    try:
        config = released_kind(found).released(found, path, None)
    except DataError:
        if "num_heads" not in ours:
            raise
        config = released_kind(found).released(found, path, ours["num_heads"])
        said.append(f"the file does not tell its {ours['num_heads']} attention heads: whoever reads it must give them")
        ours.pop("num_heads")
    with torch.device("meta"):
        again = build_model(config)
    shapes = [{(name, tensor.shape) for name, tensor in each.items()} for each in (state, again.state_dict())]
    differ = sorted({name for name, _ in shapes[0] ^ shapes[1]})
    if differ:
        raise DataError(
            f"{path}: the released code has no such model, for its parts differ: {listed(differ)}; choose a "
            ".safetensors file or a folder"
        )
    ours |= {name: getattr(model, name) for name in ("img_size", "tokens_block") if hasattr(model, name)}
    theirs = {**unseen(again), **{name: getattr(again, name) for name in ours if hasattr(again, name)}}
    told = [
        f"{name} {value}, which is read back as {theirs[name]}" for name, value in ours.items() if value != theirs[name]
    ]
    return said + ([f"the file does not tell {'; '.join(told)}"] if told else [])
