"""A run as it should be: what a question takes is known from the script, and the tools that look do look.

- `look`, `overview` and `transcript` run on the rendered film. What fresh looks would say is made of the script, with
  the slips of a model: spans that are a little off, a first match that is another figure, or nothing.
- A run goes on from a slip as it should: it asks of what it looks at, hears that this is not it, and tries the next
  one. Sometimes a look misreads, which the check of the answer contradicts, and it looks more closely.
- More questions follow in the same context, as in `iv3 chat`: a run is long, and what there is to learn from one answer
  is short. What was seen before is looked at again without searching for it.
- Half of the runs have a library, and some of these note what they have found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np

from agent import prompts
from agent.answering import Answering, contradiction
from agent.calls import parse, written
from agent.context import Context
from agent.entries import Call, Claim, Entry, Feedback, Instruction, Judgement, Observation, Reasoning
from agent.oracle.wording import READ_OFF, absent, description, fits, misread, statement, told
from agent.spans import Span, overlap
from agent.tools import ground
from agent.tools.look import Look, Overview
from agent.tools.memory import NOTED
from agent.tools.tool import Shown, call
from agent.tools.transcribe import Transcript
from agent.workspace import Workspace
from train.toyworld.questions import NOT_THERE, Question, about, answer_of, in_vain
from train.toyworld.score import span_text
from train.toyworld.script import Figure, Script, pick
from train.toyworld.talks import unambiguous
from train.toyworld.words import NAMES, Name

SLIP = 0.2
"""Seconds by which an edge of a match is off, at most."""

WRONG, RIGHT_FIRST, MISREAD, CHECKS = 0.5, 0.6, 0.2, 0.15
"""Shares of questions with other figures among the matches; of those with the key, in which it goes before them; in
which what is seen is misread at first; and which are verified before they are answered."""

GLANCES, HAVE_LIBRARY, NOTES = 0.1, 0.5, 0.3
"""Shares of runs that begin with an overview; that have a library; and of the answers in these, that are noted."""

FOLLOW_UPS, AGAIN, IN_VAIN = 4, 0.5, 0.2
"""Questions behind the first; share of runs in which the next one is about what was seen; share of the questions of
when and where to in which the figure becomes one that is not there."""

CLOSELY, CLOSER = 4.0, 8.0
"""Frames a second of a look that is asked something, and of that after a contradiction."""


@dataclass
class Oracle:
    """Acts out one run about a film: its question, and others behind it."""

    script: Script
    question: Question
    workspace: Workspace
    rng: np.random.Generator
    context: Context = field(init=False)
    has_library: bool = field(init=False)
    _thought: str = field(init=False, default="")
    _seen: dict[Figure, Span] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.has_library = self.rng.random() < HAVE_LIBRARY
        self.context = Context(frames=lambda seen: str(self.workspace.video))  # type: ignore[arg-type, return-value]
        self.context.append(Instruction(role="system", text=prompts.SYSTEM))

    def run(self, follow_ups: int = FOLLOW_UPS) -> list[dict[str, Any]]:
        """The messages of the run, frames as the film's path with their times."""
        text = prompts.opening(self.workspace.video, self.workspace.duration, self.question.text)
        self.context.append(Instruction(text=text))
        if self.rng.random() < GLANCES:
            self._act("", "overview", {}, lambda given: call(Overview(self.workspace), given))
        if self.question.read:
            self._read()
        else:
            self._see(self.question, self.script.keys[0])
        for question, figure in self._others(follow_ups):
            self.context.append(Instruction(text=question.text))
            self._see(question, figure)
        return self.context.messages()

    def _others(self, most: int) -> list[tuple[Question, Figure]]:
        """Questions about figures that can be told apart: first, of some runs, one about the figure that was seen."""
        pool = unambiguous(self.script)
        drawn = [pool[index] for index in self.rng.permutation(len(pool))]
        if self._seen and self.rng.random() < AGAIN:
            drawn.sort(key=lambda each: each[1] not in self._seen)
        there = {figure.name for figure in self.script.figures}
        gone = [name for name in NAMES if name not in there]
        made: list[tuple[Question, Figure]] = []
        asked = {self.question.text}
        for kind, figure in drawn:
            question = about(self.rng, kind, figure)
            if gone and kind in ("direction", "when") and self.rng.random() < IN_VAIN:
                figure = replace(figure, name=pick(self.rng, gone))
                question = in_vain(about(self.rng, kind, figure))
            if question.text not in asked and len(made) < most:
                asked.add(question.text)
                made.append((question, figure))
        return made

    def _see(self, question: Question, key: Figure) -> None:
        if key in self._seen and not absent(question):
            self._look(self._seen[key], question, key.name, key, "")
            self._answer_seen(question, key)
            return
        what = description(question.asked, key.name)
        matches = self._matches(what, key, absent(question))
        shown = Shown(_matched(matches)) if matches else Shown(self._in_vain())
        self._act(f"Where is the {what}?", "ground", {"description": what}, lambda given: shown)
        for number, (span, _) in enumerate(matches):
            thought = f"{'That is not it. ' if number else ''}It may be there from {span_text(span)}."
            if absent(question) or not overlap(span, key.span):
                self._look(span, question, key.name, None, thought)
                continue
            self._seen[key] = span
            if question.asked in READ_OFF and self.rng.random() < MISREAD:
                self._misread(question, key, thought)
            else:
                self._look(span, question, key.name, key, thought)
            self._answer_seen(question, key)
            return
        self._answer_nothing()

    def _matches(self, what: str, key: Figure, is_absent: bool) -> list[tuple[Span, float]]:
        """What `ground` finds, best first: spans and how sure it is."""
        others = [figure for figure in self.script.figures if not fits(what, figure.name)]
        others = [figure for figure in others if is_absent or not overlap(figure.span, key.span)]
        most = min(ground.CANDIDATES - (not is_absent), len(others))
        wrong = int(self.rng.integers(1, most + 1)) if most and self.rng.random() < WRONG else 0
        drawn = self.rng.permutation(len(others))[:wrong].tolist()
        spans = [self._near(others[index].span) for index in drawn]
        if not is_absent:
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

    def _look(
        self, span: Span, question: Question, name: Name, key: Figure | None, thought: str, fps: float = CLOSELY
    ) -> None:
        """Look at a span, as `ground` says it, and ask about what is there: the question, or of one of when, whether it
        is that at all. key: what a look sees of what is asked about, if anything."""
        if question.asked in READ_OFF:
            asked, answered = question.text, answer_of(question.asked, key) if key else NOT_THERE
        else:
            asked = prompts.is_visible(description(question.asked, name))
            answered = prompts.YES_NO[key is None]
        given = {"start": span[0], "end": span[1], "fps": fps}
        shown = replace(call(Look(self.workspace), given), answered=answered)
        self._act(thought, Look.name, {**given, "question": asked}, lambda given: shown)

    def _note(self, claim: str, span: Span) -> None:
        if self.has_library and self.rng.random() < NOTES:
            self._act("", "note", {"text": claim, "start": span[0], "end": span[1]}, lambda given: Shown(NOTED))

    def _answer_seen(self, question: Question, key: Figure) -> None:
        """The span of the key is what was looked at, as good as it was found."""
        start, end = self._seen[key]
        found = replace(key, span=(start, end))
        claim, text = statement(question.asked, found), answer_of(question.asked, found)
        self._thought = claim  # said before the next call, whichever it is
        self._note(claim, found.span)
        if self.rng.random() < CHECKS:
            said = f"{start:.1f} to {end:.1f}: support ({float(self.rng.uniform(0.7, 1.0)):.2f})."
            shown, given = Shown(said, quoted=(text,)), {"claim": claim, "start": start, "end": end}
            self._act("", "verify", {**given, "question": question.text}, lambda given: shown)
        self._answer(text, claim, self._last_seen())

    def _misread(self, question: Question, key: Figure, thought: str) -> None:
        """What a look has misread becomes the answer, the loop contradicts it, and a closer look follows."""
        wrong, span = misread(question.asked, key, self.rng), self._seen[key]
        self._look(span, question, key.name, wrong, thought)
        text = self._thought = statement(question.asked, wrong)
        made = self._answer(answer_of(question.asked, wrong), text, self._last_seen())
        claim = Claim(id=self.context.next_id(Claim), text=text, evidence=(self._last_seen(),))
        self.context.append(claim)
        judged = Judgement(
            claim=claim.id, verdict="contradict", spans=(span,), support=0.0, seen=answer_of(question.asked, key)
        )
        against = contradiction([claim], [judged], made.id)
        assert against is not None
        self.context.append(against)
        self._look(span, question, key.name, key, "", CLOSER)

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

    def _answer(self, text: str, claim: str, seen: str) -> Call:
        stated = [{"text": claim, "evidence": [seen]}]
        return self._say("", Answering.name, {"text": text, "claims": stated})

    def _answer_nothing(self) -> None:
        thought = "That is not it." if self._looked_in_vain() else ""
        self._say(thought, Answering.name, {"text": NOT_THERE, "claims": [], "found": False})

    def _looked_in_vain(self) -> bool:
        """Whether anything was observed since the last question."""
        since = reversed(self.context.entries)
        return any(isinstance(each, Observation) for each in takewhile(lambda each: not _asks(each), since))

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
        self.context.append(Feedback(call=made.id, text=shown.text, quoted=shown.answered, observation=seen.id))

    def _last_seen(self) -> str:
        return list(self.context.of(Observation))[-1].id


def _asks(entry: Entry) -> bool:
    return isinstance(entry, Instruction) and entry.role == "user"


def _matched(matches: list[tuple[Span, float]]) -> str:
    return "Matches: " + ", ".join(_match(*each) for each in matches) + "."


def _match(span: Span, chance: float) -> str:
    return f"{span[0]:.1f} to {span[1]:.1f} ({chance:.2f})"
