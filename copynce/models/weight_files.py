"""Tensors out of any file that a person may give as weights, and a sentence about every file that holds none.

Read are safetensors and what `torch.save` wrote, zip or legacy. Nothing in a file is ever run: torch reads with
`weights_only`, and the few Python objects that trainings write beside their tensors become empty stand-ins.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from copynce.errors import DataError, RunError
from copynce.files import file_sha256
from copynce.models.box import in_box
from copynce.models.eight_bits import restored

_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save wrote before it wrote zips
_LEGACY_PICKLES = 4  # that number, the version, the machine, the content

#: Objects that trainings write beside their tensors: records of settings and numbers, of no use here. Names only: none
#: of them is imported or made.
_RECORDS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|_codecs\.encode|builtins\.(set|frozenset|complex|bytearray|slice|range)|"
    r"(collections|datetime|enum|numpy|pathlib|typing|omegaconf|easydict|yacs|lightning|pytorch_lightning)\..*"
)

#: What a file of torch.save needs for tensors alone; torch's own list of what is safe decides.
_TENSORS = re.compile(r"torch\.(?!(nn\.modules|optim|fx|jit|package)\.).*")

#: A run's file ``checkpoints/best``: JSON whose `checkpoint` names the folder beside it that was judged best.
BEST = "best"
_LONGEST_MARK = 1 << 16  # bytes

#: Metadata of a file whose matrices are kept at 8 bits; and of one that lacks tensors, which are those of the same name
#: in another file beside it: JSON with its `file` and `sha256`.
EIGHT_BITS, SHARED = "copynce.eight_bits", "copynce.shared"

_WEIGHTS_NAME = re.compile(r"\.(safetensors|pth|pt|ckpt|bin|tar)$")
_EXPECTED = "expected safetensors or a file of torch.save"

#: How files begin that are no weights, what they are, and the way out.
_KINDS = (
    (rb"version https://git-lfs", "a Git LFS pointer instead of the weights", "fetch them with `git lfs pull`"),
    (
        rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|script)",
        "an HTML page",
        "download the file itself, not the page that offers it",
    ),
    (rb"(\xef\xbb\xbf)?\s*<(\?xml|error)", "an XML text, perhaps a server's error", "download the file again"),
    (rb"(\xef\xbb\xbf)?\s*[\[{]", "a JSON text, settings or an index", "name the weights file itself"),
    (
        rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|II\*\0|MM\0\*|BM.{4}\0{4}",
        "a picture",
        "name the weights file instead",
    ),
    (
        rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!",
        "a compressed archive",
        "unpack it and name the weights file in it",
    ),
    (rb".{257}ustar", "a tar archive", "unpack it and name the weights file in it"),
    (rb"\x93NUMPY", "a NumPy array", "save the weights as safetensors"),
    (rb"\x89HDF", "an HDF5 file, as Keras writes", "take the model's PyTorch weights"),
    (rb"\x08[\x01-\x20]\x12", "an ONNX model", "take the PyTorch weights that it was exported from"),
    (rb"GGUF|.{4}TFL3", "weights for another inference engine", "take the model's PyTorch weights"),
    (rb"\x80[\x02-\x05]", "a bare pickle, not of torch.save", "save the weights as safetensors where it was made"),
    (rb"\0{16}", "zero bytes at its begin, so it was cut while it was copied", "copy or download it again"),
)


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds."""

    path: Path
    tensors: dict[str, Tensor]
    """By name; dictionaries inside dictionaries become names with dots, `{"model": {"x": t}}` gives `model.x`. They
    may be views of the file: copy what shall outlive it."""
    texts: dict[str, str]
    """The metadata of a safetensors file; empty for others."""
    numbers: dict[str, int | float] = dataclasses.field(default_factory=dict)
    """What a torch file holds at its top beside its tensors, such as `epoch`; empty for others."""


def file_of(path: str | Path) -> Path:
    """The weights file that `path` means: a file itself, a checkpoint folder, a run (its newest checkpoint), its
    ``checkpoints/best``, or a box (its descriptor; `default`: the package's).

    Raises DataError if nothing is there, RunError if a folder holds no checkpoint.
    """
    path = in_box(path)
    path = best_named(path) or path
    try:
        if path.is_file():
            return path
        if path.is_dir():
            return _newest(path)
        if path.exists():
            raise DataError(f"{path} is no regular file; {_EXPECTED}")
        names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    near = difflib.get_close_matches(path.name, names, n=3)
    raise DataError(f"{path}: there is no such file or folder" + (f"; near names: {', '.join(near)}" if near else ""))


def best_named(mark: Path) -> Path | None:
    """The checkpoint folder that a run's file ``checkpoints/best`` names, be it there or not; None for another path."""
    try:
        if mark.name != BEST or not mark.is_file() or mark.stat().st_size > _LONGEST_MARK:
            return None
        return mark.with_name(Path(json.loads(mark.read_bytes())["checkpoint"]).name)
    except (OSError, ValueError, KeyError, TypeError):  # a file of that name that is something else
        return None


def _newest(folder: Path) -> Path:
    """The newest weights file in a folder of ours."""
    steps = [step for step in (folder / "checkpoints").glob("step-*") if step.name[5:].isdecimal()]
    for place in [folder, *sorted(steps, key=lambda step: int(step.name[5:]), reverse=True)]:
        if (place / "model.safetensors").is_file():
            return place / "model.safetensors"
    held = sorted(file.name for file in folder.iterdir() if _WEIGHTS_NAME.search(file.name))
    raise RunError(
        f"{folder}: expected a run folder, a checkpoint folder or a weights file; no checkpoint is there "
        "(no model.safetensors, no checkpoints/step-NUMBER)"
        + (f"; name one of its files: {', '.join(held[:4])}" if held else "")
    )


def read_weights(path: str | Path) -> WeightFile:
    """Every tensor of the weights file that `path` means (see `file_of`), on the CPU.

    Raises DataError, with what the file is instead, if it holds none.
    """
    path = file_of(path)
    start = _start_of(path)
    if not start:
        raise DataError(f"{path} is empty; {_EXPECTED}: copy or download it again")
    content: Any
    texts: dict[str, str] = {}
    if _is_safetensors(start):
        texts, content = _read_ours(path)
    elif start.startswith(b"PK"):
        content = _read_zip(path)
    elif start.startswith(_LEGACY_START):
        content = _read_legacy(path)
    else:
        raise DataError(_describe(path, start))
    tensors = dict(_named_tensors(content))
    if not tensors:
        raise DataError(f"{path} holds no tensors by name but {_what(content)}; expected a state dict")
    numbers = {str(key): value for key, value in content.items() if type(value) in (int, float)}
    return WeightFile(path, tensors, texts, numbers)


def _read_ours(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A safetensors file in full: 8 bits restored, and what it shares with another taken from there."""
    texts, content = _read_safetensors(path)
    if EIGHT_BITS in texts:
        with _parsing(path):
            content = restored(content)
    if SHARED not in texts:
        return texts, content
    with _parsing(path):
        told = json.loads(texts[SHARED])
        beside = path.with_name(Path(told["file"]).name)  # a name, wherever the file says that it lies
        names, sha256 = list(told["tensors"]), str(told["sha256"])
    if not beside.is_file() or file_sha256(beside) != sha256:
        raise DataError(
            f"{path} has its encoder from {beside.name}, which is not beside it, or is another file than it was; "
            "keep both together"
        )
    there = _read_ours(beside)[1]
    absent = [name for name in names if name not in there]
    if absent:
        raise DataError(f"{beside} has no {absent[0]}, which {path.name} takes from it")
    return texts, {**content, **{name: there[name] for name in names}}


def read_texts(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, its tensors unread; empty for files of another kind."""
    path = file_of(path)
    return _read_safetensors(path, tensors=False)[0] if _is_safetensors(_start_of(path)) else {}


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins as safetensors: a little-endian length of less than 100 MB, then a JSON object."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def _read_safetensors(path: Path, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    with _parsing(path):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
        here = path.stat().st_size
        whole = 8 + length
        if len(header) == length:
            entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
            whole += max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if here < whole:
            raise DataError(f"{path} was cut: it has {here:,} bytes of at least {whole:,}; copy or download it again")
        with safe_open(path, framework="pt") as file:
            names = file.keys() if tensors else []
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in names}


def _read_zip(path: Path) -> Any:
    """The content of a zip of torch.save, its tensors views of the file."""
    with _parsing(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
            raise DataError(
                f"{path} is a TorchScript program; {_EXPECTED}: save its weights alone, "
                "torch.save(torch.jit.load(FILE).state_dict(), OTHER), where you trust it"
            )
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if not pickles:
            kind = "an .npz of NumPy arrays" if all(name.endswith(".npy") for name in names) else "a zip archive"
            raise DataError(f"{path} is {kind}, not of torch.save; {_EXPECTED}")
        with archive.open(pickles[0]) as file:
            wanted = _wanted(file, 1)
    return _read_torch(path, wanted, mmap=True)


def _read_legacy(path: Path) -> Any:
    with _parsing(path), path.open("rb") as file:
        wanted = _wanted(file, _LEGACY_PICKLES)
    return _read_torch(path, wanted, mmap=False)


def _wanted(file: Any, pickles: int) -> list[str]:
    """The names of all Python objects that the first pickles of a file would make, in order; none is made."""
    operations = (item for _ in range(pickles) for item in pickletools.genops(file))
    names = (str(argument) for operation, argument, _ in operations if operation.name == "GLOBAL")
    return list(dict.fromkeys(name.replace(" ", ".", 1).replace("__builtin__.", "builtins.") for name in names))


def _read_torch(path: Path, wanted: list[str], mmap: bool) -> Any:
    """torch's reader of tensors, with a stand-in for each record among the wanted objects."""
    stand_ins: list[Any] = [(_StandIn, name) for name in wanted if _RECORDS.fullmatch(name)]
    refused = [name for name in wanted if not _RECORDS.fullmatch(name) and not _TENSORS.fullmatch(name)]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise DataError(
            f"{path} is a pickle with Python objects that only running code could make ({', '.join(refused[:3])}"
            f"{more}), which copynce never does; expected tensors: where you trust the file and have its code, save "
            "the weights alone, torch.save(model.state_dict(), FILE)"
        )
    mmap = mmap and path.suffix != ".safetensors"  # by that name torch would take it for one
    with _parsing(path), path.open("rb") as file, torch.serialization.safe_globals(stand_ins):
        return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)


class _StandIn:
    """Takes the place of a record in a pickle: takes anything, keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """A block in which whatever goes wrong is the file's fault: its bytes are not ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, old storages, odd texts
            yield
    except DataError:
        raise
    except Exception as error:
        size = path.stat().st_size
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise DataError(
                f"{path} needs more memory than this machine gives: the file has {size / 2**30:.1f} GiB; save the "
                "weights alone, without the state of their training"
            ) from error
        raise DataError(
            f"{path} is damaged, cut, or of a form that cannot be read without running code ({size:,} bytes); "
            f"{_EXPECTED}: copy or download it again"
        ) from error


def _named_tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in dictionaries of dictionaries, by their keys joined with dots."""
    seen: set[int] = set()  # a pickle's dictionary may hold itself
    open_: list[tuple[str, Mapping[Any, Any]]] = [("", content)] if isinstance(content, Mapping) else []
    while open_:
        prefix, mapping = open_.pop(0)
        if id(mapping) in seen:
            continue
        seen.add(id(mapping))
        for key, value in mapping.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value.detach()
            elif isinstance(value, Mapping):
                open_.append((f"{prefix}{key}.", value))


def _what(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = [str(key) for key in content]
        return f"the keys {', '.join(keys[:6])}" if keys else "an empty dictionary"
    return "another object" if isinstance(content, _StandIn) else f"a {type(content).__name__}"


def _describe(path: Path, start: bytes) -> str:
    """One sentence about a file that holds no weights, from how it begins."""
    for pattern, what, way_out in _KINDS:
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            return f"{path} is {what}; {_EXPECTED}: {way_out}"
    text = start[:40].decode("utf-8", errors="replace")
    shown = repr(text) if text.isprintable() and "\ufffd" not in text else start[:8].hex(" ")
    return f"{path} holds no weights, it begins with {shown}; {_EXPECTED}"
