"""One row of training data: a conversation with its media, and what a verifiable reward needs to judge an answer.

- `id` is a hash of what the row says, so it stays the same when files are moved, joined or reordered.
- What makes a row useless is a `RowError` with a short reason, by which rows are counted, and a detail about this one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from ivcore.errors import MediaError, PromptError, TrainingError
from ivcore.media_file import readable_file
from ivcore.messages import ROLES, read_messages
from ivcore.video import probe

Stage = Literal["cpt", "sft", "rl", "distill"]
Span = tuple[float, float]

SPAN_SLACK = 0.5
"""Seconds that a span may end after its clip: annotations are rounded, some to whole seconds."""


class RowError(TrainingError):
    """A row that cannot be used. `reason` is one of few, to count by; `str(error)` says more about this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Row:
    """One row of training data.

    messages: in the Hugging Face form; media are {"type": "video", "video": absolute path}, with `times` where the row
        says which frames.
    choices, answer: of a multiple choice question, and the index of the right one.
    span: (start, end) in seconds, the right answer to a question of when.
    kind: the row's own label, to evaluate by; dataset: the name of what it was read from.
    tools: that the prompt offers, in the form that chat templates print; None for none.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    media: tuple[tuple[Literal["image", "video"], str], ...]
    choices: tuple[str, ...] | None
    answer: int | None
    span: Span | None
    kind: str
    dataset: str
    tools: tuple[dict[str, Any], ...] | None = None

    def prompt(self) -> tuple[dict[str, Any], ...]:
        """The messages without the answer they end with: what a rollout starts from."""
        messages = self.messages
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return messages

    def check_media(self) -> None:
        """Open every clip far enough to know that it is one, and that the span lies within it; RowError otherwise."""
        try:
            seconds = [probe(path).duration for kind, path in self.media if kind == "video"]
            for kind, path in self.media:
                if kind == "image":
                    readable_file(path)
        except MediaError as error:
            raise RowError("unusable clip", str(error)) from None
        if self.span is not None:
            _check_inside(self.span, max(seconds))


def parse_row(raw: Mapping[str, Any], folder: Path, stage: Stage, dataset: str = "") -> Row:
    """A row from the object of its line; paths of media are relative to `folder`.

    The object has `messages` (one of the assistant's with `weight` 0 is read and not learned), and may have `tools`
    (functions with their JSON schemas), `choices` with `answer` (the right one's index or letter, or its text), `span`
    ([start, end] in seconds), `duration` (of the clip, in seconds) and `kind`.

    Raises RowError for a row that the stage cannot use: cpt and sft need an assistant's message, rl something to
    verify. Clips must exist; they are not opened (see `Row.check_media`).
    """
    messages = raw.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RowError("malformed messages", "there is no list of messages")
    _check_roles(messages)
    choices, answer = _choices(raw)
    span = _span(raw.get("span"))
    tools = _tools(raw.get("tools"))
    said = {"messages": messages, "choices": choices, "answer": answer, "span": span}
    said |= {} if tools is None else {"tools": tools}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]
    resolved = tuple(_resolve(message, folder) for message in messages)
    row = Row(digest, resolved, _media(resolved), choices, answer, span, str(raw.get("kind", "")), dataset, tools)
    _check_use(row, stage, raw.get("answer"))
    if span is not None:
        if not any(kind == "video" for kind, _ in row.media):
            raise RowError("span without a video", "it has a span but shows no video")
        duration = raw.get("duration")
        if duration is not None and _is_number(duration):
            _check_inside(span, float(duration))
    for _, path in row.media:
        if not Path(path).is_file():
            raise RowError("missing clip", f"there is no file {path}")
    return row


def _tools(tools: Any) -> tuple[dict[str, Any], ...] | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("malformed tools", "tools must be a list of functions with their schemas")
    return tuple(tools)


def _check_roles(messages: Sequence[Any]) -> None:
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if isinstance(message, Mapping) and role not in ROLES:
            raise RowError("unknown role", f"messages[{index}].role is {role!r}; use one of {', '.join(ROLES)}")
        weight = message.get("weight", 1) if isinstance(message, Mapping) else 1
        if isinstance(weight, bool) or weight not in (0, 1):
            raise RowError("malformed messages", f"messages[{index}].weight is {weight!r}; it must be 0 or 1")


def _check_use(row: Row, stage: Stage, answer: Any) -> None:
    if stage in ("cpt", "sft"):
        texts = [_text(message) for message in row.messages if message["role"] == "assistant"]
        if not any(text.strip() for text in texts):
            raise RowError("no answer", "no assistant message says anything to learn from")
    elif not row.prompt():
        raise RowError("malformed messages", "there is no question before the answer")
    if stage == "rl" and row.span is None and row.choices is None:
        without = "an answer without choices cannot be verified" if answer is not None else "nothing to verify it by"
        raise RowError("no answer", f"{without}; give choices and answer, or a span")


def _choices(raw: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, int | None]:
    choices, answer = raw.get("choices"), raw.get("answer")
    if choices is None:
        return None, None
    texts = isinstance(choices, list | tuple) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not texts or len(choices) < 2 or len({choice.strip().casefold() for choice in choices}) < len(choices):
        raise RowError("malformed choices", "choices must be two or more different texts")
    if answer is None:
        raise RowError("no answer", "choices are given, but not which one is right")
    index = _index(answer, choices)
    if index is None:
        raise RowError("answer not among the choices", f"answer is {answer!r}, which names none of {choices!r}")
    return tuple(choices), index


def _index(answer: Any, choices: Sequence[str]) -> int | None:
    """The index that an answer names: itself, a letter from A on, or the text of a choice, in this order."""
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        return None
    if isinstance(answer, int):
        return answer if 0 <= answer < len(choices) else None
    text = answer.strip()
    if len(text) == 1 and text.isascii() and 0 <= (letter := ord(text.upper()) - ord("A")) < len(choices):
        return letter
    same = [index for index, choice in enumerate(choices) if choice.strip().casefold() == text.casefold()]
    return same[0] if same else None


def _span(value: Any) -> Span | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_number, value)):
        raise RowError("malformed span", f"span is {value!r}; it must be [start, end] in seconds")
    start, end = float(value[0]), float(value[1])
    if end <= start:
        raise RowError("span reversed", f"the span ends at {end:g} s, not after its start at {start:g} s")
    if start < 0:
        raise RowError("span outside its clip", f"the span starts at {start:g} s, before its clip")
    return start, end


def _check_inside(span: Span, seconds: float) -> None:
    if span[1] > seconds + SPAN_SLACK or span[0] >= seconds:
        raise RowError(
            "span outside its clip", f"the span is {span[0]:g} to {span[1]:g} s of a clip of {seconds:.1f} s"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _resolve(message: Any, folder: Path) -> Any:
    """The message with its media in the Hugging Face form, paths absolute."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_resolve_part(part, folder) for part in message["content"]]}


def _resolve_part(part: Any, folder: Path) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("image", "video", "image_url", "video_url"):
        return part
    value = part.get(kind)
    if isinstance(value, Mapping):
        value = value.get("url")
    medium = kind.removesuffix("_url")
    times = {key: part[key] for key in ("times", "origin") if key in part}
    if not isinstance(value, str) or value[:5].lower() in ("http:", "https", "data:"):
        return {"type": medium, medium: value, **times}
    if value[:5].lower() == "file:":
        value = url2pathname(unquote(urlsplit(value).path))
    return {"type": medium, medium: str((folder / value).absolute()) if value else value, **times}


def _media(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[Literal["image", "video"], str], ...]:
    """(kind, path) of every file that the messages show; RowError where they are malformed."""
    try:
        _, items = read_messages(messages)
    except PromptError as error:
        raise RowError("malformed messages", str(error).removesuffix(".")) from None
    return tuple((item.kind, str(item.source)) for item in items if isinstance(item.source, Path))


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    calls = "call" if message.get("tool_calls") else ""
    return calls + "".join(part["text"] for part in content or [] if part.get("type") == "text")
