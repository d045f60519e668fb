"""Divide a backbone's blocks into encoder and fusion, as a start for a descriptor or a matcher (PROTOCOLS 9.5).

`copynce train weights=FILE` takes a backbone as it is, so this step may be left out.
"""

from __future__ import annotations

import argparse
import sys

from copynce.cli import main


def _command() -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="blocks of the backbone (default: %(default)s)")
    parser.add_argument(
        "--encoder-layers", type=int, default=8, help="those of the encoder; all of them: a descriptor's start"
    )
    parser.add_argument("--weights-path", required=True, help="weights of the backbone")
    parser.add_argument("--output-path", required=True, help="what is written")
    given = parser.parse_args()
    rest = given.layers - given.encoder_layers
    if rest < 0:
        parser.error(f"--encoder-layers must be at most --layers {given.layers}, got {given.encoder_layers}")
    kind = ["descriptor", f"backbone_options.depth={given.layers}"]
    if rest:
        kind = ["matcher", f"encoder_blocks={given.encoder_layers}", f"fusion_blocks={rest}"]
    return ["convert", given.weights_path, given.output_path, "--as", *kind]


if __name__ == "__main__":
    sys.exit(main(_command()))
