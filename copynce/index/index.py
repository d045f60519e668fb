"""An index of pictures: ``copynce.Index``."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from copynce.data import Quarantine
from copynce.data.shards import read_shard, split_member
from copynce.errors import ConfigError, DataError
from copynce.files import file_sha256
from copynce.index.adding import Added, add_files
from copynce.index.listing import File, list_files
from copynce.index.names import restored, stored
from copynce.index.searching import IndexSearch, Neighbours, approximate, build_approximate
from copynce.index.settings import IndexConfig
from copynce.index.table import FORMAT, PictureTable
from copynce.models.box import DEFAULT, DESCRIPTOR, box_of
from dali_pipelines.sources import ShardMember

if TYPE_CHECKING:  # at once only where a model is needed: torch takes seconds
    from copynce.index.describing import Describer
    from copynce.model import Model, Picture

#: The list of broken pictures in an index's folder, of the last `add`.
SKIPPED = "skipped.jsonl"


class Match(NamedTuple):
    """A picture of an index that is similar to a query. query: its path, or "picture N". reference: the id, by default
    the path. path: the reference's file. score: the cosine of both descriptors, at most 1."""

    query: str
    reference: str
    path: str
    score: float


class Contents(NamedTuple):
    """N pictures of an index, ordered by path. files: paths, or places in shards. size: int64 [N], in bytes. mtime_ns:
    int64 [N], time of change. sha256: of the contents. descriptors: [N, D], float32 or float16."""

    files: list[File]
    size: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    sha256: list[str]
    descriptors: NDArray[np.floating]


class Index:
    """Descriptors of pictures on the disk, which grow with the archive and are searched.

    path: folder of the index, made by the first `add`. model: what describes pictures, as `copynce.load_model` gives it
    or takes it; none: the one that the index was begun with, from its file. settings: those of `IndexConfig`.
    Raises DataError if the folder holds something else, or an index of another model.

    >>> index = Index("archive.index", model="runs/descriptor")  # doctest: +SKIP
    >>> print(index.add("archive"))  # doctest: +SKIP
    1500 new, 0 changed, 0 unchanged, 0 broken
    >>> index.search(["a.jpg"], k=2)  # doctest: +SKIP
    [Match(query='a.jpg', reference='/archive/7.jpg', path='/archive/7.jpg', score=0.93), ...]
    """

    def __init__(
        self, path: str | os.PathLike[str], model: Model | str | os.PathLike[str] | None = None, **settings: Any
    ) -> None:
        name = os.fspath(path)
        self.path = name if "://" in name else os.path.abspath(name)
        self.config = IndexConfig(**settings)
        self._asked = model
        self._model: Model | None = None if model is None or isinstance(model, str | os.PathLike) else model
        self._search: IndexSearch | None = None
        self._table = PictureTable.open(self.path)
        if self._table is not None and model is not None:
            self._check(self.model)

    def __len__(self) -> int:
        """Pictures in the index."""
        if self._table is None:
            self._table = PictureTable.open(self.path)
        if self._table is None:
            return 0
        with self._table.working():
            self._table.refresh()
            return len(self._table)

    @property
    def model(self) -> Model:
        """The model that describes; loaded when it is first needed. DataError if it is another than the index's."""
        if self._model is None:
            name = self._asked
            if name is None:
                name = self._begun_with()
            assert isinstance(name, str | os.PathLike), "a model was taken before"
            from copynce.model import load_model

            model = load_model(name, device=self.config.device)
            self._check(model)
            self._model = model
        return self._model

    def _begun_with(self) -> Path:
        """The file of the model that the index was begun with, or for a new one the package's."""
        card = None if self._table is None else self._table.model
        own = box_of(DEFAULT)
        mine = None if own is None else own / DESCRIPTOR
        if card is None:
            if mine is None:
                raise DataError(f"{self.path}: a new index needs a model (--model, or Index(path, model=...))")
            return mine
        file = Path(card["file"])
        if file.is_file():
            return file
        # The package's own moves with the package.
        if mine is not None and file_sha256(mine) == card["sha256"]:
            return mine
        raise DataError(
            f"{self.path}: the model it was begun with, {file}, is no longer there; name it (--model, or "
            f"Index(path, model=...)): a file with the SHA-256 {card['sha256']}"
        )

    def add(
        self,
        *sources: str | os.PathLike[str],
        strict: bool = False,
        ray: bool | str = False,
        ray_workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Added:
        """Bring the index up to date with files: new ones are described, changed ones anew, others skipped.

        sources: folders, pictures, CSVs (uuid,path), JSON lists, tar shards, `-` for paths on the standard input.
        strict: a broken picture is a DataError instead of being skipped and listed (in INDEX/skipped.jsonl and the
        result). ray: describe by workers of Ray: True, a local one, or the address of a cluster, whose machines see the
        files under the same paths. ray_workers: how many, each on a GPU or on `threads` cores; none: as many as there
        is room for. progress: called as progress(done, total) after each transaction, with what is on the disk. say:
        receives sentences on the way. Several processes may add to one index at once. Files that are gone stay until
        `prune`. Raises DataError for a source that is not there, WriteError if the disk takes no more, ConfigError or
        RunError if Ray is not there or its workers cannot start.
        """
        describe = _describer(ray, ray_workers)
        quarantine = self._quarantine()
        listing = list_files(sources, quarantine.add, say or (lambda text: None))
        if self._table is None:
            if not len(listing):
                raise DataError(f"{self.path}: no picture to begin it with; {quarantine.summary()}")
            self._table = PictureTable.create(self.path, self.model.card(), self.config.descriptor)
            self._check(self.model)  # another process may have been faster, with another model
            with_list = self._quarantine()  # there is a folder for it now
            for path, reason in quarantine.entries():
                with_list.add(path, reason)
            quarantine = with_list
        with self._table.working():
            self._table.refresh()
            added = add_files(
                self._table,
                listing,
                lambda: self.model,
                self.config,
                quarantine=quarantine,
                describe=describe,
                strict=strict,
                progress=progress,
                say=say,
            )
            self._table.refresh()
            if (added.new or added.changed) and not IndexSearch(self._table, self._memory).exact:
                recall = build_approximate(self._table)
                if recall is not None and say is not None:
                    say(f"IVF-PQ index: {recall:.1%} of the exact ten nearest are found")
        return added

    def search(self, pictures: Sequence[Picture], k: int = 10) -> list[Match]:
        """The k most similar pictures of each of `pictures` (files, pictures of Pillow, arrays), query after query, the
        best first. Raises DataError for a broken picture, or if there is no index."""
        names = [
            os.fspath(picture) if isinstance(picture, str | os.PathLike) else f"picture {place}"
            for place, picture in enumerate(pictures)
        ]
        found = self.nearest(self.describe(pictures), k)
        return [
            Match(name, reference, path, float(score))
            for name, scores, ids, paths in zip(names, found.scores, found.ids, found.paths, strict=True)
            for score, reference, path in zip(scores, ids, paths, strict=True)
            if np.isfinite(score)
        ]

    def describe(
        self, pictures: Sequence[Picture], on_broken: Callable[[str, str], None] | None = None
    ) -> NDArray[np.float32]:
        """Descriptors float32 [N, D] by the index's model; see `Model.describe`."""
        from copynce.index.describing import precision_of

        config, table = self.config, self._existing()
        return self.model.describe(
            pictures,
            batch_size=config.batch_size,
            precision=precision_of(table.precision, self.model, config),
            threads=config.threads,
            on_broken=on_broken,
        )

    def nearest(self, descriptors: NDArray[np.floating], k: int = 10) -> Neighbours:
        """The k most similar pictures of each row of `descriptors` [N, D], in the newest version of the index.

        Exactly where its descriptors take at most the setting `memory_gib`, which are then kept in memory for the next
        call; else by IVF-PQ with re-ranking. Raises ValueError for other columns, DataError without an index.
        """
        table = self._existing()
        with table.working():
            table.refresh()
            if self._search is None or self._search.version != table.version:
                self._search = IndexSearch(table, self._memory)
            return self._search(descriptors, k)

    def contents(self) -> Contents:
        """All pictures of the newest version, as they were when they were described."""
        table = self._existing()
        with table.working():
            table.refresh()
            names, descriptors = table.descriptors()
            facts = table.columns(["path", "size", "mtime_ns", "sha256"])
        facts = facts.take(pc.index_in(names["path"], value_set=facts["path"]))
        paths = restored(names["path"])
        order = np.array(sorted(range(len(paths)), key=paths.__getitem__), np.int64)
        shards = _Shards()
        return Contents(
            [shards.file(paths[row]) for row in order],
            facts["size"].to_numpy()[order],
            facts["mtime_ns"].to_numpy()[order],
            facts["sha256"].take(pa.array(order)).to_pylist(),
            descriptors[order],
        )

    def remove(self, *what: str | os.PathLike[str]) -> int:
        """Take pictures out of the index, by id, path or folder; how many. Their files stay.

        Raises DataError, before anything is removed, for what names no picture of the index.
        """
        table = self._existing()
        with table.working():
            table.refresh()
            known = table.columns(["id", "path"])
            chosen = np.zeros(len(known), bool)
            for name in what:
                here = self._named(known, os.fspath(name))
                if not here.any():
                    raise DataError(f"{os.fspath(name)}: {self.path} has no picture of this id or path, or below it")
                chosen |= here
            return self._delete(table, known, chosen)

    def prune(self, *folders: str | os.PathLike[str], dry_run: bool = False) -> list[str]:
        """Take the pictures out of the index whose files are gone, of these folders or of all; their paths, sorted.

        dry_run: only tell. A file that cannot be looked at for another reason than that it is gone stays. The index is
        compacted.
        """
        table = self._existing()
        with table.working():
            table.refresh()
            known = table.columns(["id", "path"])
            paths = restored(known["path"])
            wanted = np.ones(len(known), bool)
            if folders:
                wanted = np.logical_or.reduce([self._named(known, os.fspath(folder)) for folder in folders])
            gone = _Gone()
            chosen = np.array([want and gone(path) for want, path in zip(wanted, paths, strict=True)], bool)
            if not dry_run:
                self._delete(table, known, chosen)
                table.compact()
            return sorted(path for path, out in zip(paths, chosen, strict=True) if out)

    def info(self) -> dict[str, Any]:
        """What there is: `rows`, `bytes`, `fragments`, `version` (the newest), `versions` kept, `format`, `descriptor`
        (type of its numbers), `precision` (in which they are computed), `model` (its card), `search` (exact or
        approximate) and `approximate`, what is known of the IVF-PQ index with its measured recall, None without one.
        """
        table = self._existing()
        with table.working():
            table.refresh()
            exact = IndexSearch(table, self._memory).exact
            return {
                "path": self.path,
                "rows": len(table),
                "bytes": table.bytes(),
                "fragments": table.fragments(),
                "version": table.version,
                "versions": table.versions(),
                "format": FORMAT,
                "precision": table.precision,
                "descriptor": table.schema.field("descriptor").type.value_type.to_pandas_dtype().__name__,
                "model": table.model,
                "search": "exact" if exact else "approximate",
                "approximate": approximate(table),
            }

    @property
    def _memory(self) -> float:
        return self.config.memory_gib * 2**30

    def _existing(self) -> PictureTable:
        if self._table is None:
            self._table = PictureTable.open(self.path)
        if self._table is None:
            raise DataError(
                f"{self.path}: there is no index; `copynce index add {self.path} FOLDER --model MODEL` makes one"
            )
        return self._table

    def _check(self, model: Model) -> None:
        """DataError unless the index was made with this model."""
        if self._table is None:
            return
        mine, card = self._table.model, model.card()
        if all(mine.get(name) == card[name] for name in ("sha256", "way", "dim")):
            return
        if mine.get("sha256") == card["sha256"]:
            raise DataError(
                f"{self.path}: made by another copynce, which prepared pictures in another way (number "
                f"{mine.get('way')}, now {card['way']}); begin a new index"
            )
        raise DataError(
            f"{self.path}: made with {mine.get('file')} (SHA-256 {str(mine.get('sha256'))[:12]}, {mine.get('dim')} "
            f"numbers), not with {card['file']} ({card['sha256'][:12]}, {card['dim']} numbers), and descriptors of two "
            "models cannot be compared; take that model, or begin another index with this one"
        )

    def _quarantine(self) -> Quarantine:
        """An empty list of broken pictures, on the disk where the index's folder is there."""
        if "://" in self.path or not os.path.isdir(self.path):
            return Quarantine()
        file = Path(self.path) / SKIPPED
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
        return Quarantine(file)

    @staticmethod
    def _named(known: pa.Table, name: str) -> NDArray[np.bool_]:
        """Which rows [N] have this id or path, or lie in this folder."""
        path = os.path.abspath(name)
        (as_id, as_path, as_folder) = stored([name, path, path.rstrip("/") + "/"])
        here = pc.or_(pc.equal(known["id"], as_id), pc.equal(known["path"], as_path))
        here = pc.or_(here, pc.starts_with(known["path"], as_folder.as_py()))
        return here.to_numpy()

    @staticmethod
    def _delete(table: PictureTable, known: pa.Table, chosen: NDArray[np.bool_]) -> int:
        paths = known["path"].filter(pa.array(chosen)).combine_chunks()
        return table.delete(paths) if len(paths) else 0


def _describer(ray: bool | str, workers: int | None) -> Describer | None:
    """What describes the files that are added; None: this process."""
    if ray is False:
        if workers is not None:
            raise ConfigError(f"ray_workers={workers} is for --ray; give that too, or leave it out")
        return None
    try:
        from copynce.index.on_ray import RayDescriber
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("--ray needs the package ray, which is not installed; pip install 'copynce[ray]'") from error
    return RayDescriber(None if ray is True else ray, workers)


class _Shards:
    """The members of shards; each shard is listed once."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, ShardMember] | None] = {}

    def members(self, shard: str) -> dict[str, ShardMember] | None:
        """By name; none if the shard is gone, None if it cannot be read."""
        if shard not in self._known:
            try:
                self._known[shard] = read_shard(Path(shard))
            except DataError:  # it is gone, or cannot be read
                self._known[shard] = {} if not os.path.exists(shard) else None
        return self._known[shard]

    def file(self, path: str) -> File:
        """What a path of the table names; the path itself where there is no such member of a shard."""
        inside = split_member(path)
        if inside is None or os.path.lexists(path):
            return path
        return (self.members(inside[0]) or {}).get(inside[1], path)


class _Gone:
    """Whether the file of a path, or its member of a shard, is there no more."""

    def __init__(self) -> None:
        self._shards = _Shards()

    def __call__(self, path: str) -> bool:
        try:
            return not stat.S_ISREG(os.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            inside = split_member(path)
            if inside is None:
                return True
            names = self._shards.members(inside[0])
            return names is not None and inside[1] not in names
        except OSError:
            return False
