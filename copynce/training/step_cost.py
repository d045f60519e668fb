"""What a step of a model costs, without making it: its FLOP, and the memory that its backward pass waits with.

The model runs forward and backward on tensors that have shapes but no numbers (torch's fake tensors), with as many
pictures as a step has. A multiplication and an addition are 2 FLOP. What comes after the model, the losses, is not
counted: under 1 % of either.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from copynce.models import AnyModel, Matcher


@dataclass(frozen=True)
class StepCost:
    """Of one process' step with so many ``pictures``: FLOP of the forward pass and of both; ``saved`` bytes between
    them, the weights themselves left out."""

    pictures: int
    forward_flop: int
    flop: int
    saved: int


def step_cost(model: AnyModel, pictures: int, *, half: bool, checkpointed: bool = False) -> StepCost:
    """The cost of a training step with ``pictures`` (an even number: queries and their references).

    half: whether the encoder runs in 16 bits under autocast, as the trainer's does. Attention is counted as the two
    products that it is, and as if nothing of size tokens x tokens were kept: fused kernels keep none. checkpointed:
    whether backward computes each block again; then ``saved`` is an estimate.
    """
    # Under autocast attention is made of plain products here, which the counter sees; fused it may not.
    forward, both, saved = _run(model, pictures, half=True)
    if not half:
        saved = _run(model, pictures, half=False)[2]
    if checkpointed:
        both += forward
        inputs, blocks = _block_inputs(model)
        saved = pictures * 4 * inputs + saved // blocks
    return StepCost(pictures, forward, both, saved)


def _block_inputs(model: AnyModel) -> tuple[int, int]:
    """Numbers in the inputs of all blocks, of a picture; and how many blocks there are."""
    width, alone = int(model.encoder.embed_dim), len(model.encoder.blocks)
    tokens, *pair = sorted(_token_counts(model))
    if not isinstance(model, Matcher):
        return width * tokens * alone, alone
    together = len(model.fusion.blocks)
    return width * (tokens * alone + pair[0] * together // 2), alone + together


def _run(model: AnyModel, pictures: int, *, half: bool) -> tuple[int, int, int]:
    """FLOP forward, FLOP of both passes, bytes saved between them."""
    twin, mode = copy.deepcopy(model).train(), FakeTensorMode()
    for module in twin.modules():
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is not None:
                    kept[name] = mode.from_tensor(value)  # type: ignore[assignment]

    known = {tensor.untyped_storage()._cdata for tensor in (*twin.parameters(), *twin.buffers())}
    attention = {(count, count) for count in _token_counts(model)}
    kept_storages: dict[int, torch.UntypedStorage] = {}  # alive, for a number may be used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and tuple(tensor.shape[-2:]) not in attention:
            kept_storages[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False)
    with mode, counter:
        images = torch.zeros(pictures, 3, model.img_size, model.img_size)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        ):
            outputs: tuple[Tensor, ...] = (
                twin.with_tokens(*images.chunk(2)) if isinstance(twin, Matcher) else twin(images, sides=2)
            )
        forward = counter.get_total_flops()
        torch.stack([output.float().sum() for output in outputs]).sum().backward()
    return forward, counter.get_total_flops(), sum(storage.nbytes() for storage in kept_storages.values())


def _token_counts(model: AnyModel) -> set[int]:
    """How many tokens attention sees at once: those of a picture, and in a matcher those of a pair; a ResNet has
    none."""
    prefix = getattr(model.encoder, "num_prefix_tokens", None)
    if prefix is None:
        return set()
    tokens = model.grid**2 + int(prefix)
    return {tokens, 1 + 2 * tokens}
