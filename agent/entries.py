"""What an agent's run is made of: typed entries, each of them a line of its trace.

The first eight are the context that the model reads, in the order in which they were appended; run, belief and result
are about it. Ids are unique in a run: `o1` is its first observation, `c1` its first call, `k1` its first claim.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from agent.spans import Span

Verdict = Literal["support", "contradict", "unclear"]
Status = Literal["verified", "unverified", "not found"]


class Cost(BaseModel):
    """Tokens prefilled, visual ones among them, and generated, and frames decoded for looks; those of fresh looks by
    tools and verification included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefilled: int = 0
    visual: int = 0
    generated: int = 0
    frames: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in Cost.model_fields})

    def __sub__(self, other: Cost) -> Cost:
        return Cost(**{name: getattr(self, name) - getattr(other, name) for name in Cost.model_fields})


class _Entry(BaseModel):
    """turn: of the loop that it belongs to, from 0: a turn ends with what came of the calls in its message.
    seconds, cost: that the run had worked for and spent when the entry was appended, since its beginning."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    turn: int = 0
    seconds: float = 0.0
    cost: Cost = Cost()


class Instruction(_Entry):
    """text: as the model reads it; question: the words of the person in it, empty in a system message."""

    kind: Literal["instruction"] = "instruction"
    role: Literal["system", "user"] = "user"
    text: str
    question: str = ""


class Observation(_Entry):
    """Frames or text that a tool has shown, of a span of the video.

    source: the tool. times: of the frames, in seconds; empty for text. text: lines by others, such as subtitles.
    """

    kind: Literal["observation"] = "observation"
    id: str
    source: str
    span: Span
    times: tuple[float, ...] = ()
    text: str = ""


class Reasoning(_Entry):
    """A message of the model: `said` word for word, `text` without its calls.

    prefilled: tokens that were read for it, which are those that are new; generated: its own; context: all that the
        cache holds behind it.
    """

    kind: Literal["reasoning"] = "reasoning"
    text: str
    said: str = ""
    prefilled: int = 0
    generated: int = 0
    context: int = 0


class Call(_Entry):
    """arguments: as the model gave them; a text where they were no JSON object."""

    kind: Literal["call"] = "call"
    id: str
    name: str
    arguments: dict[str, Any] | str


class Feedback(_Entry):
    """What came of a call. text: by the tool; quoted: lines by others, or of a fresh look, that are no observation.
    problem: what was wrong with the call, for the model and the reader."""

    kind: Literal["feedback"] = "feedback"
    call: str
    text: str = ""
    quoted: str = ""
    observation: str | None = None
    problem: str | None = None


class Memory(_Entry):
    """What is left of observations that were trimmed from the cache: a line for each; `of`: their ids."""

    kind: Literal["memory"] = "memory"
    text: str
    of: tuple[str, ...]


class Claim(_Entry):
    """A sentence of an answer and the ids of the observations that it rests on."""

    kind: Literal["claim"] = "claim"
    id: str
    text: str
    evidence: tuple[str, ...]


class Judgement(_Entry):
    """What a fresh look at a claim's evidence says. spans: that were looked at; support: probability of `support`;
    seen: what it answers the question itself.
    """

    kind: Literal["verdict"] = "verdict"
    claim: str
    verdict: Verdict
    spans: tuple[Span, ...]
    support: float
    seen: str = ""


class Hypothesis(BaseModel):
    """An answer that is still open, with the ids of what speaks for and against it; confidence from 0 to 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    confidence: float
    pro: tuple[str, ...] = ()
    contra: tuple[str, ...] = ()


class Belief(_Entry):
    """What the run holds to be so after a feedback. unknown: what it still has to find out."""

    kind: Literal["belief"] = "belief"
    hypotheses: tuple[Hypothesis, ...] = ()
    unknown: tuple[str, ...] = ()


class Run(_Entry):
    """The first line of a trace. video: its content hash; question: empty for a talk; options: of the command, with
    what they left out."""

    kind: Literal["run"] = "run"
    format: Literal[1] = 1
    path: str
    video: str
    duration: float
    question: str
    model: str
    backend: str
    dtype: str
    options: dict[str, Any] = Field(default_factory=dict)


class Resumed(_Entry):
    """Here a run was gone on with; the last `dropped` entries before it are void, because their call is begun anew,
    but what they cost was spent."""

    kind: Literal["resumed"] = "resumed"
    dropped: int


class Evidence(BaseModel):
    """A span that an answer cites, with the frames and transcript lines seen there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    observation: str
    span: Span
    times: tuple[float, ...] = ()
    lines: tuple[str, ...] = ()


class Result(_Entry):
    """The end of a question's run. stopped: the budget or the mistakes that ended it, None where it ended by itself.
    turns: messages of the model. prefilled, visual, generated, frames: as in `Cost`, since the question."""

    kind: Literal["result"] = "result"
    answer: str
    status: Status
    evidence: tuple[Evidence, ...] = ()
    stopped: str | None = None
    turns: int = 0
    prefilled: int = 0
    visual: int = 0
    generated: int = 0
    frames: int = 0


Entry = Annotated[
    Run
    | Instruction
    | Observation
    | Reasoning
    | Call
    | Feedback
    | Memory
    | Claim
    | Judgement
    | Belief
    | Resumed
    | Result,
    Field(discriminator="kind"),
]
_ANY: TypeAdapter[Entry] = TypeAdapter(Entry)


def read_entry(line: str | bytes) -> Entry:
    """The entry of a trace's line; ValueError where it is none."""
    return _ANY.validate_json(line)
