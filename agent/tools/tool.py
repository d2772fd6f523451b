"""What a tool is: a name, arguments with types, and a result that the model reads as data.

Text that a tool brings in (subtitles, notes, captions) was written by others. It is `quoted`: shown behind marks, and
the model is told that nothing in it is an instruction; a call that stands in it is text and never runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from agent.clock import clock
from agent.spans import Span
from ivcore.errors import IvError

MOST_CHARACTERS = 4_000
"""Of one argument; a longer one is a mistake, not a request."""

_SHOWN = 80  # characters of an argument's name, which a model may make up


class ToolError(IvError):
    """A tool cannot do what it was asked for; the message is feedback to the model."""


class ToolArguments(BaseModel):
    """Arguments of a tool; unknown ones are a mistake that the model should hear of."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Shown:
    """What a tool gives back.

    text: for the model, written by the tool itself. quoted: lines by others, shown as data. span: what was looked at,
    where frames or lines of it are evidence. frames: uint8 (N, H, W, 3) at `times`, seconds of the video. answered:
    what a fresh look says about them, shown as data, too, but no evidence.
    """

    text: str = ""
    quoted: Sequence[str] = ()
    span: Span | None = None
    frames: np.ndarray | None = field(default=None, repr=False)
    times: tuple[float, ...] = ()
    answered: str = ""

    @property
    def is_evidence(self) -> bool:
        """Whether it shows something of the video that a claim can rest on."""
        return self.span is not None and (self.frames is not None or bool(self.quoted))


class Tool(Protocol):
    """A tool; `Arguments` is the schema of its call."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def Arguments(self) -> type[BaseModel]: ...
    def __call__(self, arguments: Any, /) -> Shown: ...


AnyArguments = TypeVar("AnyArguments", bound=BaseModel)


def schema(tool: Tool) -> dict[str, Any]:
    """The tool in the form that chat templates print (JSON schema of a function)."""
    parameters = tool.Arguments.model_json_schema()
    parameters.pop("title", None)
    for each in parameters.get("properties", {}).values():
        each.pop("title", None)
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def checked(tool: Tool, arguments: Mapping[str, Any]) -> Any:
    """The arguments that a model gave as the tool takes them; ToolError in one sentence where they do not fit."""
    for name, value in arguments.items():
        if isinstance(value, str) and len(value) > MOST_CHARACTERS:
            raise ToolError(
                f"{tool.name}: {_shown(name)} has {len(value):,} characters; at most {MOST_CHARACTERS:,} are allowed."
            )
    try:
        return tool.Arguments.model_validate(dict(arguments))
    except ValidationError as error:
        problems = "; ".join(_problem(each) for each in error.errors(include_url=False)[:3])
        raise ToolError(f"{tool.name}: {problems}. It takes {_signature(tool)}.") from None


def call(tool: Tool, arguments: Mapping[str, Any]) -> Shown:
    """Run a tool with the arguments that a model gave; ToolError where they do not fit, or it fails."""
    known = checked(tool, arguments)
    try:
        return tool(known)
    except ToolError:
        raise
    except IvError as error:
        raise ToolError(f"{tool.name}: {error}") from None


def checked_span(start: float | None, end: float | None, duration: float) -> Span:
    """The span that optional arguments name, the whole video by default; ToolError where it is not in the video."""
    first, last = 0.0 if start is None else start, duration if end is None else end
    if not 0 <= first < last:
        raise ToolError(f"{first:g} to {last:g} is no span; give a start of at least 0 and an end after it.")
    if first >= duration:
        raise ToolError(f"the video ends at {duration:.1f} s ({clock(duration)}), before {first:g}; ask for less.")
    return first, min(last, duration)


def _problem(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the arguments"
    return f"{_shown(place)}: {str(error['msg']).rstrip('.')}"


def _shown(name: str) -> str:
    return " ".join(name.split())[:_SHOWN]


def _signature(tool: Tool) -> str:
    fields = tool.Arguments.model_fields
    return ", ".join(name if each.is_required() else f"{name} (optional)" for name, each in fields.items())
