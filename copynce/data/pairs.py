"""Pair plans: which pictures make the pairs of a step, and with which edit programs.

Everything follows from (seed, epoch) and the manifest, never from the number of workers or from what came before, so a
run that continues in the middle of an epoch sees the batches that it would have seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from copynce.data.manifest import DataError, Manifest
from copynce.pixtrace import EditProgram, Policy, sample_program
from dali_pipelines import Pair

_PLAIN = EditProgram()


@dataclasses.dataclass(frozen=True)
class PairSampler:
    """The positive pairs of a descriptor's training: query = edited picture, reference = the picture as it is.

    manifest: the training pictures. policy: name or :class:`copynce.pixtrace.Policy`. batch_size: pairs per rank and
    step. An epoch is one permutation of the pictures, the same on every rank; step ``i`` takes the next ``batch_size *
    world_size`` of them and rank ``r`` every ``world_size``-th, so every rank makes the same number of steps and each
    picture is met at most once per epoch; the last partial batch is dropped.
    Raises DataError if the manifest does not fill one step.
    """

    manifest: Manifest
    policy: str | Policy
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2 pairs, other pairs are the negatives; got {self.batch_size}"
            )
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{self.manifest.root}: one step takes {self.batch_size} pictures on each of {self.world_size} "
                f"processes, got {len(self.manifest)} pictures in all; choose a smaller batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full steps in one epoch."""
        return len(self.manifest) // (self.batch_size * self.world_size)

    def batches(self, first_step: int, last_step: int) -> Iterator[list[Pair]]:
        """This rank's batches of the global steps [first_step, last_step), counted over all epochs from 0."""
        permutation = np.empty(0, dtype=np.int64)
        shuffled = -1
        for step in range(first_step, last_step):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                permutation = np.random.default_rng((self.seed, epoch)).permutation(len(self.manifest))
                shuffled = epoch
            start = within * self.batch_size * self.world_size + self.rank
            chosen = permutation[start : start + self.batch_size * self.world_size : self.world_size]
            yield [self.pair(int(index), epoch) for index in chosen]

    def pair(self, index: int, epoch: int) -> Pair:
        """The positive pair of picture ``index`` in ``epoch``."""
        uuid, path = self.manifest.uuids[index], self.manifest.paths[index]
        program = sample_program(self.policy, seed=self.seed, epoch=epoch, uuid=uuid)
        return Pair(path, program, path, _PLAIN, True, uuid)

    def substitute(self, broken: Pair, attempt: int) -> Pair:
        """The pair that takes the place of one whose picture is broken: another picture, by hash, same program."""
        digest = hashlib.blake2b(f"{self.seed}/{attempt}/{broken.uuid}".encode(), digest_size=8).digest()
        index = int.from_bytes(digest, "little") % len(self.manifest)
        path = self.manifest.paths[index]
        return dataclasses.replace(broken, query_path=path, reference_path=path, uuid=self.manifest.uuids[index])
