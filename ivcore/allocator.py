"""A process's memory: its peak, and the C library's allocator, told to give freed blocks back or to keep them."""

from __future__ import annotations

import ctypes
import resource
import sys

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h
RETURN_BLOCKS_FROM = 2**20
_KEEP_BLOCKS_BELOW, _KEEP_FREE = 2**25, 2**31 - 1  # the largest that glibc takes


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB, but on macOS bytes


def return_freed_blocks() -> None:
    """Make glibc return freed blocks of 1 MiB and more at once; for a model on the CPU, and without effect elsewhere.

    Left alone, glibc raises that limit to 32 MiB as it goes, and its heap keeps the holes that activations of many
    sizes leave: resident memory then grows with the number of frames that have been encoded. Holds for the process.
    """
    _mallopt(_M_MMAP_THRESHOLD, RETURN_BLOCKS_FROM)


def keep_freed_blocks() -> None:
    """Make glibc keep freed blocks of up to 32 MiB, and all it has at the end of its heap; takes the former back.

    Every step of training asks for the same blocks again; fresh pages from the system cost more than a small model's
    arithmetic. Holds for the process.
    """
    _mallopt(_M_MMAP_THRESHOLD, _KEEP_BLOCKS_BELOW)
    _mallopt(_M_TRIM_THRESHOLD, _KEEP_FREE)


def _mallopt(option: int, value: int) -> None:
    if sys.platform == "linux":
        # Another C library, such as musl, has no mallopt and needs none.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(option, value)
