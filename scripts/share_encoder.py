"""A matcher for a descriptor that was trained on: its encoder becomes the descriptor's first blocks.

    python -m scripts.share_encoder runs/matcher runs/descriptor --out start.safetensors
    copynce train box-matcher weights=start.safetensors data.train=LIST.csv data.neighbours=KNN.npy out=runs/matcher-2

Its fusion blocks and head stay; they were trained on the tokens of other weights, and some hundred steps teach them the
new ones; where the descriptor's first blocks stayed as the matcher has them, none are needed. The matcher then takes
pictures of the descriptor's size. One encoding serves both models, and `scripts.make_box` stores the shared blocks
once.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from copynce.errors import ConfigError
from copynce.models import Descriptor, Matcher, load_descriptor, load_matcher, save_checkpoint
from copynce.models.checkpoints import read_checkpoint_metadata
from copynce.training import find_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matcher", help="a run or a weights file")
    parser.add_argument("descriptor", help="a run or a weights file, of the same backbone")
    parser.add_argument("--out", type=Path, required=True, help="weights file, .safetensors")
    options = parser.parse_args()
    files = find_model(options.matcher), find_model(options.descriptor)
    matcher, descriptor = load_matcher(files[0]), load_descriptor(files[1])
    made = sharing(matcher, descriptor)
    card = {**read_checkpoint_metadata(files[0]), "encoder": f"of {files[1].name}"}
    save_checkpoint(options.out, made, card)
    before, now = matcher.encoder.state_dict(), made.encoder.state_dict()
    others = sum(
        before[name].shape != tensor.shape or not torch.equal(before[name], tensor) for name, tensor in now.items()
    )
    print(f"{options.out}: {made.img_size} px, {others} of the encoder's {len(now)} tensors are others than before")


def sharing(matcher: Matcher, descriptor: Descriptor) -> Matcher:
    """`matcher` with the descriptor's encoder, as far as it has one, at the descriptor's size of pictures.

    Raises ConfigError where the two have other blocks.
    """
    made = Matcher(replace(matcher.config, img_size=descriptor.img_size))
    ours, theirs = made.encoder.state_dict(), descriptor.encoder.state_dict()
    differ = [name for name, tensor in ours.items() if name not in theirs or theirs[name].shape != tensor.shape]
    if differ:
        raise ConfigError(
            f"the matcher's encoder does not fit into the descriptor's: {differ[0]} and {len(differ) - 1} more differ; "
            "both must have one backbone"
        )
    shared = {f"encoder.{name}": theirs[name] for name in ours}
    made.load_state_dict({**matcher.state_dict(), **shared})
    return made.eval()


if __name__ == "__main__":
    main()
