"""A descriptor's head solved for, in place of the trained one: what its class tokens tell of copies, whitened.

    python -m scripts.refit_head runs/descriptor --pictures LIST.csv --second-block 7 --out refit.safetensors

Of `--pairs` training pictures and an edited version of each (the descriptor's training edits), with class tokens x of
the last block, or of two blocks ([2 C]; each block by its mean variance), the head becomes the linear map

    M = (S + W_1 mean(diag S) I)^(-1/2)     S: covariance of edited - original: what edits change counts less
    P: PCA whitening of (x - m) M           of the originals, the widest `--dim` directions; each variance v as
                                            v + W_2 mean(v)
    descriptor = (x - m) M P, of length 1   [dim]

and all else of the model stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from copynce.data import read_manifest
from copynce.models import load_descriptor, save_checkpoint
from copynce.models.checkpoints import read_checkpoint_metadata
from copynce.models.descriptor import Descriptor
from copynce.models.layers import LinearHead
from copynce.pixtrace import EditProgram, sample_program
from copynce.training import find_model
from dali_pipelines import LoaderOptions, Pair, PairLoader
from dali_pipelines.sources import AnyPath

WITHIN, SPREAD = 0.3, 3.0
"""W_1 and W_2."""

_BATCH = 40

Tokens = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("descriptor", help="a run or a weights file")
    parser.add_argument("--pictures", required=True, help="training pictures, a CSV or a folder")
    parser.add_argument("--second-block", type=int, help="whose class token is read beside the last one's, from 0")
    parser.add_argument("--dim", type=int, default=512, help="numbers at most (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=2000, help="of which so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of which, and of their edits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="weights file, .safetensors")
    options = parser.parse_args()
    file = find_model(options.descriptor)
    model = reading(load_descriptor(file), options.second_block)
    manifest = read_manifest(options.pictures)
    chosen = np.random.default_rng(options.seed).permutation(len(manifest))[: options.pairs]
    original, edited = class_tokens(model, [manifest.paths[place] for place in chosen], options.seed, options.threads)
    card = {**read_checkpoint_metadata(file), "head": f"solved for, by scripts.refit_head, of {len(original)} pairs"}
    made = with_head(model, *solved(original, edited, model.channels, options.dim))
    save_checkpoint(options.out, made, card)
    print(f"{options.out}: the head of {len(original)} pairs, {made.dim} numbers a picture")


def reading(model: Descriptor, second_block: int | None) -> Descriptor:
    """The same encoder, under a head that reads a second class token; without one the model itself."""
    if second_block is None:
        return model
    made = Descriptor(replace(model.config, head="linear_bn", second_class_block=second_block))
    made.encoder.load_state_dict(model.encoder.state_dict())
    return made.eval()


def class_tokens(model: Descriptor, paths: Sequence[AnyPath], seed: int, threads: int) -> tuple[Tokens, Tokens]:
    """Class tokens [N, C] of pictures, and of an edited version of each; another stands for a broken one."""

    def pairs() -> Iterator[list[Pair]]:
        for start in range(0, len(paths), _BATCH):
            yield [
                Pair(
                    path,
                    sample_program("descriptor", seed=seed, epoch=0, uuid=str(path)),
                    path,
                    EditProgram(),
                    positive=True,
                    uuid=str(path),
                )
                for path in paths[start : start + _BATCH]
            ]

    found: list[tuple[Tokens, Tokens]] = []
    options = LoaderOptions(size=model.img_size, batch_size=_BATCH, device="cpu", threads=threads)
    broken: list[str] = []
    loader = PairLoader(
        pairs(),
        paths,
        options,
        substitute=lambda pair, attempt: replace(
            pair, query_path=paths[attempt % len(paths)], reference_path=paths[attempt % len(paths)]
        ),
        on_broken=lambda path, reason: broken.append(f"{path}: {reason}"),
    )
    model.eval()
    for batch in loader:
        with torch.inference_mode():
            sides = [model.class_token(images) for images in (batch.reference, batch.query)]
        found.append((sides[0].double().numpy(), sides[1].double().numpy()))
        print(f"{sum(len(part) for part, _ in found)} of {len(paths)}", flush=True)
    for line in broken:
        print(f"skipped {line}")
    return np.concatenate([part for part, _ in found]), np.concatenate([part for _, part in found])


def solved(original: Tokens, edited: Tokens, channels: int, dim: int) -> tuple[Tokens, Tokens]:
    """(M P [W, min(dim, W)], m [W]) of the module's text, of class tokens [N, W], W a multiple of `channels`."""
    mean = original.mean(0)
    by_block = original.var(0).reshape(-1, channels).mean(1) ** -0.5
    scale = np.repeat(by_block, channels)
    values, vectors = np.linalg.eigh(np.cov(((edited - original) * scale).T))
    within = scale[:, None] * (vectors * (values + WITHIN * values.mean()) ** -0.5 @ vectors.T)
    values, vectors = np.linalg.eigh(np.cov(((original - mean) @ within).T))
    widest = slice(None, -dim - 1, -1)
    return within @ vectors[:, widest] * (values[widest] + SPREAD * values.mean()) ** -0.5, mean


def with_head(model: Descriptor, weight: Tokens, mean: Tokens) -> Descriptor:
    """The same encoder, with (x - mean) weight as its head."""
    made = Descriptor(replace(model.config, head="linear_bn", dim=weight.shape[1]))
    made.encoder.load_state_dict(model.encoder.state_dict())
    head = made.heads["linear_head"]
    assert isinstance(head, LinearHead)
    with torch.no_grad():
        head.fc1.weight.copy_(torch.from_numpy(weight.T))
        head.bn.get_buffer("running_mean").copy_(torch.from_numpy(mean @ weight))
        head.bn.get_buffer("running_var").fill_(1 - head.bn.eps)
    return made.eval()


if __name__ == "__main__":
    main()
