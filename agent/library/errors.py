"""LibraryError, and LanceDB's own errors turned into one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ivcore.errors import IvError

_RUST_SOURCE = re.compile(r",? ?\S*\.rs:\d+(:\d+)?")


class LibraryError(IvError):
    """A library that cannot be opened, read or written, or a request that it cannot carry out."""


@contextmanager
def speaking_of(location: str) -> Iterator[None]:
    """What LanceDB, Arrow and the operating system raise, as one sentence about the library at `location`."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        lines = _RUST_SOURCE.sub("", str(error)).strip().splitlines() or [type(error).__name__]
        reason = "".join(c if c.isprintable() else " " for c in lines[0])[:200].rstrip(" .,")
        raise LibraryError(
            f"The library at {location} cannot be used ({reason}); check the place and its permissions, or, where it "
            "is damaged, begin a new one with --rebuild, which keeps the old one."
        ) from None
