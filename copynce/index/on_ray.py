"""Files described by Ray: replicas of a model on the machines of a cluster, or in processes of this one.

The command that adds lists, compares and writes as it does alone; only describing goes elsewhere. Replicas are actors,
each on a GPU or some CPU cores. They get the model by its content, blocks of files by their paths, and give descriptors
and facts back; of the index, and of what opens it, they know nothing. So there is one writer, whose transactions no
other replica meets, and what a killed replica had in hand, which nobody has written, is done again by the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from copynce.errors import ConfigError, DataError, RunError, UserError
from copynce.index.describing import Described, describe_here
from copynce.index.listing import File
from copynce.index.settings import IndexConfig
from copynce.model import Model
from copynce.retrieval.extract import WAY
from copynce.retrieval.features import Computed
from dali_pipelines.sources import AnyPath

_AHEAD = 2  # blocks a replica has in hand: it goes on while the driver writes
_MOST = 4096  # pictures of a block: a replica that dies repeats no more, whatever a transaction holds
_TRIES = 4  # of a block whose replicas die
_REACH_SECONDS = 10.0  # until somebody answers at an address
_JOIN_SECONDS = 120.0  # until it has shown to be a cluster
_START_SECONDS = 600.0  # without any replica ready: importing torch from a busy shared disk takes minutes
_STORE_BYTES = 256 * 2**20  # of a local Ray's object store, beside the model

Broken = list[tuple[AnyPath, str]]


class RayDescriber:
    """The describer that is Ray.

    address: of a cluster, HOST:PORT, auto, or ray://HOST:PORT; none: that of the variable RAY_ADDRESS, else a Ray that
    is started here and stopped at the end. A connection that the program already has is used as it is. workers: how
    many replicas; none: as many as there is room for. Raises ConfigError where the address is none, nobody answers
    there, or a replica fits nowhere.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        if address is not None and address not in ("auto", "local") and _host_and_port(address) is None:
            raise ConfigError(
                f"--ray: expected the address of a cluster (HOST:PORT, ray://HOST:PORT, auto), got {address!r}; for a "
                "local Ray let --ray be the last word"
            )
        if workers is not None and workers < 1:
            raise ConfigError(f"--ray-workers: expected at least 1, got {workers}")
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._workers = workers

    def __call__(
        self,
        model: Model,
        files: Sequence[File],
        config: IndexConfig,
        known: Computed | None,
        on_broken: Callable[[AnyPath, str], None],
        say: Callable[[str], None] | None,
    ) -> Generator[Described, None, None]:
        tell = say or (lambda text: None)
        model.module.cpu()
        store = _STORE_BYTES + 2 * sum(value.nbytes for value in model.module.state_dict().values())
        cores = None if self._workers is None else max(os.cpu_count() or 1, self._workers * config.threads)
        with _connected(self._address, cores, store):
            gpu, room = _room(config)
            count = room if self._workers is None else self._workers
            if count > room:
                tell(f"Ray has room for {room} of {count} workers now; the others begin when there is more")
            begin = (ray.put(model), config, gpu, WAY)
            with _replicas(config, gpu, count) as replicas:
                yield from _Work(replicas, begin, files, config, known, on_broken, tell)


class _WithoutModelError(Exception):
    """A replica that died with nothing in hand, and that Ray has started anew before anybody noticed."""


class _Replica:
    """The model on one worker."""

    def __init__(self) -> None:
        self._model: Model | None = None

    def start(self, model: Model, config: IndexConfig, gpu: bool, way: int) -> str:
        """Take the model; where this is. Not the constructor's work, whose arguments Ray warns to keep."""
        if way != WAY:
            raise DataError(
                f"its copynce prepares pictures in another way (number {WAY}, here {way}); install one version on all "
                "machines"
            )
        if gpu and not torch.cuda.is_available():
            raise DataError("Ray gave it a GPU, but torch sees none there")
        self._model = dataclasses.replace(model, device=torch.device("cuda" if gpu else "cpu"))
        self._config = config
        return f"{socket.gethostname()}, process {os.getpid()}"

    def describe(
        self, files: Sequence[File], known: Computed | None
    ) -> tuple[list[Described], Broken, list[str], list[File]]:
        """(descriptors, broken ones, sentences, those of the broken that are not there on this machine)."""
        if self._model is None:
            raise _WithoutModelError
        broken: Broken = []
        said: list[str] = []

        def on_broken(path: AnyPath, reason: str) -> None:
            broken.append((os.fspath(path), reason))

        found = list(describe_here(self._model, files, self._config, known, on_broken, said.append))
        named = {path for path, _ in broken}
        missing = [file for file in files if os.fspath(file) in named and not os.path.exists(_place(file))]
        return found, broken, said, missing


@dataclasses.dataclass
class _Block:
    """Files of a list from `start` on, and how often they were given away."""

    start: int
    files: Sequence[File]
    tries: int = 0


class _Work:
    """The blocks of a list, given to replicas; iterating gives what came back."""

    def __init__(
        self,
        replicas: list[Any],
        begin: tuple[Any, ...],
        files: Sequence[File],
        config: IndexConfig,
        known: Computed | None,
        on_broken: Callable[[AnyPath, str], None],
        tell: Callable[[str], None],
    ) -> None:
        self._begin = begin
        self._known, self._on_broken, self._tell = known, on_broken, tell
        # The first batch of all decides in what the others are computed, as it does without Ray.
        self._deciding = config.precision == "auto" and known is None
        self._blocks = deque(_blocks(files, config, len(replicas), self._deciding))
        self._asked: dict[Any, tuple[Any, _Block | None]] = {}  # by what Ray will answer; no block: is it ready?
        self._in_hand = dict.fromkeys(replicas, 0)  # of those that are ready and those that will be
        self._ready: set[Any] = set()
        for replica in replicas:
            self._greet(replica)

    def __iter__(self) -> Iterator[Described]:
        heard = time.monotonic()
        while self._blocks or any(block is not None for _, block in self._asked.values()):
            self._give()
            done, _ = ray.wait(list(self._asked), num_returns=1, timeout=60)
            if done:
                heard = time.monotonic()
            elif not self._ready and time.monotonic() - heard > _START_SECONDS:
                raise RunError(f"no worker of Ray was ready within {_START_SECONDS:.0f} s; `ray status` may tell why")
            for answer in done:
                replica, block = self._asked.pop(answer)
                if block is None:
                    self._greeted(replica, answer)
                else:
                    yield from self._answered(replica, block, answer)

    def _give(self) -> None:
        """Blocks to replicas with a free hand, to the emptiest first."""
        for held in range(_AHEAD):
            for replica in [one for one in self._ready if self._in_hand[one] == held]:
                if not self._blocks or (self._deciding and any(self._in_hand.values())):
                    return
                block = self._blocks.popleft()
                block.tries += 1
                self._in_hand[replica] += 1
                self._asked[replica.describe.remote(block.files, self._known)] = replica, block

    def _greet(self, replica: Any) -> None:
        # Ray starts a replica that died anew, and keeps this question until it is there.
        self._asked[replica.start.options(max_task_retries=-1).remote(*self._begin)] = replica, None

    def _greeted(self, replica: Any, answer: Any) -> None:
        try:
            self._tell(f"a worker of Ray is ready: {ray.get(answer)}")
            self._ready.add(replica)
        except RayError as error:
            del self._in_hand[replica]
            if not self._in_hand:
                raise RunError(f"no worker of Ray could start; the last one: {_reason(error)}") from error
            self._tell(f"a worker of Ray could not start and is left out: {_reason(error)}")

    def _answered(self, replica: Any, block: _Block, answer: Any) -> Iterator[Described]:
        if replica in self._in_hand:
            self._in_hand[replica] -= 1
        try:
            found, broken, said, missing = ray.get(answer)
        except RayError as error:
            if isinstance(error, RayTaskError) and not isinstance(error.cause, _WithoutModelError):
                if isinstance(error.cause, UserError):  # as the replica raised it
                    raise error.cause from None
                raise
            # It died.
            if block.tries == _TRIES:
                raise RunError(
                    f"workers of Ray died {_TRIES} times while they had the files {os.fspath(block.files[0])} to "
                    f"{os.fspath(block.files[-1])}: {_reason(error)}; what was added before is kept"
                ) from error
            self._blocks.appendleft(block)
            if replica in self._ready:
                self._tell("a worker of Ray died; its pictures are described again")
                self._ready.remove(replica)
                self._greet(replica)
            return
        for file in missing:
            if os.path.exists(_place(file)):
                raise DataError(
                    f"{os.fspath(file)}: is here, but not on a machine that was to read it; workers read files by "
                    "their paths: put them on storage that all machines see in the same place"
                )
        for path, reason in broken:
            self._on_broken(path, reason)
        for sentence in said:
            self._tell(sentence)
        for part in found:
            if self._deciding:
                self._known, self._deciding = part.precision, False
            yield dataclasses.replace(part, places=part.places + block.start)


def _blocks(files: Sequence[File], config: IndexConfig, replicas: int, first_is_a_batch: bool) -> Iterator[_Block]:
    """The files in blocks of whole batches, so that a picture is in the batch it would be in without Ray: at most a
    transaction, and small enough for every replica to get some."""
    batch = min(config.batch_size, config.block)
    share = -(-len(files) // (2 * _AHEAD * replicas))
    step = batch * max(1, min(config.block, _MOST, share) // batch)
    start = 0
    while start < len(files):
        end = start + (batch if first_is_a_batch and not start else step)
        yield _Block(start, files[start:end])
        start = end


@contextlib.contextmanager
def _replicas(config: IndexConfig, gpu: bool, count: int) -> Iterator[list[Any]]:
    """So many actors, for the time of the block; they may still be starting."""
    needs: dict[str, Any] = {"num_cpus": config.threads, "num_gpus": int(gpu)}
    # Started anew wherever there is room; blocks are given again by us, to whoever is there.
    kind: Any = ray.remote(_Replica).options(**needs, max_restarts=-1, max_task_retries=0)
    replicas = [kind.remote() for _ in range(count)]
    try:
        yield replicas
    finally:
        for replica in replicas:
            with contextlib.suppress(Exception):  # it is gone already, or Ray is
                ray.kill(replica)


def _room(config: IndexConfig) -> tuple[bool, int]:
    """(whether replicas take a GPU each, how many have room on the machines of the cluster)."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu = config.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
    if config.device == "gpu" and not gpu:
        raise ConfigError("device is gpu, but no machine of Ray has one; take cpu or auto")
    room = [int(node.get("CPU", 0) // config.threads) for node in nodes]
    if gpu:
        room = [min(here, int(node.get("GPU", 0))) for here, node in zip(room, nodes, strict=True)]
    if not sum(room):
        most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise ConfigError(
            f"a worker takes {config.threads} CPU cores{' and a GPU' if gpu else ''} of Ray, and no machine has them "
            f"(the largest: {most} cores); take fewer, threads=1"
        )
    return gpu, sum(room)


@contextlib.contextmanager
def _connected(address: str, cores: int | None, store: int) -> Iterator[None]:
    """A connection to Ray for the time of the block. cores, store: of one that is started here, and bytes of its object
    store."""
    if ray.is_initialized():
        yield
        return
    own = None
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of each start
        # A folder of our own, to leave none. Sockets in it have at most 107 letters.
        own = Path(tempfile.mkdtemp(prefix="copynce-ray-", dir="/tmp"))
        options |= {"include_dashboard": False, "object_store_memory": store, "num_cpus": cores, "_temp_dir": str(own)}
    else:
        _probe(address)
    try:
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises plain exceptions here
            what = "no Ray could be started here" if own else f"--ray {address}: cannot be joined"
            raise RunError(f"{what}: {_reason(error)}") from error
        yield
    finally:
        ray.shutdown()
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


def _probe(address: str) -> None:
    """ConfigError unless a cluster can be joined there. In a process of its own: where something else answers, Ray asks
    for ever."""
    if (place := _host_and_port(address)) is not None:
        try:
            socket.create_connection(place, timeout=_REACH_SECONDS).close()
        except OSError as error:
            raise ConfigError(f"--ray {address}: nobody answers there ({error})") from error
    command = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_JOIN_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"--ray {address}: no cluster could be joined there in {_JOIN_SECONDS:.0f} s") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConfigError(f"--ray {address}: no cluster can be joined there: {reason[:400]}")


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    return (host.strip("[]"), int(port)) if host and colon and port.isascii() and port.isdigit() else None


def _place(file: File) -> str:
    """The file on the disk."""
    return file if isinstance(file, str) else file.shard


def _reason(error: BaseException) -> str:
    """The last line of what Ray says, which is that of the cause."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:400]
