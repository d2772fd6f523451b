"""`iv3 replay`: a traced run shown again, or run again and compared."""

from __future__ import annotations

import sys
from typing import Any

from agent.act import Options, begin, show
from agent.entries import Entry, Result, Run
from agent.run_view import lines_of
from agent.trace import TraceError, read_trace
from ivcore.media_file import readable_file

_COSTS = {"seconds", "tokens", "prefilled", "generated", "context", "frames"}
"""Of a run that was resumed they are others: it read again what it had read before it was stopped."""


def replay(trace: str, *, rerun: bool = False, report: str | None = None) -> bool:
    """Show a run; with rerun execute it. Whether it went as it did."""
    entries = read_trace(trace)
    if report is not None:
        from agent.report import write_report

        write_report(report, entries)
    if not rerun:
        for entry in entries:
            for line in lines_of(entry):
                print(line)
        return True
    return _again(entries)


def _again(entries: list[Entry]) -> bool:
    run = entries[0]
    assert isinstance(run, Run)  # read_trace lets nothing else be the first
    options = Options.of(run)
    if options.sampling.temperature and options.sampling.seed is None:
        raise TraceError(
            "The run was sampled without a seed, so another one says other things; there is no rerun of it."
        )
    _, loop = begin(readable_file(run.path), run.question, options, video=run.video)
    known = iter(entries[1:])
    for entry in loop.ask(run.question):
        before = next(known, None)
        if before is None or _content(before) != _content(entry):
            print("The rerun departs here. It was:", *(lines_of(before) if before else ["the end"]), sep="\n")
            print("It is:", *lines_of(entry), sep="\n")
            return False
        show([entry])
        if isinstance(entry, Result):
            print("\n".join(lines_of(entry)))
    if (left := next(known, None)) is not None:
        print("The rerun ends before the run did, with", *lines_of(left), sep="\n", file=sys.stderr)
        return False
    print("The rerun went as the run did.")
    return True


def _content(entry: Entry) -> dict[str, Any]:
    return entry.model_dump(exclude=_COSTS)
