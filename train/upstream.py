"""The annotations that others train with, as the rows of `train.row`.

- Conversations, `{"conversations": [{"from": "human", "value": "<video>\\n..."}, ...], "video": ...}`, of InternVL
  (internvl_chat, chat data format) and LLaVA; and messages whose text says `<VIDEO_CONTEXT>` where a medium goes, of
  InternVideo3_sft (XTuner). A placeholder becomes the medium; the line break after it goes, as `ask` writes none.
- Temporal grounding, `{video: {"duration", "queries", "spans"}}` as InternVideo3_eval's eval_grounding.py reads it, or
  with ActivityNet Captions' words for the same, `sentences` and `timestamps`: one question and answer a query.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.row import RowError

GROUNDING_QUESTION = (
    'When does this happen in the video: "{query}"? Answer with its start and end in seconds, as in 1.5 to 3.0.'
)
GROUNDING_ANSWER = "{start:.1f} to {end:.1f}"  # a tenth of a second, the precision of the times in a prompt
GROUNDING_KIND = "when"

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_TAG = re.compile(r"(<video>|<image>)\n?")
_CONTEXT = re.compile(r"(<VIDEO_CONTEXT>|<IMG_CONTEXT>)\n?")
_VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
_QUERIES = (("queries", "spans"), ("sentences", "timestamps"))


def to_messages(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with its conversations as messages, and media where placeholders stand; RowError where they disagree."""
    messages = raw.get("messages")
    if messages is None and "conversations" in raw:
        return {**raw, "messages": _conversation(raw)}
    if not isinstance(messages, list):
        return raw
    return {**raw, "messages": [_with_contexts(message) for message in messages]}


def _conversation(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = raw["conversations"]
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("value"), str) for turn in turns
    ):
        raise RowError("malformed messages", "conversations must be a list of turns with from and value")
    media: list[Mapping[str, Any]] = [
        {"type": kind, kind: path} for kind in ("image", "video") for path in _paths(raw, kind)
    ]
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get("from")))
        if role is None:
            raise RowError("unknown role", f"from is {turn.get('from')!r}; use human, gpt or system")
        messages.append({"role": role, "content": turn["value"]})
    asked = [message for message in messages if message["role"] == "user"]
    tags = sum(len(_TAG.findall(message["content"])) for message in asked)
    if tags == 0 and asked:
        # As upstream: media that no placeholder asks for stand before the first question.
        asked[0]["content"] = [*media, {"type": "text", "text": asked[0]["content"]}]
        return messages
    _check_count(media, tags)
    for message in asked:
        message["content"] = list(_placed(message["content"], _TAG, media))
    return messages


def _with_contexts(message: Any) -> Any:
    """The message with each of its media where its placeholder stands in the texts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return message
    texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
    contexts = sum(len(_CONTEXT.findall(text)) for text in texts)
    if not contexts:
        return message
    media = [part for part in content if part.get("type") != "text"]
    _check_count(media, contexts)
    return {**message, "content": [part for text in texts for part in _placed(text, _CONTEXT, media)]}


def _check_count(media: Sequence[Any], placeholders: int) -> None:
    if len(media) != placeholders:
        raise RowError("media and placeholders disagree", f"{len(media)} media for {placeholders} placeholders")


def _placed(text: str, placeholder: re.Pattern[str], media: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The parts of a text, its placeholders taken from `media`."""
    for index, piece in enumerate(placeholder.split(text)):  # text, placeholder, text, ..., text
        if index % 2:
            yield _take(media, "video" if "video" in piece.lower() else "image")
        elif piece:
            yield {"type": "text", "text": piece}


def _take(media: list[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    """The next medium of this kind, or just the next one: some rows write <image> for a video."""
    index = next((index for index, medium in enumerate(media) if str(medium["type"]).startswith(kind)), 0)
    return media.pop(index)


def _paths(raw: Mapping[str, Any], kind: str) -> list[str]:
    value = raw.get(kind)
    paths = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise RowError("malformed messages", f"{kind} must be a path or a list of paths")
    return paths


def is_grounding(content: Mapping[str, Any]) -> bool:
    """Whether an object is temporal grounding annotations."""
    return bool(content) and all(
        isinstance(entry, Mapping) and any(queries in entry and spans in entry for queries, spans in _QUERIES)
        for entry in content.values()
    )


def grounding_rows(content: Mapping[str, Any], folder: Path) -> Iterator[Mapping[str, Any] | RowError]:
    """A row for every query of temporal grounding annotations, or what is wrong with it."""
    for video, entry in content.items():
        queries, spans = next((entry[q], entry[s]) for q, s in _QUERIES if q in entry and s in entry)
        if not isinstance(queries, Sequence) or not isinstance(spans, Sequence) or len(queries) != len(spans):
            yield RowError("malformed span", f"{video} has not one span for every query")
            continue
        path = _with_suffix(video, folder)
        for query, span in zip(queries, spans, strict=True):
            if not isinstance(query, str) or not query.strip():
                yield RowError("malformed messages", f"a query of {video} has no text")
                continue
            row = {"span": span, "duration": entry.get("duration"), "kind": GROUNDING_KIND}
            yield {**row, "messages": _grounding_messages(path, query.strip(), span)}


def _grounding_messages(path: str, query: str, span: Any) -> list[dict[str, Any]]:
    question = [{"type": "video", "video": path}, {"type": "text", "text": GROUNDING_QUESTION.format(query=query)}]
    try:
        answer = GROUNDING_ANSWER.format(start=span[0], end=span[1])
    except (TypeError, ValueError, IndexError, KeyError):
        answer = ""  # `parse_row` says what is wrong with the span
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_suffix(video: str, folder: Path) -> str:
    """A video's file; annotations often name it without its suffix."""
    if video.lower().endswith(_VIDEO_SUFFIXES):
        return video
    found = (suffix for suffix in _VIDEO_SUFFIXES if (folder / f"{video}{suffix}").is_file())
    return video + next(found, _VIDEO_SUFFIXES[0])
