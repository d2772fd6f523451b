"""Where a conversion ends: the folder DST, the one beside it that is written to, and the step from one to the other.

Notable:
- `DST.part` becomes DST by one renaming, so DST is absent, the old one whole, or the new one whole.
- Who writes holds a lock on the folder `DST.part` itself, which goes with it through the renaming.
- What `--force` replaces is moved to `DST.replaced-HASH` first, the hash being that of the new conversion.json: a later
  run can tell that such a folder is a leftover of this very conversion, and nobody else's.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from convert.record import RECORD, Journal, Record, check_same
from ivcore.errors import CheckpointError
from ivcore.shards import INDEX, SINGLE

SPARE_BYTES = 64 * 2**20
"""Room for tokenizer, configs, journal and headers beside the tensors."""

_OF_A_CHECKPOINT = {".json", ".jinja", ".txt", ".md", ".safetensors", ".model", ".py", ""}
"""Endings of the files that --force may remove with a checkpoint."""


class Place:
    """The target of a conversion; every method raises CheckpointError with one sentence for what is in the way."""

    def __init__(self, target: str | Path) -> None:
        try:
            self.folder = Path(target).expanduser().resolve()
            self.part = self.folder.with_name(f"{self.folder.name}.part")
            with suppress(FileNotFoundError):
                self.part.stat()
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{target} cannot be written to ({reason}); name another folder.") from None
        if not str(target):
            raise CheckpointError("The folder to write to has no name; name one.")
        if os.path.ismount(self.folder):
            raise CheckpointError(f"{self.folder} is a mount point, which cannot be replaced; name a folder inside it.")
        self._made: list[Path] = []

    def check_apart_from(self, read: Iterable[Path]) -> None:
        """Neither may hold what is read nor lie in it: the one would be in the copy, or be replaced by it."""
        for path in (path.expanduser().resolve() for path in read):
            if self.folder == path:
                raise CheckpointError(f"{self.folder} is what is read; write to another folder.")
            if self.folder.is_relative_to(path):
                raise CheckpointError(f"{self.folder} lies inside {path}, which is read; write to another place.")
            if path.is_relative_to(self.folder) or path.is_relative_to(self.part):
                raise CheckpointError(f"{self.folder} holds {path}, which is read; write to another folder.")

    def check(self, request: Mapping[str, Any], resume: bool, force: bool) -> Record | None:
        """What is in the way; the record of a target that is whole already, which `resume` accepts."""
        if resume and not force and not self.part.exists() and (self.folder / RECORD).exists():
            record = Record.read(self.folder)
            check_same(record.request, request, self.folder)
            _remove_leftover(self._replaced(self.folder))
            return record
        self._check_folder(force)
        if self.part.exists():
            if not _of_a_conversion(self.part):
                raise CheckpointError(f"{self.part} is in the way, and not of a conversion; move it elsewhere.")
            if not resume and not force:
                raise CheckpointError(
                    f"{self.part} is left of a conversion that was stopped; go on with --resume, or start anew with "
                    "--force."
                )
        return None

    def check_room(self, nbytes: int) -> None:
        """nbytes: of all tensors to be written."""
        parent = next(path for path in self.part.parents if path.exists())
        held = sum(file.stat().st_size for file in self.part.glob("*.safetensors"))
        need, free = nbytes + SPARE_BYTES - held, shutil.disk_usage(parent).free
        if need > free:
            raise CheckpointError(
                f"{parent} has {free / 1e9:.2f} GB of room, but {need / 1e9:.2f} GB are to be written; free some, or "
                "write to another disk."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder to write to, and keep other processes out of it."""
        try:
            for path in reversed([self.part, *self.part.parents]):
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    self._made.insert(0, path)
            descriptor = os.open(self.part, os.O_RDONLY)
        except OSError as error:
            self.leave_nothing()
            raise CheckpointError(f"{self.part} cannot be written ({error.strerror}); check the path.") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                same = os.path.samestat(os.fstat(descriptor), os.stat(self.part))
            except OSError:
                same = False
            if not same:
                raise CheckpointError(f"Another process is writing {self.folder}; wait for it, or name another folder.")
            yield
        finally:
            os.close(descriptor)

    def check_again(self, force: bool) -> None:
        """Whether another process has finished the target before this one held the lock."""
        try:
            self._check_folder(force)
        except CheckpointError:
            if self._made:
                self.leave_nothing()
            raise

    def part_is_whole(self, request: Mapping[str, Any]) -> bool:
        """Whether an earlier run was stopped between its record and the renaming."""
        if (self.part / Journal.NAME).exists() or not (self.part / RECORD).exists():
            return False
        record = Record.read(self.part)
        check_same(record.request, request, self.part)
        sizes = {name: shard.nbytes for name, shard in record.shards.items()}
        present = {file.name: file.stat().st_size for file in self.part.iterdir()}
        return all(present.get(name) == size for name, size in sizes.items()) and record.files.keys() <= present.keys()

    def leave_nothing(self) -> None:
        """Remove what was written, and the folders that were made for it."""
        clear(self.part)
        for path in self._made or [self.part]:
            with suppress(OSError):
                path.rmdir()

    def keep_finished(self, journal: Journal) -> bool:
        """Keep what a later run can use; nothing where no shard was finished."""
        if not journal.shards:
            self.leave_nothing()
        return bool(journal.shards)

    def install(self, force: bool) -> Record:
        """The renaming: from here on the target is the new checkpoint."""
        self._check_folder(force)
        record, replaced = Record.read(self.part), self._replaced(self.part)
        try:
            if self.folder.exists() and any(self.folder.iterdir()):
                _remove_leftover(replaced)
                os.rename(self.folder, replaced)
            os.rename(self.part, self.folder)
            sync(self.folder.parent)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be put in place ({error.strerror}); {self.part} is whole: go on with --resume."
            ) from None
        _remove_leftover(replaced)
        return record

    def _check_folder(self, force: bool) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is a file; name a folder to write to.")
        if self.folder.exists() and any(self.folder.iterdir()):
            if not force:
                raise CheckpointError(f"{self.folder} exists already; use --force to replace it, or another name.")
            _refuse_other_folder(self.folder)

    def _replaced(self, folder: Path) -> Path:
        """Where what is replaced by the conversion in `folder` is moved to."""
        digest = hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()[:12]
        return self.folder.with_name(f"{self.folder.name}.replaced-{digest}")


def clear(folder: Path) -> None:
    """Remove the files of an unfinished conversion, last those that tell what the folder is."""
    files = list(folder.iterdir()) if folder.is_dir() else []
    for file in sorted(files, key=lambda file: file.name in (Journal.NAME, RECORD)):
        file.unlink()


def sync(folder: Path) -> None:
    """Make a folder's list of names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_of(error: OSError) -> str:
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def _remove_leftover(replaced: Path) -> None:
    if replaced.is_dir():
        shutil.rmtree(replaced)


def _of_a_conversion(part: Path) -> bool:
    names = [file.name for file in part.iterdir()] if part.is_dir() else [""]
    if not names or Journal.is_one(part / Journal.NAME):
        return True
    with suppress(CheckpointError):
        return RECORD in names and bool(Record.read(part))
    return False


def _refuse_other_folder(folder: Path) -> None:
    """What --force must not remove: a folder that is not just a checkpoint."""
    entries = list(folder.iterdir())
    names = {entry.name for entry in entries}
    others = [e.name for e in entries if (e.is_dir() and not e.is_symlink()) or e.suffix not in _OF_A_CHECKPOINT]
    if others or "config.json" not in names or not names & {RECORD, INDEX, SINGLE}:
        what = f"it holds {others[0]}" if others else "it has no config.json, or no weights"
        raise CheckpointError(f"{folder} is not just a checkpoint ({what}), so it is not replaced; use another name.")
