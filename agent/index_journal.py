"""The journal of one video's indexing: every result that took the model's time, a JSON line each, until all are stored.

- A line is flushed when it is made, so a kill loses at most the one that was being made; half a line is cut off.
- The file is locked while it is open: one process at a time works on a video, and the lock goes with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self


class JournalBusyError(Exception):
    """Another process is working on this video."""


class IndexJournal:
    """Results by name, kept in a file; a context manager, for what is done under the file's lock.

    wait: until another process has let go of the file; else JournalBusyError says that one holds it.
    Raises OSError where the file cannot be written.
    """

    def __init__(self, file: Path, *, wait: bool = True) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = _locked(file, wait)
        self._held = _read(self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._held:
            self.remove()
        self._stream.close()

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of that name: the one that is kept, or what `make` gives (JSON), which is kept from now on."""
        if name not in self._held:
            self._held[name] = make()
            self._stream.write(json.dumps([name, self._held[name]], ensure_ascii=False).encode() + b"\n")
            self._stream.flush()
        return self._held[name]

    def remove(self) -> None:
        """Remove the file: everything in it is stored elsewhere."""
        self.file.unlink(missing_ok=True)


def _locked(file: Path, wait: bool) -> IO[bytes]:
    while True:
        stream = file.open("a+b")
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise JournalBusyError(str(file)) from None
            except OSError:  # a file system without locks: the library's commits keep processes apart
                return stream
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                    return stream
        except BaseException:
            stream.close()
            raise
        stream.close()  # The one that held it has finished and removed it: lock the next one.


def _read(stream: IO[bytes]) -> dict[str, Any]:
    """The results in a journal, whose file is cut off behind the last whole line."""
    held: dict[str, Any] = {}
    stream.seek(0)
    whole = 0
    for line in stream:
        try:
            name, result = json.loads(line if line.endswith(b"\n") else b"")
        except (ValueError, TypeError):
            break
        held[name] = result
        whole += len(line)
    stream.truncate(whole)
    return held
