"""The C heap of a process that runs a model on the CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_heap() -> None:
    """Let glibc keep freed memory instead of handing it back to the system; does nothing elsewhere.

    A CPU training step frees and takes the same gigabytes again and again. By default glibc unmaps large blocks at
    once, so every step faults all its pages in anew: 276,062 faults and 12 % of the processor's time in two steps of
    ViT-S/14 at 112 px, 28,012 faults and 1 % with this.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
