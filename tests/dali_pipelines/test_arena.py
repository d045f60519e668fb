"""Memory that batches share one after the other."""

from __future__ import annotations

import numpy as np

from dali_pipelines.arena import Arena, SharedArena


def test_an_arena_serves_batch_after_batch_without_overlap() -> None:
    arena = Arena()
    shapes = [((3, 5, 7), np.uint8), ((4, 4, 3), np.float32), ((0, 0, 3), np.uint8), ((2, 9), np.uint8)]
    blocks = []
    for batch in range(3):  # the first finds no block, the others one that is large enough
        arena.clear()
        arrays = [arena.empty(shape, kind) for shape, kind in shapes]
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
    beyond = arena.empty((10_000,), np.uint8)
    assert beyond.base is None


def test_a_shared_arena_knows_what_lies_in_it() -> None:
    arena = SharedArena(1000)
    arena.clear()
    first, second = arena.empty((10,), np.uint8), arena.empty((10, 10), np.float32)
    assert (arena.start_of(first), arena.start_of(second)) == (0, 64)
    assert arena.start_of(second.T) is None  # not contiguous
    assert arena.start_of(arena.empty((1000,), np.uint8)) is None  # no place left
    assert arena.start_of(np.zeros(10)) is None
    arena.clear()
    assert arena.size > 1000
