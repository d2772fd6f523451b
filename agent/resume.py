"""Where a run that was stopped goes on: behind the last call that came to its end."""

from __future__ import annotations

from collections.abc import Sequence

from agent.calls import Parsed, parse
from agent.entries import Entry, Feedback, Instruction, Memory, Reasoning, Result


def resumable(entries: Sequence[Entry]) -> tuple[list[Entry], list[Parsed]]:
    """The entries that stand, and the calls of the last message that are still to be run.

    What a call had begun to show when the run was stopped is left out: the call is run again, with the same ids.
    """
    settled = Instruction, Memory, Feedback, Reasoning, Result
    kept = list(entries)
    while kept and not isinstance(kept[-1], settled):
        kept.pop()
    last = next((place for place in reversed(range(len(kept))) if isinstance(kept[place], Reasoning)), None)
    if last is None or any(isinstance(entry, Instruction | Result) for entry in kept[last:]):
        return kept, []
    said = kept[last]
    assert isinstance(said, Reasoning)
    _, calls = parse(said.said)
    done = sum(isinstance(entry, Feedback) for entry in kept[last:])
    return kept, calls[done:]
