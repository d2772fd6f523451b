"""What a library holds and gives back: passages, scenes and notes, each about a span of one video."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from agent.library.errors import LibraryError

Kind = Literal["passage", "scene", "note"]
"""passage: a transcript line or a caption; scene: a stretch between cuts; note: what an agent wrote down in a run."""

KINDS: tuple[Kind, ...] = get_args(Kind)

_CONTENT_HASH = re.compile(r"[0-9a-f]{64}")
_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Entry:
    """What is put into a library: `text` about a span (seconds) of a video, and where it comes from ("asr", "caption").

    vector: float32 (d,), of a clip for instance; None has the text embedded. A text that says nothing needs a vector.
    """

    kind: Kind
    span: tuple[float, float]
    text: str
    source: str
    vector: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LibraryError(f"{self.kind!r} is no kind of record; it is one of {', '.join(KINDS)}.")
        check_span(self.span)
        if self.vector is None and not self.text.strip():
            raise LibraryError(f"A {self.kind} at {self.span[0]:g} s has neither a text nor a vector.")


@dataclass(frozen=True)
class Record:
    """What a search gives: an entry, the video it is about, and who made it.

    video: content hash; path: of the file as last seen; model: whose vector (float32 (d,)) it is; time: Unix seconds;
    score: higher is better, and comparable within one answer only.
    """

    kind: Kind
    video: str
    path: str
    span: tuple[float, float]
    text: str
    source: str
    model: str
    time: float
    score: float
    vector: np.ndarray = field(compare=False, repr=False)


@dataclass(frozen=True)
class Video:
    """What a library holds of one video, made with one model; settings: None where it was not indexed."""

    video: str
    path: str
    model: str
    passages: int
    scenes: int
    notes: int
    settings: Mapping[str, Any] | None
    time: float


def check_span(span: tuple[float, float]) -> None:
    """LibraryError unless 0 <= start <= end, in seconds."""
    start, end = span
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start <= end):
        raise LibraryError(f"{start}-{end} is no span; give seconds with 0 <= start <= end.")


def check_video(video: str) -> None:
    """LibraryError unless this is what `content_hash` gives."""
    if not _CONTENT_HASH.fullmatch(video):
        raise LibraryError(f"{video[:80]!r} is not the content hash of a video, which has 64 hexadecimal digits.")


def clean(text: str) -> str:
    """Text that UTF-8 can hold: half of a surrogate pair, as a wrongly decoded subtitle has it, becomes U+FFFD."""
    return _HALF_OF_A_PAIR.sub("\ufffd", text)
