"""The end of a run: an answer whose claims are checked, each by a fresh look at the evidence that it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pydantic import Field

from agent.context import Context
from agent.entries import Claim, Entry, Evidence, Feedback, Instruction, Judgement, Observation, Status
from agent.tools.box import tools
from agent.tools.tool import Shown, ToolArguments, ToolError, schema
from agent.tools.verify import Verify
from agent.workspace import Workspace


class Stated(ToolArguments):
    """A claim as the model states it."""

    text: str = Field(min_length=1)
    evidence: list[str] = Field(min_length=1)


class Answering:
    """The tool `answer`: it does nothing but check what it is given, and says whether that is the end of the run."""

    name: ClassVar[str] = "answer"
    description: ClassVar[str] = "Gives the answer, with claims and the observations that show each; ends the run."

    class Arguments(ToolArguments):
        text: str = Field(min_length=1)
        claims: list[Stated] = Field(default_factory=list)
        found: bool = True

    def __init__(self, workspace: Workspace) -> None:
        self._verify = Verify(workspace)

    def __call__(self, arguments: Answering.Arguments) -> Shown:
        return Shown(arguments.text)

    def check(self, arguments: Answering.Arguments, context: Context) -> Iterator[Entry]:
        """A Claim and a Judgement for each that is stated; ToolError where there is no such evidence."""
        if arguments.found and not arguments.claims:
            raise ToolError(f"{self.name}: there are no claims; state what the answer rests on, or found false.")
        known = {each.id: each for each in context.of(Observation)}
        asked = next((each.question for each in reversed([*context.of(Instruction)]) if each.question), "")
        for name in (name for stated in arguments.claims for name in stated.evidence):
            if name not in known:
                there = f"there are {', '.join(known)}" if known else "nothing was observed yet"
                raise ToolError(f"{self.name}: there is no observation {name[:40]!r}; {there}.")
        for stated in arguments.claims:
            claim = Claim(id=context.next_id(Claim), text=stated.text, evidence=tuple(stated.evidence))
            yield claim
            found = self._verify.check(claim.text, [known[name].span for name in claim.evidence], asked)
            yield Judgement(
                claim=claim.id, verdict=found.verdict, spans=found.spans, support=found.support, seen=found.seen
            )


def offered(workspace: Workspace, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """What a chat template prints of the tools of these names, None being all that work here, and of `answer`."""
    return [*map(schema, tools(workspace, names).values()), schema(Answering(workspace))]


def status_of(found: bool, verdicts: list[Judgement]) -> Status:
    """Verified only if every claim is supported."""
    if not found:
        return "not found"
    return "verified" if verdicts and all(each.verdict == "support" for each in verdicts) else "unverified"


def contradiction(claims: list[Claim], verdicts: list[Judgement], call: str) -> Feedback | None:
    """What the model is told where a fresh look contradicts; None where nothing does."""
    against = [each for each in zip(claims, verdicts, strict=True) if each[1].verdict == "contradict"]
    if not against:
        return None
    said = "; ".join(f"{claim.id} ({', '.join(claim.evidence)}): {claim.text.rstrip('.')}" for claim, _ in against)
    text = f"A fresh look contradicts {said}. Look again, or answer otherwise."
    return Feedback(call=call, text=text, quoted="\n".join(each.seen for _, each in against if each.seen))


def evidence_of(claims: list[Claim], context: Context) -> tuple[Evidence, ...]:
    """What the claims cite, each observation once."""
    names = dict.fromkeys(name for claim in claims for name in claim.evidence)
    found = [each for each in (context.observation(name) for name in names) if each is not None]
    return tuple(
        Evidence(observation=each.id, span=each.span, times=each.times, lines=tuple(each.text.splitlines()))
        for each in found
    )
