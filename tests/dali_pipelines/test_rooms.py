"""Memory that batches share one after the other."""

from __future__ import annotations

import numpy as np

from dali_pipelines.rooms import Room


def test_a_room_serves_batch_after_batch_without_overlap() -> None:
    room = Room()
    shapes = [((3, 5, 7), np.uint8), ((4, 4, 3), np.float32), ((0, 0, 3), np.uint8), ((2, 9), np.uint8)]
    blocks = []
    for batch in range(3):  # the first finds no block, the others one that is large enough
        room.clear()
        arrays = [room.empty(shape, kind) for shape, kind in shapes]
        for k, array in enumerate(arrays):
            array[:] = 10 * batch + k
        for k, (array, (shape, kind)) in enumerate(zip(arrays, shapes, strict=True)):
            assert array.shape == shape
            assert array.dtype == kind
            assert array.flags.c_contiguous
            assert (array == 10 * batch + k).all()
        blocks.append([array.base for array in arrays])
    assert blocks[0] == [None] * len(shapes)
    assert all(base is blocks[1][0] for batch in blocks[1:] for base in batch)
    beyond = room.empty((10_000,), np.uint8)
    assert beyond.base is None
