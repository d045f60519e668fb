"""Names in files of others: where the encoder lies, and how its tensors are called here.

A training writes its model under prefixes of its own (`module.`, `_orig_mod.`, `teacher.backbone.`, Lightning's
`model.`) and often twice, as student and teacher. None of these is listed: the encoder is what lies beside a
`patch_embed.proj.weight`, whatever stands before it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from torch import Tensor

from copynce.errors import DataError
from copynce.models.weight_files import WeightFile

_ANCHOR = "patch_embed.proj.weight"

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


def find_encoder(file: WeightFile) -> Model:
    """The model in a file of weights; of several the teacher's. Raises DataError if there is none, or no telling."""
    roots = [name.removesuffix(_ANCHOR) for name in file.tensors if f".{name}".endswith(f".{_ANCHOR}")]
    if not roots:
        names = list(file.tensors)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise DataError(
            f"{file.path} holds no vision transformer with timm's names: it has {', '.join(names[:4])}{more}, expected "
            f"one that ends in {_ANCHOR}"
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
    tensors: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        if name.startswith(root):
            tensors["encoder." + _renamed(name.removeprefix(root))] = tensor
        elif name.startswith(base):
            tensors[name.removeprefix(base)] = tensor
    return Model(tensors, root.rstrip("."), [other.rstrip(".") for other in roots if other != root])


def shape_facts(tensors: Mapping[str, Tensor]) -> dict[str, int | float]:
    """What the shapes of `encoder.*` tell: `patch_size`, `embed_dim`, `depth`, `mlp_ratio`, as timm's options."""
    projection = tensors[f"encoder.{_ANCHOR}"]
    facts: dict[str, int | float] = {"embed_dim": projection.shape[0], "patch_size": projection.shape[-1]}
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


def is_matcher(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are a matcher's: whether there are blocks that see both pictures."""
    return any(name.startswith("fusion.") for name in tensors)


def divided(tensors: Mapping[str, Tensor], encoder_blocks: int) -> dict[str, Tensor]:
    """The tensors of a backbone as a matcher's: later blocks and norm are the fusion's (PROTOCOLS 9.5)."""

    def renamed(name: str) -> str:
        block = re.match(r"encoder\.blocks\.(\d+)\.(.*)", name)
        if block and int(block[1]) >= encoder_blocks:
            return f"fusion.blocks.{int(block[1]) - encoder_blocks}.{block[2]}"
        return re.sub(r"^encoder\.norm\.", "fusion.norm.", name)

    return {renamed(name): tensor for name, tensor in tensors.items()}


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
