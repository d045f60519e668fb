"""Compiled blocks: torch.compile makes one program of what a transformer block does, with fewer passes over memory."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch

from copynce.errors import ConfigError
from copynce.models import AnyModel, Matcher
from copynce.models.backbone import blocks_of

#: What makes the programs; another of torch's backends in tests.
BACKEND: Any = "inductor"


def compile_blocks(model: AnyModel, device: torch.device) -> None:
    """From now on, ``model`` runs its transformer blocks compiled: those of the encoder, and of a matcher's fusion.

    Parameters and their names stay, and what is drawn at random (stochastic depth) is drawn alike, so the numbers are
    those of the blocks as they are but for rounding. The first step compiles, some seconds to a minute. A block at a
    time: blocks of one form share a program. Raises ConfigError on a processor whose machine has no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and BACKEND == "inductor" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile_blocks=true needs a C++ compiler on a processor, and there is no {compiler}; install one, name "
            "it in the environment's CXX, or leave compile_blocks out"
        )
    blocks: list[Any] = [*blocks_of(model.encoder), *(model.fusion.blocks if isinstance(model, Matcher) else ())]
    # Numbers that differ between blocks (the rate of stochastic depth) are compiled in; beyond torch's limit of
    # programs the later blocks would run as they are.
    limits: Any = torch._dynamo.config  # loaded here: it takes a second
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(blocks))
    options: Any = {"fallback_random": True} if BACKEND == "inductor" else None
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=BACKEND, options=options)
