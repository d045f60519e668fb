"""Names in files of others: where the encoder lies, and how its tensors are called here.

A training writes its model under prefixes of its own (`module.`, `_orig_mod.`, `teacher.backbone.`, Lightning's
`model.`) and often twice, as student and teacher. None of these is listed: the encoder is what lies beside a
`patch_embed.proj.weight`, or a ResNet's `layer1.0.conv1.weight`, whatever stands before it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from copynce.errors import DataError
from copynce.models.weight_files import WeightFile

T = TypeVar("T")

_ANCHOR = "patch_embed.proj.weight"
_RESNET_ANCHOR = "layer1.0.conv1.weight"

LOG_SCALE = "infonce_log_scale"
"""The loss's own parameter in released files."""

#: Words in a prefix by which one of several encoders is taken: the average of a training before the model itself.
_PREFERENCE = {"teacher": 0, "target": 0, "ema": 0, "student": 2, "momentum": 2}

#: Other names of the same tensors, applied until nothing changes.
_RENAMED = (
    (re.compile(r"^blocks\.\d+\.(\d+\.)"), r"blocks.\1"),  # DINOv2: blocks in chunks, numbered through
    (re.compile(r"^register_tokens$"), "reg_token"),
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),  # DINOv2's gated MLP
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """The model in a file, under the names of a `Descriptor` or `Matcher`."""

    tensors: dict[str, Tensor]
    """`encoder.*`, and what stood beside the encoder: `heads.*`, `infonce_log_scale`, a matcher's `fusion.*`."""
    place: str
    """The prefix of the encoder's names in the file, without its last dot."""
    others: list[str]
    """Such prefixes of the encoders that were not taken."""
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    """What each of `tensors` is called in the file."""


def find_encoder(file: WeightFile) -> Model:
    """The model in a file of weights; of several the teacher's. Raises DataError if there is none, or no telling."""
    roots = [
        name.removesuffix(anchor)
        for name in file.tensors
        for anchor in (_ANCHOR, _RESNET_ANCHOR)
        if f".{name}".endswith(f".{anchor}")
    ]
    if not roots:
        held = list(file.tensors)
        more = f" and {len(held) - 4} more" if len(held) > 4 else ""
        raise DataError(
            f"{file.path} holds no vision transformer with timm's names: it has {', '.join(held[:4])}{more}, expected "
            f"one that ends in {_ANCHOR} (or a ResNet's {_RESNET_ANCHOR})"
        )
    ranks = {root: _rank(root) for root in roots}
    best = [root for root in roots if ranks[root] == min(ranks.values())]
    if len(best) > 1:
        places = ", ".join(root.rstrip(".") or "the top" for root in best)
        raise DataError(
            f"{file.path} holds several encoders ({places}); save the one that is meant in a file of its own"
        )
    root = best[0]
    base = root.removesuffix("encoder.") if f".{root}".endswith(".encoder.") else root
    names: dict[str, str] = {}
    for name in file.tensors:
        if name.startswith(root):
            names["encoder." + _renamed(name.removeprefix(root))] = name
        elif name.startswith(base):
            names[name.removeprefix(base)] = name
    tensors = {ours: file.tensors[theirs] for ours, theirs in names.items()}
    return Model(tensors, root.rstrip("."), [other.rstrip(".") for other in roots if other != root], names)


def shape_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of `encoder.*` tell, as timm's options: `patch_size`, `embed_dim`, `depth`, `mlp_ratio`; of a
    ResNet `layers` and `channels`."""
    if is_resnet(tensors):
        stages = [
            max(
                (int(match[1]) for name in tensors if (match := re.match(rf"encoder\.layer{k}\.(\d+)\.", name))),
                default=-1,
            )
            for k in range(1, 5)
        ]
        first = [tensors.get(f"encoder.layer{k}.0.conv1.weight") for k in range(1, 5)]
        return {
            "layers": [last + 1 for last in stages],
            "channels": [0 if weight is None else weight.shape[0] for weight in first],
        }
    projection = tensors[f"encoder.{_ANCHOR}"]
    facts: dict[str, Any] = {"embed_dim": projection.shape[0], "patch_size": projection.shape[-1]}
    facts["depth"] = count_blocks(tensors, "encoder")
    hidden = tensors.get("encoder.blocks.0.mlp.fc2.weight")
    if hidden is not None and hidden.ndim == 2 and hidden.shape[0] > 0:
        facts["mlp_ratio"] = hidden.shape[1] / hidden.shape[0]
    return facts


def count_blocks(tensors: Mapping[str, Tensor], part: str) -> int:
    """The number of blocks of `encoder` or `fusion`."""
    return (
        max((int(match[1]) for name in tensors if (match := re.match(rf"{part}\.blocks\.(\d+)\.", name))), default=-1)
        + 1
    )


def is_resnet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the encoder is a ResNet."""
    return f"encoder.{_RESNET_ANCHOR}" in tensors


def is_matcher(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are a matcher's: whether there are blocks that see both pictures."""
    return any(name.startswith("fusion.") for name in tensors)


def divided(tensors: Mapping[str, T], encoder_blocks: int) -> dict[str, T]:
    """What belongs to the names of a backbone under those of a matcher: later blocks and norm are the fusion's
    (PROTOCOLS 9.5)."""

    def renamed(name: str) -> str:
        block = re.match(r"encoder\.blocks\.(\d+)\.(.*)", name)
        if block and int(block[1]) >= encoder_blocks:
            return f"fusion.blocks.{int(block[1]) - encoder_blocks}.{block[2]}"
        return re.sub(r"^encoder\.norm\.", "fusion.norm.", name)

    return {renamed(name): tensor for name, tensor in tensors.items()}


def moves(taken: Mapping[str, str]) -> list[str]:
    """Lines `theirs -> ours` about {our name: the file's name}, whole modules and runs of blocks in one."""
    runs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for ours, theirs in taken.items():
        label, number = _grouped(theirs)
        ours_label, ours_number = _grouped(ours)
        if number is None or ours_number is None:
            label, ours_label, numbers = _module(theirs), _module(ours), (-1, -1)
        else:
            numbers = (number, ours_number)
        found = runs.setdefault((label, ours_label), [])
        if numbers not in found:
            found.append(numbers)
    lines: list[tuple[str, str]] = []
    for (theirs, ours), found in runs.items():
        for first, last in _consecutive(sorted(found)):
            lines.append((theirs + _span(first[0], last[0]), ours + _span(first[1], last[1])))
    width = max((len(theirs) for theirs, _ in lines), default=0)
    return [f"{theirs:{width}} -> {ours}" for theirs, ours in lines]


def modules_of(names: Iterable[str]) -> list[str]:
    """Names of tensors as those of the modules that hold them, each once."""
    return list(dict.fromkeys(_module(name) for name in names))


def _grouped(name: str) -> tuple[str, int | None]:
    """The name of a list of blocks and the number in it; no number where the tensor lies in none."""
    block = re.match(r"((?:.*\.)?blocks\.(?:\d+\.)?)(\d+)\.\D", name)
    return (block[1], int(block[2])) if block else (name, None)


def _module(name: str) -> str:
    return re.sub(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$", "", name)


def _consecutive(pairs: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last of the runs in which both numbers grow by 1."""
    first = last = pairs[0]
    for pair in pairs[1:]:
        if pair != (last[0] + 1, last[1] + 1):
            yield first, last
            first = pair
        last = pair
    yield first, last


def _span(first: int, last: int) -> str:
    if first < 0:
        return ""
    return str(first) if first == last else f"{first}-{last}"


def square_root(count: int) -> int | None:
    """The side of a square grid of `count` patches; None if it is none."""
    side = math.isqrt(max(count, 0))
    return side if side > 0 and side * side == count else None


def _rank(root: str) -> int:
    words = re.split(r"[._]", root)
    return min((_PREFERENCE[word] for word in words if word in _PREFERENCE), default=1)


def _renamed(name: str) -> str:
    before = None
    while name != before:
        before = name
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name)
    return name
