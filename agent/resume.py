"""Where a run that was stopped goes on: behind the last call that came to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent.calls import parse
from agent.entries import Entry, Feedback, Instruction, Memory, Reasoning, Result


@dataclass(frozen=True)
class Unfinished:
    """A message of the model whose calls have not all been run; done: how many have."""

    said: Reasoning
    done: int


def resumable(entries: Sequence[Entry]) -> tuple[list[Entry], Unfinished | None]:
    """The entries that stand, and their last message where it still has to be acted on.

    What a call had begun to show when the run was stopped is left out: the call is run again, with the same ids.
    """
    settled = Instruction, Memory, Feedback, Reasoning, Result
    kept = list(entries)
    while kept and not isinstance(kept[-1], settled):
        kept.pop()
    place = max((place for place, entry in enumerate(kept) if isinstance(entry, Reasoning)), default=None)
    if place is None or any(isinstance(entry, Instruction | Result) for entry in kept[place:]):
        return kept, None
    said = kept[place]
    assert isinstance(said, Reasoning)
    done = sum(isinstance(entry, Feedback) for entry in kept[place:])
    # A message without a call gets one feedback, too, if it does not end the run.
    return kept, Unfinished(said, done) if done < max(1, len(parse(said.said)[1])) else None
