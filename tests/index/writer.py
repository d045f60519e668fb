"""A process that writes into an index, without a model: ``writer.py INDEX FIRST``."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa

from copynce.index.table import PictureTable

CARD = {"sha256": "0", "file": "none", "dim": 16, "way": 1, "config": {}}


def some(names: list[str], seed: int) -> pa.Table:
    """Rows with random descriptors."""
    drawn = np.random.default_rng(seed).normal(size=(len(names), 16))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    same = {"size": 1, "mtime_ns": 1, "width": 1, "height": 1, "taken": None, "model": "0", "sha256": "0"}
    columns = {name: [value] * len(names) for name, value in same.items()}
    values = pa.FixedSizeListArray.from_arrays(pa.array(drawn.astype(np.float32).ravel()), 16)
    table = pa.table({**columns, "id": names, "path": names, "descriptor": values})
    return table.select(["id", "path", "sha256", "size", "mtime_ns", "width", "height", "taken", "descriptor", "model"])


if __name__ == "__main__":
    sys.stdin.read()  # until all are ready
    table = PictureTable.create(sys.argv[1], CARD, "float32")
    for block in range(8):
        names = [str(int(sys.argv[2]) + 10 * block + i) for i in range(20)]
        with table.working():
            table.put(some(names, seed=block))
    table.compact()
