"""The trace of a run: JSON lines, one an entry, each in the file before it is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from agent.entries import Entry, Instruction, Resumed, Run, read_entry
from agent.resume import resumable
from ivcore.errors import IvError


class TraceError(IvError):
    """A trace that cannot be read or written; the message is for the user."""


class Trace:
    """A trace being written; use as a context manager."""

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        """A new file, which must not be there yet, or with resume one to go on with, from its last whole line.

        A new one to which nothing is appended is gone when the context is left.
        """
        self.path = Path(path)
        self._empty = not resume
        try:
            if resume:
                _cut_off_half_a_line(self.path)
            self._file = self.path.open("ab" if resume else "xb")
        except FileExistsError:
            raise TraceError(f"{path} is there already; name another file, or go on with it by --resume.") from None
        except OSError as error:
            raise TraceError(f"{path} cannot be written ({error.strerror}); choose another file.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what could not be written has been said by `append`
            self._file.close()
            if self._empty:
                self.path.unlink()

    def append(self, entry: Entry) -> None:
        """Write an entry; once this returns, a kill of this process does not lose it."""
        try:
            self._file.write(entry.model_dump_json().encode("utf-8", "replace") + b"\n")
            self._file.flush()
            self._empty = False
        except OSError as error:
            raise TraceError(f"{self.path} cannot be written ({error.strerror}); the run stops here.") from None


def read_trace(path: str | Path) -> list[Entry]:
    """The entries of a trace that stand, a Run first; a last line that was cut off is left out.

    Raises TraceError where the file cannot be read, is empty or is no trace.
    """
    entries: list[Entry] = []
    for number, entry in enumerate(_lines(Path(path)), 1):
        if isinstance(entry, Resumed):
            if not 0 <= entry.dropped < len(entries):
                raise TraceError(f"{path}, line {number}: {entry.dropped} entries before it cannot be void.")
            del entries[len(entries) - entry.dropped :]
        entries.append(entry)
    if not entries:
        raise TraceError(f"{path} is empty, because its run was stopped before its first line; delete it, start anew.")
    if not isinstance(entries[0], Run):
        raise TraceError(f"{path} is no trace of a run: its first line is none.")
    return entries


def resumed(entries: Sequence[Entry]) -> tuple[list[Entry], Resumed]:
    """The entries of a trace that a run goes on from, and the line that says so.

    entries: without the Run. Nothing is kept where the question had not been asked yet.
    """
    kept, _ = resumable(entries)
    if not any(isinstance(entry, Instruction) and entry.role == "user" for entry in kept):
        kept = []
    mark = Resumed(dropped=len(entries) - len(kept), turn=kept[-1].turn if kept else 0)
    return kept, mark.model_copy(update={"seconds": entries[-1].seconds, "cost": entries[-1].cost} if entries else {})


def _lines(path: Path) -> Iterator[Entry]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TraceError(f"{path} cannot be read ({error.strerror}); name the trace of a run.") from None
    for number, line in enumerate(lines[:-1], 1):
        try:
            yield read_entry(line)
        except ValidationError:
            raise TraceError(f"{path}, line {number}: that is no entry of a trace that this version knows.") from None


def _cut_off_half_a_line(path: Path) -> None:
    with path.open("r+b") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.flush()
        os.fsync(file.fileno())
