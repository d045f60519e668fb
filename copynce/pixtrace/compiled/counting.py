"""Patch counts of a table: how many pixels of a view's patch come from each patch of the grid."""

from __future__ import annotations

import numpy as np

from copynce.compiled_cache import njit
from copynce.pixtrace.compiled.maps import OPTIONS


@njit("void(int32[:, ::1], int64[:, ::1], int64, uint16[::1], uint16[:, ::1])", **OPTIONS)
def count_overlap(index, bounds, patch, numbers, counts):  # type: ignore[no-untyped-def]
    """counts[p, q] = number of pixels of view patch p whose source lies in grid patch q (``numbers`` says which).

    Rows of a patch that lie outside of ``bounds`` (see :func:`bounds_of`) are passed over. The length of a run of equal
    sources is kept in a register: memory would make every increment wait for the last.
    """
    height, width = index.shape
    cells = counts.shape[1]
    found = np.empty(cells + 1, np.uint16)
    flat = index.reshape(-1)
    p = 0
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            found[:] = 0
            current = np.uint16(0)
            length = np.uint16(0)
            for i in range(top, top + patch):
                if bounds[i, 0] >= left + patch or bounds[i, 1] <= left:
                    continue
                start = np.uint64(i * width + left)
                for j in range(patch):
                    number = numbers[np.uint32(flat[start + np.uint64(j)] + np.int32(1))]
                    if number == current:
                        length += np.uint16(1)
                    else:
                        found[current] += length
                        current = number
                        length = np.uint16(1)
            found[current] += length
            out = counts[p]
            for q in range(cells):
                out[q] = found[q + 1]
            p += 1
