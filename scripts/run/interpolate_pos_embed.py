"""Resize a matcher's position embedding for pictures of another size, bicubically (PROTOCOLS 9.5).

`copynce train model.img_size=336 weights=FILE` does it on loading, so this step may be left out.
"""

from __future__ import annotations

import argparse
import sys

from copynce.cli import main


def _command() -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-path", default="weights/dino_vits16_enc-8_fus-4.pth", help="default: %(default)s")
    parser.add_argument(
        "--output-path", default="weights/dino_vits16_enc-8_fus-4_pos-emb-21x21.pth.tar", help="default: %(default)s"
    )
    parser.add_argument("--img-size", type=int, default=336, help="side of the pictures (default: %(default)s)")
    given = parser.parse_args()
    return ["convert", given.weights_path, given.output_path, "--as", "matcher", f"img_size={given.img_size}"]


if __name__ == "__main__":
    sys.exit(main(_command()))
