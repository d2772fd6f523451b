"""Where a library is: a folder, or an address that LanceDB opens (s3://, gs://, az://, ...).

Two processes may write at once. In an object store LanceDB's commits alone keep them apart: every table has a primary
key, so of two commits that touch the same key the later one is done again. In a folder a lock lets one process write
at a time, which spares that work, and keeps writers out while the folder is set aside.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from agent.library.errors import LibraryError, speaking_of

TABLE_ENDING = ".lance"
SETTING_ASIDE = 1.0
"""Seconds that a folder may be gone for while it is set aside, which is far longer than it takes."""


class Place:
    """A library's address, checked; `folder` is None for an object store."""

    def __init__(self, location: str | Path) -> None:
        self.name = str(location)
        scheme = urlsplit(self.name).scheme if "://" in self.name else ""
        if scheme == "db":
            raise LibraryError(f"{self.name} is a database of LanceDB's cloud; name a folder or an object store.")
        if not self.name.strip():
            raise LibraryError("The library has no name; name a folder or an object store.")
        self.folder: Path | None = None
        with speaking_of(self.name):
            if scheme in ("", "file"):
                path = unquote(urlsplit(self.name).path) if scheme else self.name
                self.folder = Path(path).expanduser().resolve()
        self.uri = str(self.folder) if self.folder else self.name

    def make(self) -> None:
        """Make the folder of a new library; LibraryError where it holds something else."""
        if self.folder is None:
            return
        with speaking_of(self.name):
            if self.folder.exists() and not self.folder.is_dir():
                raise LibraryError(f"{self.name} is a file; name a folder for the library.")
            self.folder.mkdir(parents=True, exist_ok=True)
            names = self._visible()
        if names and not any(name.endswith(TABLE_ENDING) for name in names):
            raise LibraryError(f"{self.name} holds other files ({names[0]}); name an empty folder for the library.")

    def check_exists(self) -> None:
        """LibraryError where there is no folder; whether an object store has anything is seen when it is read."""
        if self.folder is not None and not self.folder.is_dir():
            what = "a file, not a library" if self.folder.exists() else "no library yet"
            raise LibraryError(f"{self.name} is {what}; index videos into one first.")

    def has_files_of(self, table: str) -> bool:
        """Whether a folder holds rows or indices of a table, which LanceDB writes before its first version counts."""
        if self.folder is None:
            return False
        parts = (self.folder / f"{table}{TABLE_ENDING}" / part for part in ("data", "_indices"))
        return any(part.is_dir() and any(part.iterdir()) for part in parts)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait until no other process writes to the folder, and keep others out; nothing for an object store."""
        descriptor = self._lock()
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def set_aside(self) -> Path:
        """Rename the folder, make an empty one in its place, and return the old one's new name.

        A kill in between leaves no folder, which the next one to open the library makes.
        """
        if self.folder is None:
            raise LibraryError(f"{self.name} cannot be renamed; give the new library another address.")
        self.check_exists()
        with speaking_of(self.name), self.writing():
            others = [name for name in self._visible() if not name.endswith(TABLE_ENDING)]
            if others:
                raise LibraryError(f"{self.name} is not just a library (it holds {others[0]}), so it is left as it is.")
            kept = self.folder.with_name(f"{self.folder.name}.old-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
            while kept.exists():
                kept = kept.with_name(f"{kept.name}-again")
            os.rename(self.folder, kept)
            self.folder.mkdir()
        return kept

    def _visible(self) -> list[str]:
        assert self.folder is not None
        return sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))

    def _opened(self) -> int:
        assert self.folder is not None
        last = time.monotonic() + SETTING_ASIDE
        while True:
            try:
                return os.open(self.folder, os.O_RDONLY)
            except OSError as error:
                # Another process may just be between renaming the folder and making the new one.
                if not isinstance(error, FileNotFoundError) or time.monotonic() > last:
                    raise LibraryError(f"{self.name} cannot be opened ({error.strerror}); was it moved?") from None
                time.sleep(SETTING_ASIDE / 100)

    def _lock(self) -> int | None:
        if self.folder is None:
            return None
        while True:
            descriptor = self._opened()
            try:
                # A file system without locks, as some over a network, leaves it to LanceDB's commits.
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self.folder)):
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # The folder was set aside while this process waited: lock the new one.
