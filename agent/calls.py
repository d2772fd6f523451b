"""The tool calls in a message of the model, in the Hermes form that Qwen's templates teach."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CHARACTERS = 40_000
"""Of one call; what is longer is not even parsed."""

_CALL = re.compile(rf"{OPEN}(.*?)(?:{CLOSE}|(?={OPEN})|\Z)", re.DOTALL)
_SHOWN = 200


@dataclass(frozen=True)
class Parsed:
    """A call as it was written; problem: why it cannot be run, a sentence for the model."""

    name: str
    arguments: dict[str, Any] | str
    problem: str | None = None


def parse(said: str) -> tuple[str, list[Parsed]]:
    """What a message says besides its calls, and its calls, in order."""
    calls = [_parse_one(match[1].strip(), match[0].endswith(CLOSE)) for match in _CALL.finditer(said)]
    return _CALL.sub("", said).strip(), calls


def written(name: str, arguments: dict[str, Any]) -> str:
    """A call as a message of the model."""
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    # A mark inside of an argument is no mark.
    escaped = text.replace(OPEN, f"\\u003c{OPEN[1:]}").replace(CLOSE, f"\\u003c{CLOSE[1:]}")
    return f"{OPEN}\n{escaped}\n{CLOSE}"


def _parse_one(text: str, closed: bool) -> Parsed:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"
    if len(text) > MOST_CHARACTERS:
        return Parsed("", shown, f"the call has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read.")
    try:
        # The reader of traces: what it takes, a trace can hold, unlike half a surrogate pair, NaN or 300 nested lists.
        call = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        ended = "" if closed else f" and has no {CLOSE}"
        return Parsed(
            "", shown, f"the call is no valid JSON ({error}){ended}; write one object with name and arguments."
        )
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Parsed("", shown, "the call is no object with a name; write one with name and arguments.")
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return Parsed(call["name"], shown, "the arguments are no object; write them as one.")
    return Parsed(call["name"], arguments)
