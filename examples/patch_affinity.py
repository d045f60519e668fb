"""Where in one picture a patch of another is found: the affinity of one patch, drawn.

    python examples/patch_affinity.py CHECKPOINT QUERY REFERENCE --row 7 --column 4 --out affinity.png

CHECKPOINT as in embed_list.py. Both pictures are resized to the model's square; row and column count its patches (at
224 px with patches of 16: 0 to 13). The affinity is softmax over the reference's patches of cosine / temperature, the
quantity that CopyNCE trains. Prints the patch that gets most of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from copynce.errors import UserError
from copynce.inspect import affinity, draw_affinity
from copynce.models import load_descriptor
from copynce.pixtrace import EditProgram
from dali_pipelines import LoaderOptions, PictureLoader, render_programs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("query", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--row", type=int, required=True, help="of the probed patch, from the top")
    parser.add_argument("--column", type=int, required=True, help="from the left")
    parser.add_argument("--temperature", type=float, default=1 / 16)
    parser.add_argument("--out", type=Path, default=Path("affinity.png"))
    given = parser.parse_args(arguments)
    paths = [given.query, given.reference]
    try:
        model = load_descriptor(given.checkpoint)
        broken: dict[str, str] = {}
        options = LoaderOptions(size=model.img_size, batch_size=2)
        loader = PictureLoader(paths, options, on_broken=lambda path, reason: broken.update({str(path): reason}))
        batches = list(loader)
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if broken:
        print("error: " + "; ".join(f"{path}: {reason}" for path, reason in broken.items()), file=sys.stderr)
        return 2
    with torch.inference_mode():
        _, tokens = model(batches[0][1])
    grid = round(tokens.shape[1] ** 0.5)
    if not (0 <= given.row < grid and 0 <= given.column < grid):
        print(f"error: row and column must lie in 0 to {grid - 1}, got {given.row} and {given.column}", file=sys.stderr)
        return 2
    patch = given.row * grid + given.column
    row = affinity(tokens[0], tokens[1], given.temperature)[patch].numpy()
    pixels = render_programs(paths, [EditProgram(())] * 2, size=model.img_size)
    draw_affinity(*pixels, patch, {"affinity": row}, np.zeros(grid * grid), grid=grid).save(given.out)
    best = int(row.argmax())
    print(f"row {best // grid}, column {best % grid} of the reference gets {row[best]:.1%}; drawn in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
