"""A run as it should be: what a question takes is known from the script, and the tools that look do look.

- `look`, `overview` and `transcript` run on the rendered film. What `ground` and `verify` would say is made of the
  script, with the slips of a model: spans that are a little off, a first match that is another figure, or nothing.
- A run goes on from a slip as it should: it looks, sees that this is not it, and tries the next one.
- Half of the runs have a library, and some of these note what they have found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from agent import prompts
from agent.answering import Answering
from agent.calls import parse, written
from agent.context import Context
from agent.entries import Call, Feedback, Instruction, Observation, Reasoning
from agent.oracle.wording import absent, asked_of, description, statement, told
from agent.spans import Span
from agent.tools import ground
from agent.tools.look import Look, Overview
from agent.tools.memory import NOTED
from agent.tools.tool import Shown, call
from agent.tools.transcribe import Transcript
from agent.workspace import Workspace
from train.toyworld.questions import Question
from train.toyworld.score import span_text
from train.toyworld.script import Figure, Script

SLIP = 0.2
"""Seconds by which an edge of a match is off, at most."""

WRONG, RIGHT_FIRST, GLANCES, CHECKS, HAVE_LIBRARY, NOTES = 0.5, 0.6, 0.1, 0.15, 0.5, 0.3
"""Shares of runs in which other figures are among the matches; of those with the key, in which it goes before them;
that begin with an overview; that verify before they answer; that have a library; and of these, that note what they
found."""


@dataclass
class Oracle:
    """Acts out one run about a film."""

    script: Script
    question: Question
    workspace: Workspace
    rng: np.random.Generator
    context: Context = field(init=False)
    has_library: bool = field(init=False)
    _thought: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.has_library = self.rng.random() < HAVE_LIBRARY
        self.context = Context(frames=lambda seen: str(self.workspace.video))  # type: ignore[arg-type, return-value]
        self.context.append(Instruction(role="system", text=prompts.SYSTEM))
        duration = self.workspace.duration
        self.context.append(Instruction(text=prompts.opening(self.workspace.video, duration, self.question.text)))

    def run(self) -> list[dict[str, Any]]:
        """The messages of the run, frames as the film's path with their times."""
        if self.rng.random() < GLANCES:
            self._act("", "overview", {}, lambda given: call(Overview(self.workspace), given))
        (self._read if self.question.read else self._see)()
        return self.context.messages()

    def _see(self) -> None:
        asked = asked_of(self.script, self.question)
        key = self.script.keys[0]
        what = description("direction" if absent(self.question) else asked, key.name)
        matches = self._matches(key)
        shown = Shown(_matched(matches)) if matches else Shown(self._in_vain())
        self._act(f"Where is the {what}?", "ground", {"description": what}, lambda given: shown)
        for number, (span, _) in enumerate(matches):
            seen = self._look(span, first=number == 0)
            if self._shows(span, key):
                self._answer_seen(asked, replace(key, span=span), seen)
                return
        self._answer_nothing()

    def _matches(self, key: Figure) -> list[tuple[Span, float]]:
        """What `ground` finds, best first: spans and how sure it is."""
        others = [figure for figure in self.script.figures if figure.name != key.name]
        most = ground.CANDIDATES - (not absent(self.question))
        wrong = int(self.rng.integers(1, most + 1)) if self.rng.random() < WRONG else 0
        drawn = self.rng.permutation(len(others))[:wrong].tolist()
        spans = [self._near(others[index].span) for index in drawn]
        if not absent(self.question):
            place = 0 if self.rng.random() < RIGHT_FIRST else len(spans)
            spans.insert(place, self._near(key.span))
        return list(zip(spans, sorted(self.rng.uniform(ground.PRESENT, 1.0, len(spans)).tolist())[::-1], strict=True))

    def _in_vain(self) -> str:
        start = float(self.rng.uniform(0, self.script.duration - 4))
        span, chance = (start, start + float(self.rng.uniform(1, 4))), float(self.rng.uniform(0, 0.5))
        return f"Nothing from 0.0 to {self.script.duration:.1f} matches. The likeliest place is {_match(span, chance)}."

    def _near(self, span: Span) -> Span:
        start, end = (round(edge + float(self.rng.uniform(-SLIP, SLIP)), 1) for edge in span)
        return max(start, 0.0), min(max(end, round(start + 0.5, 1)), self.script.duration)

    def _look(self, span: Span, *, first: bool) -> str:
        thought = f"{'' if first else 'That is not it. '}It may be there from {span_text(span)}."
        given = {"start": span[0], "end": span[1]}  # as `ground` says it: to copy is easier than to reckon
        self._act(thought, "look", given, lambda arguments: call(Look(self.workspace), arguments))
        return self._last_seen()

    def _shows(self, span: Span, key: Figure) -> bool:
        return not absent(self.question) and span[0] < key.span[1] and key.span[0] < span[1]

    def _note(self, claim: str, span: Span) -> None:
        if self.has_library and self.rng.random() < NOTES:
            self._act("", "note", {"text": claim, "start": span[0], "end": span[1]}, lambda given: Shown(NOTED))

    def _answer_seen(self, asked: str, found: Figure, seen: str) -> None:
        """found: the key, its span as it was found."""
        claim, (start, end) = statement(asked, found), found.span
        self._thought = claim  # said before the next call, whichever it is
        self._note(claim, found.span)
        if self.rng.random() < CHECKS:
            said = f"{start:.1f} to {end:.1f}: support ({float(self.rng.uniform(0.7, 1.0)):.2f})."
            self._act("", "verify", {"claim": claim, "start": start, "end": end}, lambda given: Shown(said))
        self._answer(span_text(found.span) if asked == "when" else self.question.answer, claim, seen)

    def _read(self) -> None:
        self._act("What is said?", "transcript", {}, lambda given: call(Transcript(self.workspace), given))
        line = next((each for each in self.script.lines if each.span == self.question.span), None)
        if absent(self.question) or line is None:
            self._answer_nothing()
            return
        start, end = line.span
        self._act(told(line), "transcript", {"start": start, "end": end},
                  lambda given: call(Transcript(self.workspace), given))  # fmt: skip
        self._note(told(line), line.span)
        self._answer(self.question.answer, told(line), self._last_seen())

    def _answer(self, text: str, claim: str, seen: str) -> None:
        stated = [{"text": claim, "evidence": [seen]}]
        self._say("", Answering.name, {"text": text, "claims": stated})

    def _answer_nothing(self) -> None:
        thought = "That is not it." if any(True for _ in self.context.of(Observation)) else ""
        self._say(thought, Answering.name, {"text": self.question.answer, "claims": [], "found": False})

    def _say(self, thought: str, name: str, arguments: dict[str, Any]) -> Call:
        thought, self._thought = thought or self._thought, ""
        said = "\n".join(part for part in (thought, written(name, arguments)) if part)
        text, _ = parse(said)
        self.context.append(Reasoning(text=text, said=said))
        made = Call(id=self.context.next_id(Call), name=name, arguments=arguments)
        self.context.append(made)
        return made

    def _act(self, thought: str, name: str, arguments: dict[str, Any], tool: Callable[[dict[str, Any]], Shown]) -> None:
        made = self._say(thought, name, arguments)
        shown = tool(arguments)
        quoted = "\n".join(shown.quoted)
        if not shown.is_evidence or shown.span is None:
            self.context.append(Feedback(call=made.id, text=shown.text, quoted=quoted))
            return
        seen = Observation(
            id=self.context.next_id(Observation), source=name, span=shown.span, times=shown.times, text=quoted
        )
        self.context.append(seen)
        self.context.append(Feedback(call=made.id, text=shown.text, observation=seen.id))

    def _last_seen(self) -> str:
        return list(self.context.of(Observation))[-1].id


def _matched(matches: list[tuple[Span, float]]) -> str:
    return "Matches: " + ", ".join(_match(*each) for each in matches) + "."


def _match(span: Span, chance: float) -> str:
    return f"{span[0]:.1f} to {span[1]:.1f} ({chance:.2f})"
