"""`convert`: all or nothing, and to be continued when it was stopped.

The plan is made and everything checked before the first byte is written; what a killed run has finished is in
`DST.part`, with a journal, and `place` takes the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.place import Place, clear, reason_of, sync
from convert.plan import Options, Plan, make_plan
from convert.record import RECORD, Journal, Record, request_of, to_json, write_hashed
from convert.source import Source, open_source
from convert.stream import Conversion, Progress
from ivcore.errors import CheckpointError
from ivcore.shards import INDEX, index_of


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
    place = Place(target)
    plan = make_plan(open_source(source), options or Options())
    request = request_of(plan)
    place.check_apart_from([plan.source.path, *([plan.adapter.path] if plan.adapter else [])])
    if done := place.check(request, resume, force):
        return done
    place.check_room(plan.nbytes)
    if on_plan:
        on_plan(plan)
    with place.locked():
        place.check_again(force)
        if not (resume and place.part_is_whole(request)):
            _write(plan, place, request, resume, on_progress)
        return place.install(force)


def _write(plan: Plan, place: Place, request: dict[str, Any], resume: bool, on_progress: Progress | None) -> None:
    """Everything into the folder beside the target."""
    journal = Journal(place.part)
    try:
        if not resume or not journal.exists():
            clear(place.part)
        journal.begin(request, {file.name: plan.source.stats[file].st_mtime_ns for file in plan.source.shards})
    except OSError as error:
        place.leave_nothing()
        raise CheckpointError(f"{place.part} cannot be written ({reason_of(error)}); nothing was kept.") from None
    try:
        _finish_shards(plan, place.part, journal, on_progress)
        _write_others(plan, place.part, journal, request)
    except OSError as error:
        kept = place.keep_finished(journal)
        advice = f"once that is mended, go on with --resume from the shards in {place.part}" if kept else (
            "nothing was kept"
        )  # fmt: skip
        raise CheckpointError(f"{place.folder} cannot be written ({reason_of(error)}); {advice}.") from None
    except CheckpointError:
        place.leave_nothing()
        raise
    except BaseException:
        place.keep_finished(journal)
        raise


def _finish_shards(plan: Plan, part: Path, journal: Journal, on_progress: Progress | None) -> None:
    journal.forget_damaged()
    Conversion(plan, part, journal).run(on_progress)


def _write_others(plan: Plan, part: Path, journal: Journal, request: dict[str, Any]) -> None:
    """Everything but the shards, conversion.json last; then the journal is not needed any more."""
    files = {"config.json": write_hashed(part / "config.json", to_json(plan.config))}
    if len(plan.shards) > 1:
        index = index_of({name: plan.specs(name) for name in plan.shards})
        files[INDEX] = write_hashed(part / INDEX, to_json(index))
    files |= copy_side_files(plan.source, part)
    record = Record(request, journal.sources, journal.shards, files)
    write_hashed(part / RECORD, to_json(record.to_dict()))
    sync(part)
    journal.remove()
    sync(part)


def copy_side_files(source: Source, part: Path) -> dict[str, str]:
    """Copy tokenizer, templates and the like; file name -> SHA-256."""
    return {file.name: write_hashed(part / file.name, _content(file)) for file in source.side_files}


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); check the source.") from None
