"""The closed loop of multimodal contextual reasoning (InternVideo3, arXiv 2606.12195): observe, reason, act, take in
what comes of it, verify, and only then answer, all in one context that grows.

The state is (context, belief, budget); docs/agent.md has its transitions. Every entry is given out as soon as it is
appended, so whoever iterates can show it, write it to a trace, or stop: the state is whole between any two entries.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from agent import prompts
from agent.answering import Answering, contradiction, evidence_of, status_of
from agent.belief import Beliefs
from agent.budget import MISTAKES, Budget
from agent.calls import Parsed, parse
from agent.context import Context
from agent.entries import (
    Call,
    Claim,
    Entry,
    Feedback,
    Instruction,
    Judgement,
    Memory,
    Observation,
    Reasoning,
    Result,
)
from agent.resume import resumable
from agent.room import make_room
from agent.session import Session
from agent.tools.box import tools as box
from agent.tools.tool import Shown, ToolError, call, checked, schema
from agent.workspace import Workspace
from ivcore.errors import PromptError
from ivcore.sampling import Sampling
from ivcore.video import decode_at

MESSAGE_TOKENS = 512
NUDGE = f"call the tool {Answering.name}, and name the observations that show what you say."


class Loop:
    """Runs about one video in one context, a question after the other."""

    def __init__(
        self,
        workspace: Workspace,
        budget: Budget | None = None,
        *,
        sampling: Sampling | None = None,
        tools: Sequence[str] | None = None,
        entries: Sequence[Entry] = (),
    ) -> None:
        """tools: names of those that may be used, None for all that work here. entries: of a run to go on from, see
        `agent.resume`. Raises ToolError for an unknown tool.
        """
        self.workspace, self.budget, self.sampling = workspace, budget or Budget(), sampling
        self._tools, self._answering = box(workspace, tools), Answering(workspace)
        self._held: dict[str, np.ndarray] = {}
        self._prefilled = 0
        kept, self._left = resumable(entries)
        self.context = Context(self._frames, kept)
        self.beliefs = Beliefs(self.context)
        self.session = Session(
            workspace.model,
            workspace.tokenizer,
            tools=[*map(schema, self._tools.values()), schema(self._answering)],
            spent=workspace.spent,
            frame_tokens=workspace.frame_tokens,
        )
        last = kept[-1] if kept else None
        self._turn = last.turn if last else 0
        self._started = time.monotonic() - (last.seconds if last else 0.0)

    def ask(self, question: str) -> Iterator[Entry]:
        """Answer a question; gives the entries as they are appended, a Result last."""
        self.beliefs.forget()
        if not any(True for _ in self.context.of(Instruction)):
            yield self._append(Instruction(role="system", text=prompts.SYSTEM))
            question = prompts.opening(self.workspace.video, self.workspace.duration, question)
        yield self._append(Instruction(text=question))
        yield from self.go_on()

    def go_on(self) -> Iterator[Entry]:
        """As `ask`, from where the entries end."""
        first = self._first_turn()
        left, self._left = self._left, []
        for parsed in left:
            for entry in self._act(parsed):
                yield self._append(entry)
                if isinstance(entry, Result):
                    return
        while True:
            if stopped := self._stopped(first):
                yield self._best(stopped)
                return
            self._prefilled = 0
            yield from map(self._append, self._read())
            if self.session.length > self._most_context():
                yield self._best(f"{self._most_context():,} tokens of context")
                return
            yield self._append(self.beliefs.update(self.session))
            said, generated = self._say()
            text, calls = parse(said)
            self._turn += 1
            yield self._append(
                Reasoning(
                    text=text, said=said, prefilled=self._prefilled, generated=generated, context=self.session.length
                )
            )
            if not calls and self._was_nudged():
                yield self._append(self._result(text, "unverified"))
                return
            if not calls:
                yield self._append(Feedback(call="", problem=NUDGE))
            for parsed in calls:
                for entry in self._act(parsed):
                    yield self._append(entry)
                    if isinstance(entry, Result):
                        return

    def _act(self, parsed: Parsed) -> Iterator[Entry]:
        """A call, what it showed, and what came of it."""
        made = Call(id=self.context.next_id(Call), name=parsed.name, arguments=parsed.arguments)
        yield made
        try:
            if parsed.problem is not None or isinstance(parsed.arguments, str):
                raise ToolError(parsed.problem or "the arguments are no object.")
            if parsed.name == Answering.name:
                yield from self._answer(made, checked(self._answering, parsed.arguments))
                return
            if parsed.name not in self._tools:
                there = ", ".join((*self._tools, Answering.name))
                raise ToolError(f"there is no tool {parsed.name[:40]!r}; there are {there}.")
            shown = call(self._tools[parsed.name], parsed.arguments)
        except ToolError as error:
            yield Feedback(call=made.id, problem=str(error))
            return
        yield from self._take_in(made, shown)

    def _take_in(self, made: Call, shown: Shown) -> Iterator[Entry]:
        quoted = "\n".join(shown.quoted)
        if not shown.is_evidence or shown.span is None:
            yield Feedback(call=made.id, text=shown.text, quoted=quoted)
            return
        name = self.context.next_id(Observation)
        if shown.frames is not None:
            self._held[name] = shown.frames
        yield Observation(id=name, source=made.name, span=shown.span, times=shown.times, text=quoted)
        yield Feedback(call=made.id, text=shown.text, observation=name)

    def _answer(self, made: Call, arguments: Answering.Arguments) -> Iterator[Entry]:
        claims: list[Claim] = []
        verdicts: list[Judgement] = []
        for entry in self._answering.check(arguments, self.context):
            yield entry
            claims += [entry] if isinstance(entry, Claim) else []
            verdicts += [entry] if isinstance(entry, Judgement) else []
        if (against := contradiction(claims, verdicts, made.id)) is not None:
            yield against
            return
        yield self._result(arguments.text, status_of(arguments.found, verdicts), claims)

    def _read(self) -> Iterator[Memory]:
        """Let the model read what is new, and make room until there is some for its message."""
        while True:
            messages = self.context.messages()
            known = len(self.session.messages)
            try:
                if known and not self.session.waits and messages[:known] == self.session.messages:
                    self._prefilled += self.session.read(messages[known:])
                else:
                    self._prefilled += self.session.rewrite(messages)
                if self.session.length <= self._most_context():
                    return
            except PromptError:  # more than the model's own context holds
                if not self.context.in_view():
                    raise
            memory = make_room(self.context, self.workspace)
            if memory is None:
                return
            yield memory

    def _most_context(self) -> int:
        limit = self.workspace.model.config.text.max_position_embeddings
        return min(limit, self.budget.context or limit) - MESSAGE_TOKENS

    def _say(self) -> tuple[str, int]:
        before = self.workspace.spent.generated
        said = "".join(self.session.answer(MESSAGE_TOKENS, self.sampling))
        return said, self.workspace.spent.generated - before

    def _frames(self, seen: Observation) -> np.ndarray:
        if seen.id not in self._held:
            self._held[seen.id] = decode_at(self.workspace.video, seen.times).frames
        return self._held[seen.id]

    def _append(self, entry: Entry) -> Entry:
        entry = entry.model_copy(update={"turn": self._turn, "seconds": round(time.monotonic() - self._started, 3)})
        self.context.append(entry)
        return entry

    def _result(self, answer: str, status: Any, claims: Sequence[Claim] = (), stopped: str | None = None) -> Result:
        spent = self.workspace.spent
        return Result(
            answer=answer,
            status=status,
            evidence=evidence_of(list(claims), self.context),
            stopped=stopped,
            turns=self._turn - self._first_turn(),
            prefilled=spent.prefilled,
            visual=spent.visual,
            generated=spent.generated,
            frames=self.workspace.frames,
        )

    def _best(self, stopped: str) -> Entry:
        """The answer when a run cannot go on: the likeliest so far, which nobody has checked."""
        best = self.beliefs.best()
        return self._append(self._result(best.text if best else "", "unverified", stopped=stopped))

    def _first_turn(self) -> int:
        """The turn at which the last question was asked."""
        asked = [entry.turn for entry in self.context.of(Instruction)]
        return asked[-1] if asked else 0

    def _was_nudged(self) -> bool:
        since = [each for each in self.context.of(Feedback) if each.turn > self._first_turn()]
        return any(each.problem == NUDGE for each in since)

    def _stopped(self, first: int) -> str | None:
        """Why the run has to end; None while it can go on."""
        problems = 0
        for entry in reversed(self.context.entries):
            if isinstance(entry, Feedback):
                if entry.problem is None:
                    break
                problems += 1
            if isinstance(entry, Instruction):
                break
        if problems >= MISTAKES:
            return f"{MISTAKES} calls in a row that could not be run"
        spent = self.workspace.spent
        return self.budget.spent(
            turns=self._turn - first,
            tokens=spent.prefilled + spent.generated,
            frames=self.workspace.frames,
            seconds=time.monotonic() - self._started,
        )
