"""`iv3 convert` and `iv3 verify`: the plan and the progress on the terminal; the work is done in `convert`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from agent.units import human_bytes
from convert.place import Place
from convert.plan import Options, Plan, make_plan, summarize
from convert.run import convert as convert_checkpoint
from convert.source import open_source
from convert.verification import verify as verify_checkpoint
from ivcore.errors import CheckpointError, ConfigError

_SIZE = re.compile(r"(?P<number>\d{1,12}(\.\d{1,12})?)\s*(?P<unit>[KMGT]?)(?P<binary>I?)B?", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def convert(source: str, target: str, options: Options, *, dry_run: bool, resume: bool, force: bool) -> None:
    """Convert, with progress on stderr; with `dry_run` only print the plan."""
    if dry_run:
        _print_plan(make_plan(open_source(source), options))
        return
    planned: list[Plan] = []
    try:
        with _progress("converting") as on_progress:
            record = convert_checkpoint(
                source, target, options, resume=resume, force=force, on_plan=planned.append, on_progress=on_progress
            )
    except KeyboardInterrupt:
        if (part := Place(target).part).exists():
            print(f"iv3: the shards that were finished are in {part}; --resume goes on from them.", file=sys.stderr)
        raise
    if not planned:
        print(f"{target} is whole already.")
        return
    before = sum(shard.nbytes for shard in record.sources.values())
    after = sum(shard.nbytes for shard in record.shards.values())
    count = f"{len(record.shards)} shards" if len(record.shards) > 1 else "1 shard"
    print(f"{target}: {count}, {human_bytes(after)} from {human_bytes(before)}; sha256 of all in conversion.json.")


def verify(path: str, as_json: bool) -> None:
    """Print what is wrong with a folder; CheckpointError at the end where anything is."""
    with _progress("verifying") as on_progress:
        found = verify_checkpoint(path, on_progress)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        for problem in found.problems:
            print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(problem)))
        if found.ok:
            shards = f"{found.shards} shards" if found.shards > 1 else "1 shard"
            what = f"{found.tensors} tensors in {shards}, {human_bytes(found.nbytes)}"
            against = "headers, manifest and conversion.json agree" if found.hashed else (
                "headers and manifest agree; there is no conversion.json, so contents could not be compared"
            )  # fmt: skip
            print(f"{path}: {what}: {against}.")
    if not found.ok:
        count = f"{len(found.problems)} problems" if len(found.problems) > 1 else "1 problem"
        raise CheckpointError(f"{path} has {count}; fetch or convert it again.")


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB` or `2GiB`; ConfigError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if not match or float(match["number"]) <= 0:
        raise ConfigError(f"--shard-size {text!r} is not a size; write it as in 5GB, 500MB or 2GiB.")
    base = 1024 if match["binary"] else 1000
    return max(round(float(match["number"]) * base ** _POWERS[match["unit"].upper()]), 1)


def _print_plan(plan: Plan) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tensors", "kind", "before", "after", "reason"):
        table.add_column(name, overflow="fold")
    table.add_column("bytes before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    rows = summarize(plan)
    for row in rows:
        table.add_row(
            str(row.tensors), row.kind, row.before, row.after, Text(row.reason),
            human_bytes(row.nbytes_before), human_bytes(row.nbytes_after),
        )  # fmt: skip
    before, after = (sum(getattr(row, name) for row in rows) for name in ("nbytes_before", "nbytes_after"))
    table.add_section()
    tensors = sum(row.tensors for row in rows)
    table.add_row(str(tensors), "all", "", "", f"{after / before:.0%}", human_bytes(before), human_bytes(after))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    count = f"{len(plan.shards)} shards" if len(plan.shards) > 1 else "1 shard"
    console.print(f"{count}; nothing was written (--dry-run).")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes, speed and time left on stderr, when that is a terminal."""
    console = Console(stderr=True, highlight=False)
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task(what, total=None)
        yield lambda done, total: display.update(task, completed=done, total=total)
