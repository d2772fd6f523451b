"""The closed loop of multimodal contextual reasoning (InternVideo3, arXiv 2606.12195): observe, reason, act, take in
what comes of it, verify, and only then answer, all in one context that grows.

The state is (context, belief, budget); docs/agent.md has its transitions. Every entry is given out as soon as it is
appended, so whoever iterates can show it, write it to a trace, or stop: the state is whole between any two entries.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np

from agent import prompts
from agent.answering import Answering, contradiction, evidence_of, offered, status_of
from agent.belief import Beliefs
from agent.budget import MISTAKES, Budget, Meter
from agent.calls import Parsed, parse
from agent.context import Context
from agent.entries import (
    Call,
    Claim,
    Entry,
    Feedback,
    Instruction,
    Judgement,
    Observation,
    Reasoning,
    Result,
    Status,
)
from agent.resume import resumable
from agent.room import make_room
from agent.session import ContextFull, Session
from agent.tools.box import tools as box
from agent.tools.tool import Shown, ToolError, call, checked
from agent.workspace import Workspace
from ivcore.errors import IvError
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
        message_tokens: int = MESSAGE_TOKENS,
        system: str | None = None,
        tools: Sequence[str] | None = None,
        entries: Sequence[Entry] = (),
    ) -> None:
        """message_tokens: the most of a message. system: what is told to the model besides `prompts.SYSTEM`.
        tools: names of those that may be used, None for all that work here. entries: of a run to go on from, see
        `agent.resume`. Raises ToolError for an unknown tool.
        """
        self.workspace, self.budget, self.sampling = workspace, budget or Budget(), sampling
        self._message_tokens, self._system = message_tokens, system
        self._tools, self._answering = box(workspace, tools), Answering(workspace)
        self._held: dict[str, np.ndarray] = {}
        self._prefilled = 0
        kept, self._unfinished = resumable(entries)
        self.context = Context(self._frames, kept)
        self.beliefs = Beliefs(self.context)
        self.session = Session(
            workspace.model,
            workspace.tokenizer,
            tools=offered(workspace, tools),
            spent=workspace.spent,
            frame_tokens=workspace.frame_tokens,
        )
        self._turn = self._messages()
        self._meter = Meter(workspace, entries)

    def ask(self, question: str) -> Iterator[Entry]:
        """Answer a question; gives the entries as they are appended, a Result last."""
        self._meter.start()
        self.beliefs.forget()
        self._turn, text = self._messages(), question
        if not any(True for _ in self.context.of(Instruction)):
            told = "\n\n".join(filter(None, (prompts.SYSTEM, self._system)))
            yield self._append(Instruction(role="system", text=told))
            text = prompts.opening(self.workspace.video, self.workspace.duration, question)
        yield self._append(Instruction(text=text, question=question))
        yield from self._run()

    def go_on(self) -> Iterator[Entry]:
        """As `ask`, from where the entries end."""
        self._meter.start()
        if (unfinished := self._unfinished) is not None:
            self._turn, self._unfinished = self._messages() - 1, None
            yield from self._act_on(unfinished.said, unfinished.done)
        if not isinstance(self.context.entries[-1], Result):
            yield from self._run()

    def _run(self) -> Iterator[Entry]:
        """Turns until there is a Result."""
        while True:
            self._turn = self._messages()
            if stopped := self._stopped(self._turns()):
                yield self._best(stopped)
                return
            self._prefilled = 0
            if not (yield from self._read()):
                yield self._best(f"{self._most_context():,} tokens of context")
                return
            yield self._append(self.beliefs.update(self.session))
            message = self._say()
            yield self._append(message)
            yield from self._act_on(message)
            if isinstance(self.context.entries[-1], Result):
                return

    def _act_on(self, message: Reasoning, done: int = 0) -> Iterator[Entry]:
        """Run the calls in a message, but for those that are done; one without a call is asked for its evidence, once.

        Ends with a Result where the run does.
        """
        _, calls = parse(message.said)
        if not calls:
            nudged = any(isinstance(each, Feedback) and each.problem == NUDGE for each in self._since_question())
            yield self._append(self._result(message.text, "unverified") if nudged else Feedback(call="", problem=NUDGE))
        for place, parsed in enumerate(calls[done:], done):
            if place and (stopped := self._stopped()):
                yield self._best(stopped)
                return
            yield from map(self._append, self._act(parsed))
            if isinstance(self.context.entries[-1], Result):
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
            shown = self._used(parsed.name, parsed.arguments)
        except IvError as error:  # of the fresh looks at an answer, any; of a tool, ToolError
            yield Feedback(call=made.id, problem=str(error))
            return
        yield from self._take_in(made, shown)

    def _used(self, name: str, arguments: Mapping[str, Any]) -> Shown:
        """What a tool shows, which looks no more where a budget ends."""
        self.workspace.limit = self._stopped
        try:
            return call(self._tools[name], arguments)
        finally:
            self.workspace.limit = None

    def _take_in(self, made: Call, shown: Shown) -> Iterator[Entry]:
        quoted = "\n".join(shown.quoted)
        if not shown.is_evidence or shown.span is None:
            yield Feedback(call=made.id, text=shown.text, quoted=quoted)
            return
        name = self.context.next_id(Observation)
        if shown.frames is not None:
            self._held[name] = shown.frames
        yield Observation(id=name, source=made.name, span=shown.span, times=shown.times, text=quoted)
        yield Feedback(call=made.id, text=shown.text, quoted=shown.answered, observation=name)

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

    def _read(self) -> Generator[Entry, None, bool]:
        """Let the model read what is new, and make room until there is some for its message; whether there is."""
        while True:
            messages = self.context.messages()
            known = len(self.session.messages)
            try:
                if known and not self.session.waits and messages[:known] == self.session.messages:
                    self._prefilled += self.session.read(messages[known:])
                else:
                    self._prefilled += self.session.rewrite(messages)
                if self.session.length + self._message_tokens <= self._most_context():
                    return True
            except ContextFull:
                pass
            memory = make_room(self.context, self.workspace)
            if memory is None:
                return False
            for name in memory.of:
                self._held.pop(name, None)
            yield self._append(memory)

    def _most_context(self) -> int:
        limit = self.workspace.model.config.text.max_position_embeddings
        return min(limit, self.budget.context or limit)

    def _say(self) -> Reasoning:
        """The next message of the model."""
        before = self.workspace.spent.generated
        said = "".join(self.session.answer(self._message_tokens, _nth(self.sampling, self._turn)))
        return Reasoning(
            text=parse(said)[0],
            said=said,
            prefilled=self._prefilled,
            generated=self.workspace.spent.generated - before,
            context=self.session.length,
        )

    def _frames(self, seen: Observation) -> np.ndarray:
        if seen.id not in self._held:
            self._held[seen.id] = decode_at(self.workspace.video, seen.times).frames
        return self._held[seen.id]

    def _append(self, entry: Entry) -> Entry:
        now = {"turn": self._turn, "seconds": self._meter.seconds, "cost": self._meter.cost}
        entry = entry.model_copy(update=now)
        self.context.append(entry)
        return entry

    def _result(self, answer: str, status: Status, claims: Sequence[Claim] = (), stopped: str | None = None) -> Result:
        return Result(
            answer=answer,
            status=status,
            evidence=evidence_of(list(claims), self.context),
            stopped=stopped,
            turns=self._turns(),
            **(self._meter.cost - self._asked().cost).model_dump(),
        )

    def _best(self, stopped: str) -> Entry:
        """The answer when a run cannot go on: the likeliest so far, which nobody has checked."""
        best = self.beliefs.best()
        return self._append(self._result(best.text if best else "", "unverified", stopped=stopped))

    def _messages(self) -> int:
        """How many messages of the model there are."""
        return sum(1 for _ in self.context.of(Reasoning))

    def _turns(self) -> int:
        """How many there are since the last question."""
        return sum(isinstance(each, Reasoning) for each in self._since_question())

    def _since_question(self) -> Sequence[Entry]:
        """The last question, and what came after it."""
        entries = self.context.entries
        return entries[max(place for place, each in enumerate(entries) if isinstance(each, Instruction)) :]

    def _asked(self) -> Entry:
        return self._since_question()[0]

    def _stopped(self, turns: int = 0) -> str | None:
        """Why the run has to end; None while it can go on."""
        if self._mistakes() >= MISTAKES:
            return f"{MISTAKES} calls in a row that could not be run"
        asked = self._asked()
        spent = self._meter.cost - asked.cost
        return self.budget.spent(
            turns=turns,
            tokens=spent.prefilled + spent.generated,
            frames=spent.frames,
            seconds=self._meter.seconds - asked.seconds,
        )

    def _mistakes(self) -> int:
        """Calls in a row, the last ones, that could not be run."""
        feedback = [each for each in self._since_question() if isinstance(each, Feedback)]
        return sum(1 for _ in takewhile(lambda each: each.problem is not None, reversed(feedback)))


def _nth(sampling: Sampling | None, number: int) -> Sampling | None:
    """The sampling of a run's message: each has its own seed, which follows from the run's and the message's number."""
    if sampling is None or sampling.seed is None:
        return sampling
    words = np.random.SeedSequence((sampling.seed, number)).generate_state(2, np.uint64)
    return replace(sampling, seed=int(words[0]) << 64 | int(words[1]))
