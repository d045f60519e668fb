"""A matcher for a descriptor that was trained on: its encoder becomes the descriptor's first blocks.

    python -m scripts.share_encoder runs/matcher runs/descriptor --out start.safetensors
    copynce train box-matcher weights=start.safetensors data.train=LIST.csv data.neighbours=KNN.npy out=runs/matcher-2

Its fusion blocks and head stay; they were trained on the tokens of other weights, and some hundred steps teach them the
new ones. One encoding then serves both models, and `scripts.make_box` stores the shared blocks once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from copynce.errors import ConfigError
from copynce.models import Descriptor, Matcher, load_descriptor, load_matcher, save_checkpoint
from copynce.models.checkpoints import read_checkpoint_metadata
from copynce.training import find_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matcher", help="a run or a weights file")
    parser.add_argument("descriptor", help="a run or a weights file, of the same backbone and size")
    parser.add_argument("--out", type=Path, required=True, help="weights file, .safetensors")
    options = parser.parse_args()
    files = find_model(options.matcher), find_model(options.descriptor)
    matcher = load_matcher(files[0])
    taken = share(matcher, load_descriptor(files[1]))
    card = {**read_checkpoint_metadata(files[0]), "encoder": f"of {files[1].name}"}
    save_checkpoint(options.out, matcher, card)
    print(f"{options.out}: {taken} tensors of the encoder are those of {files[1]}")


def share(matcher: Matcher, descriptor: Descriptor) -> int:
    """Gives `matcher` the descriptor's encoder, as far as it has one; returns how many tensors that are.

    Raises ConfigError where the two are of different shapes; the matcher is then as it was.
    """
    ours, theirs = matcher.encoder.state_dict(), descriptor.encoder.state_dict()
    differ = [name for name, tensor in ours.items() if name not in theirs or theirs[name].shape != tensor.shape]
    if differ:
        raise ConfigError(
            f"the matcher's encoder does not fit into the descriptor's: {differ[0]} and {len(differ) - 1} more differ; "
            "both must have one backbone and one size of pictures"
        )
    matcher.encoder.load_state_dict({name: theirs[name] for name in ours})
    return len(ours)


if __name__ == "__main__":
    main()
