"""Messages in the Hugging Face and the OpenAI form -> what a chat template takes, and the media they name."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image

from ivcore.errors import PromptError

ROLES = ("system", "user", "assistant", "tool")
_MEDIA_ROLES = ("user", "tool")  # the only ones whose media the Qwen templates print


@dataclass(frozen=True)
class MediaItem:
    """One image or video of a conversation, not opened yet.

    source: a file, the bytes of an image file, a PIL image, or uint8 pixels (H, W, 3) or (N, H, W, 3).
    fps: frames per second of the clip that an array of frames is; None where it was not said. times: seconds of the
        frames to take, without sampling: of a file those on the screen then, of an array all of its frames. origin: the
        second that is shown to the model as 0, so that a part of a video is a clip of its own.
    where: its place in the messages, for errors.
    """

    kind: Literal["image", "video"]
    source: Path | bytes | Image.Image | np.ndarray
    where: str
    fps: float | None = None
    times: tuple[float, ...] | None = None
    origin: float = 0.0

    @property
    def name(self) -> str:
        """What the user would call it."""
        return str(self.source) if isinstance(self.source, Path) else f"the {self.kind} in {self.where}"


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[MediaItem]]:
    """The messages as a chat template takes them, and their media in order of appearance.

    Raises PromptError that names the message when one is malformed, or when the last question has no text.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError("There are no messages; pass a list with at least one user message.")
    clean: list[dict[str, Any]] = []
    media: list[MediaItem] = []
    question = None
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise PromptError(f"{where} is a {type(message).__name__}; a message is an object with role and content.")
        role = message.get("role")
        if role not in ROLES:
            raise PromptError(f"{where}.role is {role!r}; use one of {', '.join(ROLES)}.")
        if role == "system" and index:
            raise PromptError(f"{where} is a system message, which may only come first.")
        content, items = _content(message, role, where)
        clean.append({**message, "content": content})
        media += items
        if role == "user":
            question = content
    if question is None:
        raise PromptError("There is no user message; ask a question.")
    texts = [question] if isinstance(question, str) else [part.get("text", "") for part in question]
    if not any(text.strip() for text in texts):
        raise PromptError("The question is empty; the last user message needs some text.")
    return clean, media


def _content(message: Mapping[str, Any], role: str, where: str) -> tuple[str | list[dict[str, str]], list[MediaItem]]:
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None:
        _check_calls(calls, where)
    if content is None and role == "assistant" and calls:
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list | tuple):
        raise PromptError(f"{where}.content is {_shown(content)}; it must be a text or a list of parts.")
    parts: list[dict[str, str]] = []
    media: list[MediaItem] = []
    for index, part in enumerate(content):
        place = f"{where}.content[{index}]"
        if not isinstance(part, Mapping):
            raise PromptError(f"{place} is {_shown(part)}; a part is an object with a type.")
        if part.get("type") == "text":
            if not isinstance(part.get("text"), str):
                raise PromptError(f"{place}.text is {_shown(part.get('text'))}; it must be a text.")
            parts.append({"type": "text", "text": part["text"]})
            continue
        item = _media(part, place)
        if role not in _MEDIA_ROLES:
            raise PromptError(f"{place}: a {role} message shows no media; put the {item.kind} into a user message.")
        parts.append({"type": item.kind, item.kind: ""})
        media.append(item)
    return parts, media


def _check_calls(calls: Any, where: str) -> None:
    valid = isinstance(calls, list | tuple) and all(
        isinstance(call, Mapping)
        and isinstance(function := call.get("function", call), Mapping)
        and isinstance(function.get("name"), str)
        and "arguments" in function
        for call in calls
    )
    if not valid:
        raise PromptError(f"{where}.tool_calls must be a list of functions, each with a name and arguments.")


def _media(part: Mapping[str, Any], where: str) -> MediaItem:
    kind = part.get("type")
    if kind not in ("image", "video", "image_url", "video_url"):
        raise PromptError(f"{where}.type is {kind!r}; use text, image, video, image_url or video_url.")
    if part.get(kind) is None:
        raise PromptError(f"{where} is of type {kind} but has no {kind!r}.")
    value, fps, times = part[kind], part.get("fps"), part.get("times")
    if kind.endswith("_url") and isinstance(value, Mapping):
        value = value.get("url")
    medium: Literal["image", "video"] = "image" if kind.startswith("image") else "video"
    source = _text_source(value, medium, where) if isinstance(value, str) else value
    if isinstance(source, np.ndarray):
        _check_pixels(source, medium, where)
    elif not isinstance(source, Path | bytes | Image.Image) or (medium == "video" and isinstance(source, Image.Image)):
        raise PromptError(f"{where}.{kind} is {_shown(value)}; give a file or a uint8 array of pixels.")
    if fps is not None:
        if medium == "image" or not isinstance(source, np.ndarray):
            raise PromptError(f"{where}.fps is only for arrays of frames; a file knows its own frame rate.")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
            raise PromptError(f"{where}.fps is {_shown(fps)}; it must be a number above 0.")
    if times is not None:
        times = _checked_times(times, source, f"{where}.times")
    origin = part.get("origin", 0.0)
    if not _is_seconds(origin) or (origin and times is None):
        raise PromptError(f"{where}.origin is {_shown(origin)}; it must be a number of seconds, beside times.")
    return MediaItem(medium, source, where, fps, times, float(origin))


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _checked_times(times: Any, source: Any, where: str) -> tuple[float, ...]:
    frames = len(source) if isinstance(source, np.ndarray) and source.ndim == 4 else None
    if frames is None and not isinstance(source, Path):
        raise PromptError(f"{where} is only for videos.")
    try:
        seconds = np.asarray(times, np.float64)
    except (TypeError, ValueError):
        seconds = np.array(())
    counted = seconds.ndim == 1 and len(seconds) and (frames is None or len(seconds) == frames)
    if not counted or not np.isfinite(seconds).all() or (np.diff(seconds) < 0).any() or seconds[0] < 0:
        what = "numbers of seconds" if frames is None else f"one number of seconds for each of the {frames} frames"
        raise PromptError(f"{where} must be {what}, ascending.")
    return tuple(seconds.tolist())


def _text_source(text: str, medium: str, where: str) -> Path | bytes:
    scheme = text[:8].partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise PromptError(f"{where} is the address {text[:80]!r}; nothing is fetched from the network, so give a file.")
    if scheme == "data":
        head, comma, data = text.partition(",")
        if medium != "image" or not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise PromptError(f"{where} is a data URL; only images are taken so, as data:image/...;base64,...")
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise PromptError(f"{where} is a data URL whose content is not valid base64.") from None
    if scheme == "file":
        return Path(url2pathname(unquote(urlsplit(text).path)))
    if not text:
        raise PromptError(f"{where} names no file.")
    return Path(text)


def _check_pixels(pixels: np.ndarray, medium: str, where: str) -> None:
    form, axes = ("(H, W, 3)", 3) if medium == "image" else ("(N, H, W, 3)", 4)
    if pixels.dtype != np.uint8 or pixels.ndim != axes or pixels.shape[-1] != 3 or not pixels.size:
        raise PromptError(f"{where} is an array {pixels.dtype} {pixels.shape}; it must be uint8 {form}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
