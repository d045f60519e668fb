"""The passes of a matcher over views of pictures: read, encoded, fused, counted; and the encodings that are held."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from copynce.data import Manifest
from copynce.errors import DataError
from copynce.models import Matcher
from copynce.models.precision import bf16_in_hardware
from copynce.retrieval.crops import lce_forwards, lce_query, lce_reference, one_of_one
from copynce.retrieval.features import Computed
from copynce.retrieval.pair_scores import ROLES, Role
from dali_pipelines import CropLoader, Cut, LoaderOptions, PictureLoader
from dali_pipelines.cuts import Cuts
from dali_pipelines.sources import AnyPath

#: The largest change of a logit by bfloat16 for which it is taken: odds within a tenth.
BF16_AGREES = 0.1

_PROBED = 16  # pairs that decide it
_REPEATED = 14  # the query's middle tile, which is its central box


@dataclass(frozen=True)
class Views:
    """Which views of a picture of either side are encoded (a function for all, or for each picture of the manifest its
    own), how many they are, and which are fused: (query view, reference view) of each fusion pass of a pair."""

    cuts: Mapping[Role, Cuts | Sequence[Cuts]]
    count: Mapping[Role, int]
    forwards: list[tuple[int, int]]


def _lce_query(width: int, height: int) -> list[Cut]:
    views = lce_query(width, height)
    return [*views[:_REPEATED], *views[_REPEATED + 1 :]]


#: Both whole pictures, and local crops ensembling without the view that is there twice.
WHOLE = Views({"query": one_of_one, "reference": one_of_one}, {"query": 1, "reference": 1}, [(0, 0)])
LOCAL_CROPS = Views(
    {"query": _lce_query, "reference": lce_reference}, {"query": 25, "reference": 10}, lce_forwards(queries=25)
)


class Passes:
    """The passes of a matcher in evaluation mode on `device`; `encodings` and `fusions` count them.

    batch_size: views of an encoder pass (at least those of one picture), pairs of views of a fusion pass. threads: that
    read and decode. precision: of both passes.
    """

    def __init__(
        self,
        matcher: Matcher,
        views: Views,
        manifests: Mapping[Role, Manifest],
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
    ) -> None:
        self.matcher, self.views, self.manifests, self.device = matcher, views, manifests, device
        self.precision: Computed = "fp32"
        self.encodings = self.fusions = 0
        self.batch_size, self._threads = batch_size, threads
        self._forwards = torch.tensor(views.forwards, device=device)

    def pictures_a_batch(self, role: Role) -> int:
        """Of an encoder pass."""
        return max(1, self.batch_size // self.views.count[role])

    def encoded(
        self, role: Role, places: NDArray[np.int64], reasons: dict[str, str]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """(positions in `places` [b], encodings [b, V, T, C]) of pictures of one side, a batch at a time.

        Broken pictures are left out; `reasons` takes {path: reason}.
        """
        for at, images in self._loaded(role, places, reasons):
            yield at, self._encode(images, self.precision)

    def logits(self, tokens: Mapping[Role, Tensor], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [P, forwards] of `pairs` [P, 2], rows of encodings [n, V, T, C] of either side.

        Raises DataError if one is not finite.
        """
        return self._logits(tokens, pairs, self.precision).cpu().numpy()

    @torch.inference_mode()
    def decided(self, places: Mapping[Role, NDArray[np.int64]], say: Callable[[str], None] | None) -> Computed:
        """What "auto" means: bf16 if it is fast here and hardly changes the logits of the first pairs that are whole.

        places: of the pictures of each pair.
        """
        if not bf16_in_hardware(self.device):
            return "fp32"
        for start in range(0, len(places["query"]), _PROBED):
            images, pairs = self._probe({role: places[role][start : start + _PROBED] for role in ROLES})
            if not len(pairs):
                continue
            before = self.encodings, self.fusions
            logits = {}
            for precision in ("bf16", "fp32"):
                tokens = {role: self._encode(images[role], precision) for role in ROLES}
                logits[precision] = self._logits(tokens, pairs, precision)
            self.encodings, self.fusions = before  # this was a question
            worst = float((logits["bf16"] - logits["fp32"]).abs().max())
            if worst <= BF16_AGREES:
                return "bf16"
            if say is not None:
                say(
                    f"bf16 changes logits of this matcher by up to {worst:.3f}, above {BF16_AGREES}: "
                    "matching goes on in fp32"
                )
            return "fp32"
        return "fp32"  # every pair has a broken picture

    def _probe(self, places: Mapping[Role, NDArray[np.int64]]) -> tuple[dict[Role, Tensor], NDArray[np.int64]]:
        """(views of the pictures of some pairs, rows of those pairs that are whole)."""
        images: dict[Role, Tensor] = {}
        rows = []
        for role in ROLES:
            pictures, number = np.unique(places[role], return_inverse=True)
            found = list(self._loaded(role, pictures, {}))
            row = np.full(len(pictures), -1)
            if found:
                row[np.concatenate([at for at, _ in found])] = np.arange(sum(len(at) for at, _ in found))
                images[role] = torch.cat([views for _, views in found])
            rows.append(row[number])
        pairs = np.stack(rows, 1)
        return images, pairs[(pairs >= 0).all(axis=1)]

    def _loaded(
        self, role: Role, places: NDArray[np.int64], reasons: dict[str, str]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """As `encoded`, with the views [b, V, 3, S, S] on the device."""
        paths = [self.manifests[role].paths[place] for place in places]
        # The same pixels, but a small graph, which begins at once; it is there for the CPU only.
        on_gpu = self.device.type == "cuda" and self.views is WHOLE
        options = LoaderOptions(
            size=self.matcher.img_size,
            batch_size=min(self.pictures_a_batch(role), len(paths)),
            device="gpu" if on_gpu else "cpu",
            device_id=self.device.index,
            threads=self._threads,
        )

        def on_broken(path: AnyPath, reason: str) -> None:
            reasons[os.fspath(path)] = reason

        if on_gpu:
            for indices, pictures in PictureLoader(paths, options, on_broken=on_broken):
                yield indices.numpy(), pictures.unsqueeze(1)
        else:
            cuts = self.views.cuts[role]
            if not callable(cuts):
                cuts = [cuts[place] for place in places]
            for indices, views in CropLoader(paths, cuts, options, on_broken=on_broken):
                yield indices.numpy(), views.to(self.device, non_blocking=True)

    def _encode(self, images: Tensor, precision: Literal["fp32", "bf16"]) -> Tensor:
        """Encodings [b, V, T, C] of views [b, V, 3, S, S]."""
        with self._computing(precision):
            tokens = self.matcher.encode(images.flatten(0, 1))
        self.encodings += len(tokens)
        return tokens.unflatten(0, images.shape[:2])

    def _logits(self, tokens: Mapping[Role, Tensor], pairs: NDArray[np.int64], precision: Computed) -> Tensor:
        number = len(self._forwards)
        each = torch.from_numpy(pairs).to(self.device).repeat_interleave(number, 0)
        views = self._forwards.repeat(len(pairs), 1)
        flat = [tokens[role].flatten(0, 1) for role in ROLES]
        rows = [each[:, side] * tokens[role].shape[1] + views[:, side] for side, role in enumerate(ROLES)]
        found = []
        with self._computing(precision):
            for query, reference in zip(*(at.split(self.batch_size) for at in rows), strict=True):
                found.append(self.matcher.fuse(flat[0][query], flat[1][reference]).float())
        self.fusions += len(each)
        logits = torch.cat(found).view(len(pairs), number)
        if not torch.isfinite(logits).all():
            raise DataError(
                f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} logits of the matcher are not finite; its "
                "weights are damaged, or its training diverged"
            )
        return logits

    def _computing(self, precision: Computed) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


class Held:
    """The encodings of a block of pictures of one side, made when they are first asked for.

    They are made in batches that depend on the block alone, so that they are the same to the last bit whatever was
    asked before. pictures: places in the side's manifest. tokens: [n, V, T, C], once there are any.
    """

    def __init__(self, passes: Passes, role: Role, pictures: NDArray[np.int64]) -> None:
        self.tokens: Tensor | None = None
        self._passes, self._role, self._pictures = passes, role, pictures
        self._order = np.argsort(pictures)
        self._made = np.zeros(len(pictures), bool)
        self._broken: dict[int, str] = {}  # {row: reason}

    def require(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], dict[str, str]]:
        """(row of each picture in `tokens`, -1 for broken ones; {path: reason} of the broken ones)."""
        rows = self._order[np.searchsorted(self._pictures, places, sorter=self._order)]
        step = self._passes.pictures_a_batch(self._role)
        batches = np.unique(rows[~self._made[rows]] // step)
        if len(batches):
            wanted = np.concatenate([np.arange(b * step, min((b + 1) * step, len(self._pictures))) for b in batches])
            self._make(wanted)
        paths = self._passes.manifests[self._role].paths
        broken = {row: self._broken[row] for row in np.unique(rows).tolist() if row in self._broken}
        reasons = {os.fspath(paths[self._pictures[row]]): reason for row, reason in broken.items()}
        return np.where(np.isin(rows, list(broken)), -1, rows), reasons

    def _make(self, wanted: NDArray[np.int64]) -> None:
        """The encodings of these rows, whole batches."""
        reasons: dict[str, str] = {}
        for at, tokens in self._passes.encoded(self._role, self._pictures[wanted], reasons):
            if self.tokens is None:
                self.tokens = tokens.new_empty(len(self._pictures), *tokens.shape[1:])
            rows = wanted[at]
            self.tokens[torch.from_numpy(rows).to(tokens.device)] = tokens
            self._made[rows] = True
        paths = self._passes.manifests[self._role].paths
        for row in wanted[~self._made[wanted]].tolist():
            self._broken[row] = reasons[os.fspath(paths[self._pictures[row]])]
        self._made[wanted] = True
