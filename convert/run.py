"""`convert`: all or nothing, and to be continued when it was stopped.

Everything is written into `DST.part`, which becomes DST by one renaming when the last byte is on disk. DST is therefore
absent or whole at any moment; what a killed run has finished is in `DST.part`, with a journal.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.plan import Options, Plan, make_plan
from convert.record import RECORD, Journal, Record, check_same, clear, request_of, sha256_of, to_json, write_beside
from convert.source import open_source
from convert.stream import Conversion, Progress
from ivcore.errors import CheckpointError
from ivcore.shards import INDEX, index_of

SPARE_BYTES = 64 * 2**20
"""Room for tokenizer, configs, journal and headers beside the tensors."""


def convert(
    source: str | Path,
    target: str | Path,
    options: Options | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: Progress | None = None,
) -> Record:
    """Write a checkpoint anew: cast, quantised, or with an adapter merged; returns what conversion.json says.

    source: a folder or a Hugging Face id (`@revision`). resume: go on with what an earlier run has finished; force:
    replace a checkpoint at `target`, and without `resume` forget an unfinished one. on_progress(done, total) counts the
    source's bytes. Raises ConfigError or CheckpointError, before anything is written where the cause can be known then.
    """
    plan = make_plan(open_source(source), options or Options())
    request = request_of(plan)
    place = Place(Path(target))
    place.check_apart_from(plan)
    if done := place.check(request, resume, force):
        return done
    place.check_room(plan)
    if on_plan:
        on_plan(plan)
    if resume and place.part_is_whole(request):
        return place.install()
    with place.journal(plan, request, fresh=not resume) as journal:
        try:
            _finish_shards(plan, place.part, journal, on_progress)
            _write_others(plan, place.part, journal, request)
        except OSError as error:
            kept = place.keep_finished(journal)
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            advice = f"go on with --resume from the shards in {place.part}" if kept else "nothing was kept"
            raise CheckpointError(f"{place.folder} cannot be written ({reason}); free some room: {advice}.") from None
        except CheckpointError:
            place.forget(journal)
            raise
        except BaseException:
            place.keep_finished(journal)
            raise
    return place.install()


class Place:
    """The folder that a conversion ends in, and the one beside it that it is written to."""

    def __init__(self, target: Path) -> None:
        self.folder = target.expanduser().resolve()
        self.part = self.folder.with_name(f"{self.folder.name}.part")
        self.replaced = self.folder.with_name(f"{self.folder.name}.replaced")

    def check_apart_from(self, plan: Plan) -> None:
        """Neither may hold the other: the one would be in the copy, or be replaced by it."""
        read = [plan.source.path, *([plan.options.adapter] if plan.options.adapter else [])]
        for path in (path.expanduser().resolve() for path in read):
            if self.folder == path:
                raise CheckpointError(f"{self.folder} is what is read; write to another folder.")
            if self.folder.is_relative_to(path):
                raise CheckpointError(f"{self.folder} lies inside {path}, which is read; write to another place.")
            if path.is_relative_to(self.folder) or path.is_relative_to(self.part):
                raise CheckpointError(f"{self.folder} holds {path}, which is read; write to another folder.")

    def check(self, request: dict[str, Any], resume: bool, force: bool) -> Record | None:
        """CheckpointError where something is in the way; the record of a target that is whole already."""
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is a file; name a folder to write to.")
        if self.folder.exists() and any(self.folder.iterdir()):
            if not force:
                if resume and not self.part.exists() and (self.folder / RECORD).exists():
                    record = Record.read(self.folder)
                    check_same(record.request, request, self.folder)
                    return record
                raise CheckpointError(f"{self.folder} exists already; use --force to replace it, or another name.")
            _refuse_other_folder(self.folder)
            if self.replaced.exists():
                raise CheckpointError(f"{self.replaced} is in the way of replacing {self.folder}; move it elsewhere.")
        if self.part.exists():
            if not _of_a_conversion(self.part):
                raise CheckpointError(f"{self.part} is in the way, and not of a conversion; move it elsewhere.")
            if not resume and not force:
                raise CheckpointError(
                    f"{self.part} is left of a conversion that was stopped; go on with --resume, or start anew with "
                    "--force."
                )
        return None

    def check_room(self, plan: Plan) -> None:
        parent = next(path for path in self.part.parents if path.exists())
        held = sum(file.stat().st_size for file in self.part.glob("*.safetensors"))
        need, free = plan.nbytes + SPARE_BYTES - held, shutil.disk_usage(parent).free
        if need > free:
            raise CheckpointError(
                f"{parent} has {free / 1e9:.2f} GB of room, but {need / 1e9:.2f} GB are to be written; free some, or "
                "write to another disk."
            )

    def part_is_whole(self, request: dict[str, Any]) -> bool:
        """Whether an earlier run was killed just before its last step, the renaming."""
        if (self.part / Journal.NAME).exists() or not (self.part / RECORD).exists():
            return False
        check_same(Record.read(self.part).request, request, self.part)
        return True

    def journal(self, plan: Plan, request: dict[str, Any], *, fresh: bool) -> Journal:
        stamps = {file.name: file.stat().st_mtime_ns for file in plan.source.shards}
        try:
            self.part.mkdir(parents=True, exist_ok=True)
            return Journal(self.part, request, stamps, fresh=fresh)
        except OSError as error:
            raise CheckpointError(f"{self.part} cannot be written ({error.strerror}); check the path.") from None

    def forget(self, journal: Journal) -> None:
        """Leave nothing of what was begun."""
        clear(self.part)
        journal.remove()
        self.part.rmdir()

    def keep_finished(self, journal: Journal) -> bool:
        """Keep what a later run can use; nothing where no shard was finished."""
        if not journal.shards:
            self.forget(journal)
        return bool(journal.shards)

    def install(self) -> Record:
        """The renaming: from here on the target is the new checkpoint."""
        record = Record.read(self.part)
        if self.folder.exists() and any(self.folder.iterdir()):
            os.rename(self.folder, self.replaced)
        os.rename(self.part, self.folder)
        _sync(self.folder.parent)
        if self.replaced.exists():
            _refuse_other_folder(self.replaced)
            shutil.rmtree(self.replaced)
        return record


def _of_a_conversion(part: Path) -> bool:
    names = [file.name for file in part.iterdir()] if part.is_dir() else [""]
    return not names or Journal.NAME in names or RECORD in names


def _refuse_other_folder(folder: Path) -> None:
    """CheckpointError for what --force must not remove: a folder that is not just a checkpoint."""
    entries = list(folder.iterdir())
    if not (folder / "config.json").exists() or any(entry.is_dir() and not entry.is_symlink() for entry in entries):
        raise CheckpointError(
            f"{folder} is not only a checkpoint (it has no config.json, or it has subfolders), so it is not replaced; "
            "use another name."
        )


def _finish_shards(plan: Plan, part: Path, journal: Journal, on_progress: Progress | None) -> None:
    for name, shard in list(journal.shards.items()):
        file = part / name
        if not file.exists() or file.stat().st_size != shard.nbytes or sha256_of(file) != shard.sha256:
            del journal.shards[name]
    Conversion(plan, part, journal).run(on_progress)


def _write_others(plan: Plan, part: Path, journal: Journal, request: dict[str, Any]) -> None:
    """Everything but the shards, conversion.json last; then the journal is not needed any more."""
    files = {"config.json": write_beside(part / "config.json", to_json(plan.config))}
    if len(plan.shards) > 1:
        index = index_of({name: plan.specs(name) for name in plan.shards})
        files[INDEX] = write_beside(part / INDEX, to_json(index))
    for file in plan.source.side_files:
        files[file.name] = write_beside(part / file.name, file.read_bytes())
    record = Record(request, journal.sources, journal.shards, files)
    write_beside(part / RECORD, to_json(record.to_dict()))
    _sync(part)
    journal.remove()
    _sync(part)


def _sync(folder: Path) -> None:
    """Make a folder's list of names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
