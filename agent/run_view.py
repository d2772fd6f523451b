"""A run on a terminal: the lines that `iv3 agent` streams for an entry as it happens, and `iv3 replay` shows again.

- What a model, a subtitle or a file name says is printed without control characters, and long texts are cut off.
- A line that is not indented begins with a word of ours, so no text can pass for a status or a problem.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from agent.clock import clock, span_text
from agent.entries import (
    Belief,
    Call,
    Claim,
    Entry,
    Evidence,
    Feedback,
    Instruction,
    Judgement,
    Memory,
    Observation,
    Reasoning,
    Result,
    Resumed,
    Run,
)
from agent.printable import printable

MAX_CHARACTERS = 2000
"""Of a text; of an argument MAX_ARGUMENT."""
MAX_ARGUMENT = 120
MAX_LINES = 12
INDENT = "  "

_VERDICTS = {"support": "supported", "contradict": "contradicted", "unclear": "unclear"}


def lines_of(entry: Entry) -> list[str]:
    """The lines of one entry, without line ends; none for what a person does not read as it happens."""
    match entry:
        case Run():
            of = f"{entry.path} ({clock(entry.duration)}), {entry.model} on {entry.backend} in {entry.dtype}"
            return _text(f"video: {of}")
        case Instruction():
            return _text(f"question: {entry.question}") if entry.question else []
        case Observation():
            return [*_text(observation_text(entry)), *_text(entry.text, INDENT)]
        case Reasoning():
            return _text(entry.text, INDENT)
        case Call():
            return _text(call_text(entry))
        case Feedback():
            problem = [] if entry.problem is None else _text(f"problem: {entry.problem}")
            return [*problem, *_text(entry.text, INDENT), *_text(entry.quoted, INDENT)]
        case Memory():
            return [*_text(f"remembered instead of {', '.join(entry.of)}:"), *_text(entry.text, INDENT)]
        case Claim():
            return _text(f"claim {entry.id}: {entry.text} ({', '.join(entry.evidence) or 'no evidence'})")
        case Judgement():
            spans = "".join(f" {span_text(span)}" for span in entry.spans)
            said = f"claim {entry.claim} is {_VERDICTS[entry.verdict]} ({entry.support:.0%}) by a look at{spans}"
            return [*_text(said), *_text(entry.seen, INDENT)]
        case Belief():
            return list(_belief(entry))
        case Resumed():
            return ["gone on with"]
        case Result():
            return list(_result(entry))


def call_text(call: Call) -> str:
    """A call as a person would say it: `look 12.0 to 15.5 at 4 fps`; long arguments are cut off."""
    # A name that no tool could have is quoted, so that it cannot pass for a line of another kind.
    words = [call.name if re.fullmatch(r"\w{1,40}", call.name) else _value(call.name)]
    if isinstance(call.arguments, str):
        return f"{words[0]} {_value(call.arguments)}"
    rest, span = dict(call.arguments), asked_span(call.arguments)
    if span is not None:
        words.append(f"{span[0]:.1f} to {span[1]:.1f}")
        rest = {name: value for name, value in rest.items() if name not in ("span", "start", "end")}
    if "fps" in rest:
        words.append(f"at {_value(rest.pop('fps'))} fps")
    others = ", ".join(f"{shortened(name, MAX_ARGUMENT)} {_value(value)}" for name, value in rest.items())
    return " ".join(words) + (", " if others and len(words) > 1 else " " if others else "") + others


def asked_span(arguments: dict[str, Any]) -> tuple[float, float] | None:
    """The span in a call's arguments, as `start` and `end` or as `span`; None where there is none in seconds."""
    span = arguments.get("span", [arguments.get("start"), arguments.get("end")])
    if not isinstance(span, list | tuple) or len(span) != 2:
        return None
    if not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in span):
        return None
    try:
        start, end = float(span[0]), float(span[1])
    except OverflowError:
        return None
    return (start, end) if math.isfinite(start) and math.isfinite(end) else None


def observation_text(seen: Observation) -> str:
    """`saw 14 frames of [00:12.0-00:15.5]`, `read [00:12.0-00:15.5]` of a text."""
    if not seen.times:
        return f"read {span_text(seen.span)}"
    return f"saw {len(seen.times)} {'frame' if len(seen.times) == 1 else 'frames'} of {span_text(seen.span)}"


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters whole; a longer one cut off, with its length said."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return f'"{shortened(value, MAX_ARGUMENT)}"'
    return shortened(json.dumps(value, ensure_ascii=False, default=str), MAX_ARGUMENT)


def _belief(belief: Belief) -> Iterator[str]:
    for hypothesis in belief.hypotheses:
        yield from _text(f"believes at {hypothesis.confidence:.0%}: {hypothesis.text}")
    for unknown in belief.unknown:
        yield from _text(f"does not know: {unknown}")


def _result(result: Result) -> Iterator[str]:
    yield from _text(f"answer: {result.answer or '(none)'}")
    yield from _text(f"status: {result.status}" + (f", stopped: {result.stopped}" if result.stopped else ""))
    for evidence in result.evidence:
        yield from _text(_cited(evidence))
        for line in evidence.lines:
            yield from _text(line, INDENT)


def _cited(evidence: Evidence) -> str:
    frames = len(evidence.times)
    what = f", {frames} {'frame' if frames == 1 else 'frames'}" if frames else ""
    return f"{span_text(evidence.span)} {evidence.observation}{what}"


def _text(text: str, indent: str = "") -> list[str]:
    """The lines of a text that say something, those after the first indented; of a long one the first few."""
    lines = [line for line in printable(shortened(text, MAX_CHARACTERS)).splitlines() if line.strip()]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"… {len(lines) - MAX_LINES} more lines"]
    return [indent + (line if indent or not place else INDENT + line) for place, line in enumerate(lines)]
