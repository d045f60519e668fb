"""Where Numba's compiled code is kept: ``njit`` and ``cfunc`` as Numba's, with a cache that always finds a place.

Compiling takes a minute or two of one core, so it is done once for a processor and kept, in the first of these folders
that can be written; each of them is read:

1. ``$COPYNCE_CACHE_DIR/copynce-UID``, if that variable is set;
2. ``__pycache__`` beside the source, trusted as the source itself is (an installation that one user has warmed up
   serves all others);
3. ``$XDG_CACHE_HOME/copynce`` or ``~/.cache/copynce``;
4. ``copynce-UID`` in the temporary folder.

All but the second must belong to this user and be closed to others, for what lies in them is run. Where none can be
written nothing is kept, and a warning says so: a cache never ends the work.

A file holds one compiled function for one processor, one version of Python and of Numba. It is stale once the file of
the function changes, or a file of ours that this one imports, directly or not. Files are written beside and renamed, so
any number of processes may compile at once, and their contents are checked, so a disk that was full leaves no harm.

That it begins to compile, and what goes wrong, is said once a process through the logger ``copynce.compiled_cache``: on
stderr, unless the program has set up :mod:`logging` otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import re
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import sigutils
from numba.core.caching import _Cache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.errors import NumbaWarning
from numba.core.serialize import dumps

#: The variable that names a folder for compiled code.
VARIABLE = "COPYNCE_CACHE_DIR"

_log = logging.getLogger(__name__)
_PACKAGES = ("copynce", "dali_pipelines")
_BESIDE = "__pycache__"
_IMPORT = re.compile(rb"^(?:from\s+([\w.]+)\s+)?import\s+(\([^)]*\)|[^\n#]*)", re.MULTILINE)
_DIGEST = hashlib.sha256().digest_size


def njit(signature: Any = None, *, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit``; with ``cache`` the compiled code is kept. A signature is compiled at once and allows no other."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(**options)(function)
        if cache:
            dispatcher._cache = _Kept(function)
        if signature is not None:
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        return dispatcher

    return decorate


def cfunc(signature: Any, *, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.cfunc``; with ``cache`` the compiled code is kept."""

    def decorate(function: Callable[..., Any]) -> Any:
        callback: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
        if cache:
            callback._cache = _Kept(function)
        callback.compile()
        return callback

    return decorate


@functools.cache
def folders(source: str) -> tuple[Path, ...]:
    """The folders for the compiled code of a source file, best first, whether they exist or not."""
    beside = Path(os.path.abspath(source)).parent
    own = f"copynce-{os.geteuid()}"
    # Two installations of the package share a user's folder.
    name = f"{beside.name}-{hashlib.sha256(os.fsencode(beside)).hexdigest()[:16]}"
    found = [beside / _BESIDE]
    asked = os.environ.get(VARIABLE)
    if asked:
        found.insert(0, Path(asked).absolute() / own / name)
    home = _home_cache()
    if home is not None:
        found.append(home / "copynce" / name)
    with contextlib.suppress(FileNotFoundError):  # no temporary folder can be written
        found.append(Path(tempfile.gettempdir()).absolute() / own / name)
    return tuple(found)


def _home_cache() -> Path | None:
    """The user's folder for caches, or None where there is no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    home = os.path.expanduser("~")  # stays "~" for a user whom the system does not know
    return Path(home) / ".cache" if os.path.isabs(home) and os.path.isdir(home) else None


def _ours_alone(found: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user and nobody else can write it."""
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _closed(folder: Path) -> bool:
    """Whether a folder and the one above are real folders of this user, which nobody else can write."""
    found = [os.lstat(folder.parent), os.lstat(folder)]
    return all(stat.S_ISDIR(one.st_mode) and _ours_alone(one) for one in found)


def _make(folder: Path) -> None:
    """Make a folder for this user alone; raises OSError where that fails or the folder there is not his own."""
    if folder.name == _BESIDE:
        folder.mkdir(exist_ok=True)
        return
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _closed(folder):
        raise PermissionError("it belongs to another user, or others can write it")


def _read(path: Path) -> bytes:
    """The contents of a file of compiled code; raises OSError where there is none that may be run."""
    with open(path, "rb") as file:
        if path.parent.name != _BESIDE and not (_closed(path.parent) and _ours_alone(os.fstat(file.fileno()))):
            raise PermissionError(f"{path} is not this user's alone")
        return file.read()


def _write(path: Path, content: bytes) -> None:
    """A whole file or none. Its contents carry a checksum, so nothing waits for the disk."""
    handle, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            if path.parent.name == _BESIDE:
                os.fchmod(file.fileno(), 0o644)  # others read it, as they read the source
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class _Kept(_Cache):
    """The compiled forms of one function, each in a file of its own."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._source: str = function.__code__.co_filename
        self._folders = folders(self._source)

    @property
    def cache_path(self) -> str:
        return str(self._folders[0])

    def enable(self) -> None:
        """Part of Numba's interface; the cache is on from the beginning."""

    def disable(self) -> None:
        self._folders = ()

    def flush(self) -> None:
        """Forget all forms of the function."""
        for folder in self._folders:
            for path in folder.glob(f"{self._prefix()}-*.compiled"):
                path.unlink(missing_ok=True)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        key, name = self._key(sig, target_context.codegen())
        for folder in self._folders:
            try:
                content = _read(folder / name)
            except OSError:
                continue
            stored, check, payload = content[:_DIGEST], content[_DIGEST : 2 * _DIGEST], content[2 * _DIGEST :]
            if stored == key and check == hashlib.sha256(payload).digest():
                return CompileResult._rebuild(target_context, *pickle.loads(payload))
        _say_that_it_begins(self._folders)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        if data.library.has_dynamic_globals or any(not lifted.can_cache for lifted in data.lifted):
            warnings.warn(f"{self._prefix()} holds addresses of this process and cannot be kept", NumbaWarning, 2)
            return
        key, name = self._key(sig, data.codegen)
        payload = dumps(data._reduce())
        content = key + hashlib.sha256(payload).digest() + payload
        failures: list[str] = []
        for folder in self._folders:
            try:
                _make(folder)
                _write(folder / name, content)
                break
            except OSError as error:
                failures.append(f"{folder} ({error.strerror or error})")
        if len(failures) == len(self._folders):
            _warn_once(
                "compiled code can be kept nowhere, so every process compiles anew, for a minute or more; set "
                f"{VARIABLE} to a folder that you can write. Tried: {'; '.join(failures)}"
            )
        elif failures and os.environ.get(VARIABLE):
            _warn_once(f"compiled code cannot be kept where {VARIABLE} says: {failures[0]}; it goes to {folder}")

    def _prefix(self) -> str:
        return f"{Path(self._source).stem}.{self._function.__qualname__.replace('<locals>.', '')}"

    def _key(self, sig: Any, codegen: Any) -> tuple[bytes, str]:
        """The digest of all that the compiled code depends on, and the name of its file, the same before and after an
        edit, so that new code takes the old one's place."""
        python = f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"
        place = repr((python, numba.__version__, str(sig), codegen.magic_tuple()))
        cells = tuple(cell.cell_contents for cell in self._function.__closure__ or ())
        key = hashlib.sha256(place.encode())
        key.update(_stamp(self._source))
        key.update(self._function.__code__.co_code)
        key.update(dumps(cells) if cells else b"")
        return key.digest(), f"{self._prefix()}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.compiled"


@functools.cache
def _stamp(source: str) -> bytes:
    """Digest of a source file and of the files of ours that it imports, directly or not."""
    digest = hashlib.sha256()
    seen: set[str] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        with open(path, "rb") as file:
            content = file.read()
        digest.update(hashlib.sha256(content).digest())
        waiting.extend(_imported(content))
    return digest.digest()


def _imported(content: bytes) -> Iterator[str]:
    """Files of our packages that a source imports at its top."""
    for match in _IMPORT.finditer(content):
        origin = (match[1] or b"").decode()
        names = re.findall(r"[\w.]+", re.sub(r"\sas\s+\w+", "", match[2].decode()))
        for module in [origin, *(f"{origin}.{name}" for name in names)] if origin else names:
            package, *below = module.split(".")
            if package in _PACKAGES and package in sys.modules:
                path = os.path.join(sys.modules[package].__path__[0], *below)
                yield from filter(os.path.isfile, (f"{path}.py", os.path.join(path, "__init__.py")))


_said: set[str] = set()
_saying = threading.Lock()


def _first_time(what: str) -> bool:
    with _saying:
        new = what not in _said
        _said.add(what)
        return new


def _warn_once(text: str) -> None:
    if _first_time(text.partition(";")[0]):
        _log.warning("copynce: %s", text)


def _say_that_it_begins(places: tuple[Path, ...]) -> None:
    if os.environ.get("RANK", "0") != "0" or not _first_time("begins"):  # of torchrun's processes the first one speaks
        return
    where = "and cannot be kept"
    for folder in places:
        try:
            _make(folder)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        where = f"once; kept in {folder}"
        break
    _log.warning("copynce: compiling for this processor, a minute or two of one core, %s", where)
