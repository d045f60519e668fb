"""Descriptors of a list of pictures, as a NumPy array and its ids.

    python examples/embed_list.py CHECKPOINT PICTURES --out descriptors

CHECKPOINT is a model file of a run (`runs/NAME/checkpoints/.../model.safetensors`) or a released one (`.pth.tar`);
PICTURES a folder, a CSV `uuid,path`, or tar shards. Leaves descriptors.npy, float32 [N, D] of length 1, so that a
product of two rows is their similarity, and descriptors.ids.json, the N ids in the same order. Pictures that cannot be
read are named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from copynce.data import Quarantine, read_manifest
from copynce.errors import UserError
from copynce.files import atomic_text
from copynce.models import load_descriptor
from copynce.retrieval.extract import extract


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("pictures", help="folder, CSV or shards")
    parser.add_argument("--out", default="descriptors", help="name of the files, without suffix")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    try:
        broken = Quarantine()
        features = extract(
            load_descriptor(given.checkpoint),
            read_manifest(given.pictures),
            batch_size=given.batch_size,
            device=given.device,
            quarantine=broken,
        )
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    temporary = Path(f"{given.out}.part.npy")  # under its own name only once it is whole
    np.save(temporary, features.values)
    os.replace(temporary, f"{given.out}.npy")
    with atomic_text(f"{given.out}.ids.json") as file:
        json.dump(features.uuids, file)
    print(f"{given.out}.npy: {features.values.shape[0]} descriptors of {features.values.shape[1]} numbers")
    if len(broken):
        print(f"left out: {broken.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
