"""What an agent's run is made of: typed entries, each of them a line of its trace.

The first eight are the context that the model reads, in the order in which they were appended; run, belief and result
are about it. Ids are unique in a run: `o1` is its first observation, `c1` its first call, `k1` its first claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Span = tuple[float, float]
"""Seconds, start before end."""

Verdict = Literal["support", "contradict", "unclear"]
Status = Literal["verified", "unverified", "not found"]


class _Entry(BaseModel):
    """turn: of the loop that it belongs to, from 0. tokens: by which it made the model's context longer; of an
    observation, its visual ones too. seconds: since the run began."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    turn: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Instruction(_Entry):
    kind: Literal["instruction"] = "instruction"
    role: Literal["system", "user"] = "user"
    text: str


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
    """What came of a call. text: by the tool; quoted: lines by others that are no observation. problem: what was wrong
    with the call, for the model and the reader."""

    kind: Literal["feedback"] = "feedback"
    call: str
    text: str = ""
    quoted: str = ""
    observation: str | None = None
    problem: str | None = None


class Memory(_Entry):
    """What is left of observations that were trimmed from the cache; `of`: their ids."""

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
    """What a fresh look at a claim's evidence says. spans: that were looked at; support: probability of `support`."""

    kind: Literal["verdict"] = "verdict"
    claim: str
    verdict: Verdict
    spans: tuple[Span, ...]
    support: float


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
    """The first line of a trace. video: its content hash; options: of the command, with what they left out."""

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
    """Here a run was gone on with; the last `dropped` entries before it are void, because their call is begun anew."""

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
    """The last line of a trace that ended. stopped: the budget or the mistakes that ended it, None where it ended by
    itself. prefilled, visual, generated, frames: tokens read, visual ones among them, tokens written, frames decoded;
    the fresh looks of tools and verification included."""

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


def as_entry(fields: Mapping[str, Any]) -> Entry:
    """The entry of a line's object; ValueError where it is none."""
    return _ANY.validate_python(fields)
