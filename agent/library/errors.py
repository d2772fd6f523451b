"""LibraryError, and LanceDB's own errors turned into one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ivcore.errors import IvError

_RUST_SOURCE = re.compile(r",? ?\S*\.rs:\d+(:\d+)?")
# Their modules cannot be imported. The second is no Exception, and neither says more than that there was a panic.
_PANICS = ("RustPanic", "PanicException")


REBUILD = "run iv3 library verify --rebuild on it, which begins a new one and keeps the old one"


class LibraryError(IvError):
    """A library that cannot be opened, read or written, or a request that it cannot carry out."""


class LibraryFailureError(LibraryError):
    """What LanceDB, Arrow or the operating system could not do, perhaps because the library is damaged."""


@contextmanager
def speaking_of(location: str) -> Iterator[None]:
    """What LanceDB, Arrow and the operating system raise, as a LibraryFailureError about the library at `location`."""
    try:
        yield
    except BaseException as error:
        panicked = type(error).__name__ in _PANICS
        if not panicked and not isinstance(error, (RuntimeError, ValueError, OSError)):
            raise
        said = "LanceDB stopped over what it read" if panicked else _RUST_SOURCE.sub("", str(error))
        lines = said.strip().splitlines() or [type(error).__name__]
        reason = "".join(c if c.isprintable() else " " for c in lines[0])[:200].rstrip(" .,")
        raise LibraryFailureError(
            f"The library at {location} cannot be used ({reason}); check the place and its permissions, or, where it "
            f"is damaged, {REBUILD}."
        ) from None
