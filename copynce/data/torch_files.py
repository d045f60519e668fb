"""Files of torch.save that hold tables, not weights: features and neighbours as the released code leaves them."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

from copynce.errors import DataError


def read_torch_file(path: str | os.PathLike[str], expected: str) -> Any:
    """The content of a file of torch.save, its tensors mapped where the file allows it; nothing in it is ever run.

    expected: what should be in it, for messages. Raises DataError, with the way out, for anything but tensors, numbers,
    text and lists or dictionaries of them; FileNotFoundError if the file is absent.
    """
    import torch

    path = Path(path)
    with path.open("rb") as file:
        start = file.read(8)
    whole = start.startswith(b"PK\x03\x04")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except pickle.UnpicklingError as error:
        # The rest of torch's text tells how to run what is in it all the same.
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise DataError(
            f"{path}: a pickle with more than tensors and text, which only running code could read"
            f"{f' ({needed[1]})' if needed else ''}; expected {expected}: where you trust the file, save its tensor "
            "alone, torch.save(torch.as_tensor(table), FILE), or its array with numpy.save"
        ) from error
    except Exception as error:  # whatever goes wrong is the file's fault: its bytes are not ours
        reason = (
            _reason(error) if whole or start.startswith(b"\x80") else f"it begins with {start.hex(' ') or 'nothing'}"
        )
        raise DataError(f"{path}: damaged, or not a file of torch.save ({reason}); expected {expected}") from error


def only_tensor(content: Any, path: str | os.PathLike[str], expected: str, kind: str) -> tuple[Any, Any]:
    """(the one matrix in a file's content, the dictionary or list beside it, none for a bare tensor).

    kind: "f" for floating-point matrices, "i" for those of integers. Raises DataError unless there is exactly one.
    """
    import torch

    found: list[Any] = []
    beside = None
    if isinstance(content, torch.Tensor):
        found = [content]
    elif isinstance(content, dict | list | tuple):
        beside = list(content.values()) if isinstance(content, dict) else list(content)
        found = [value for value in beside if isinstance(value, torch.Tensor)]
    matrices = [
        value
        for value in found
        if value.ndim == 2 and value.layout == torch.strided and value.is_floating_point() == (kind == "f")
    ]
    if len(matrices) != 1:
        shapes = [f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" for value in found]
        got = ", ".join(shapes) or f"a {type(content).__name__} without it"
        raise DataError(f"{path}: expected {expected}, got {got}")
    return matrices[0].detach(), beside


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
