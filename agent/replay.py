"""`iv3 replay`: a traced run shown again, or run again and compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from agent.act import Options, begin, show
from agent.entries import Entry, Instruction, Reasoning, Result, Resumed, Run
from agent.run_view import lines_of
from agent.trace import TraceError, read_trace
from ivcore.media_file import readable_file

_COSTS = {"seconds", "cost", "prefilled", "visual", "generated", "context", "frames"}
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
    known = [entry for entry in entries[1:] if not isinstance(entry, Resumed)]
    asked = [entry.question for entry in known if isinstance(entry, Instruction) and entry.question]
    if not asked and not run.question:
        raise TraceError("The trace has no question, so there is nothing to run again; ask with iv3 chat.")
    _, loop = begin(readable_file(run.path), run.question, options, video=run.video)
    for question in asked or [run.question]:
        for entry in loop.ask(question):
            before = known.pop(0) if known else None
            if before is None or _content(before) != _content(entry):
                print("The rerun departs here. It was:", *(_told(before) if before else ["the end"]), sep="\n")
                print("It is:", *_told(entry), sep="\n")
                return False
            show([entry])
            if isinstance(entry, Result):
                print("\n".join(lines_of(entry)))
            elif not run.question and _was_stopped(entry, known):
                break
    if known:
        print("The rerun ends before the run did, with", *lines_of(known[0]), sep="\n", file=sys.stderr)
        return False
    print("The rerun went as the run did.")
    return True


def _was_stopped(entry: Entry, left: Sequence[Entry]) -> bool:
    """Whether a talk's question was stopped behind this entry: the next one asks something else, or there is none."""
    if isinstance(entry, Instruction) and not entry.question:
        return False
    return not left or (isinstance(left[0], Instruction) and bool(left[0].question))


def _told(entry: Entry) -> list[str]:
    """The lines of an entry, a message's with the calls in it: they may be where it departs."""
    return lines_of(entry.model_copy(update={"text": entry.said}) if isinstance(entry, Reasoning) else entry)


def _content(entry: Entry) -> dict[str, Any]:
    return entry.model_dump(exclude=_COSTS)
