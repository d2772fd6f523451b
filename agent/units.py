"""Numbers as a person reads them."""

from __future__ import annotations


def human_bytes(nbytes: int) -> str:
    """Bytes in the unit that reads best, in powers of 1024."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.{0 if nbytes >= 100 * size else 1}f} {unit}"
    return f"{nbytes} B"
