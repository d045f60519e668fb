"""A descriptor's head solved for, in place of the trained one: what its class tokens tell of copies, whitened.

    python -m scripts.refit_head runs/descriptor --pictures LIST.csv --out refit.safetensors

Of `--pairs` training pictures and an edited version of each (the descriptor's training edits), with class tokens x and
their width C, the head becomes the linear map

    M = (S + W_1 mean(diag S) I)^(-1/2)     S: covariance of edited - original: what edits change counts less
    P: PCA whitening of (x - m) M           of the originals; each variance v as v + W_2 mean(v)
    descriptor = (x - m) M P, of length 1   [C]

and all else of the model stays. It has as many numbers as the class token.
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
from copynce.models.backbone import class_token_of
from copynce.models.checkpoints import read_checkpoint_metadata
from copynce.models.descriptor import Descriptor
from copynce.pixtrace import EditProgram, sample_program
from copynce.training import find_model
from dali_pipelines import LoaderOptions, Pair, PairLoader
from dali_pipelines.sources import AnyPath

WITHIN, SPREAD = 0.3, 1.0
"""W_1 and W_2."""

_BATCH = 40

Tokens = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("descriptor", help="a run or a weights file")
    parser.add_argument("--pictures", required=True, help="training pictures, a CSV or a folder")
    parser.add_argument("--pairs", type=int, default=2000, help="of which so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of which, and of their edits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="weights file, .safetensors")
    options = parser.parse_args()
    file = find_model(options.descriptor)
    model = load_descriptor(file)
    manifest = read_manifest(options.pictures)
    chosen = np.random.default_rng(options.seed).permutation(len(manifest))[: options.pairs]
    original, edited = class_tokens(model, [manifest.paths[place] for place in chosen], options.seed, options.threads)
    card = {**read_checkpoint_metadata(file), "head": f"solved for, by scripts.refit_head, of {len(original)} pairs"}
    save_checkpoint(options.out, with_head(model, *solved(original, edited)), card)
    print(f"{options.out}: the head of {len(original)} pairs, {original.shape[1]} numbers a picture")


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
            sides = [class_token_of(model.encoder, images) for images in (batch.reference, batch.query)]
        found.append((sides[0].double().numpy(), sides[1].double().numpy()))
        print(f"{sum(len(part) for part, _ in found)} of {len(paths)}", flush=True)
    for line in broken:
        print(f"skipped {line}")
    return np.concatenate([part for part, _ in found]), np.concatenate([part for _, part in found])


def solved(original: Tokens, edited: Tokens) -> tuple[Tokens, Tokens]:
    """(M P [C, C], m [C]) of the module's text, of class tokens [N, C]."""
    mean = original.mean(0)
    values, vectors = np.linalg.eigh(np.cov((edited - original).T))
    within = vectors * (values + WITHIN * values.mean()) ** -0.5 @ vectors.T
    values, vectors = np.linalg.eigh(np.cov(((original - mean) @ within).T))
    return within @ vectors * (values + SPREAD * values.mean()) ** -0.5, mean


def with_head(model: Descriptor, weight: Tokens, mean: Tokens) -> Descriptor:
    """The same encoder, with (x - mean) weight as its head."""
    made = Descriptor(replace(model.config, head="linear_bn", dim=weight.shape[1]))
    made.encoder.load_state_dict(model.encoder.state_dict())
    head = made.heads["linear_head"]
    with torch.no_grad():
        head.fc1.weight.copy_(torch.from_numpy(weight.T))
        head.bn.running_mean.copy_(torch.from_numpy(mean @ weight))
        head.bn.running_var.fill_(1 - head.bn.eps)
    return made.eval()


if __name__ == "__main__":
    main()
