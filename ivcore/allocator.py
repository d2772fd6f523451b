"""The C library's allocator, told to give large freed blocks back to the system."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h
RETURN_BLOCKS_FROM = 2**20


def return_freed_blocks() -> None:
    """Make glibc return freed blocks of 1 MiB and more at once; for a model on the CPU, and without effect elsewhere.

    Left alone, glibc raises that limit to 32 MiB as it goes, and its heap keeps the holes that activations of many
    sizes leave: resident memory then grows with the number of frames that have been encoded. Holds for the process.
    """
    if sys.platform == "linux":
        # Another C library, such as musl, has no mallopt and needs none.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, RETURN_BLOCKS_FROM)
