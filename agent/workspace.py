"""What tools work with: one video, and the model that looks at it in contexts of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.session import Session, Spent
from agent.spans import Span
from ivcore.backend import Model
from ivcore.errors import IvError, MediaError
from ivcore.media import Mode
from ivcore.tokenizer import Tokenizer
from ivcore.video import Clip, decode, probe

if TYPE_CHECKING:
    from agent.library import Collection


class BudgetReached(IvError):
    """A look that a budget has no room for."""


@dataclass
class Workspace:
    """spent: what fresh looks cost, together. notes: where `note` writes and `recall` and `search` read, None for
    nowhere. speech_model, language: for speech recognition, see agent.transcript. frame_tokens: the most tokens of a
    pair of frames, None for what the checkpoint says. frames: that were decoded so far. most_fps, most_frames: of any
    one look, whatever a tool asks for.
    memo: what a tool has found out, by all that it follows from; runs about one video may share it. limit: asked before
    every look for what a budget has come to; None while there is room.
    """

    video: Path
    model: Model
    tokenizer: Tokenizer
    spent: Spent = field(default_factory=Spent)
    notes: Collection | None = None
    content: str = ""
    speech_model: str | None = None
    language: str | None = None
    frame_tokens: int | None = None
    frames: int = 0
    most_fps: float | None = None
    most_frames: int | None = None
    memo: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    limit: Callable[[], str | None] | None = None

    @property
    def duration(self) -> float:
        """Seconds; MediaError if the video is not there any more."""
        return probe(self.video).duration

    def look(self, span: Span, *, fps: float, most: int, keyframes: bool = False) -> Clip:
        """Frames of a span, at most so many, counted. BudgetReached where there is no room for more."""
        if self.limit is not None and (reached := self.limit()) is not None:
            raise BudgetReached(f"stopped before it was done, at {reached}.")
        if not self.video.exists():
            raise MediaError(f"{self.video} is not there any more; put it back, and look again.")
        mode: Mode = "keyframes" if keyframes else "uniform"
        fps, most = min(fps, self.most_fps or fps), min(most, self.most_frames or most)
        clip = decode(self.video, fps=fps, min_frames=min(2, most), max_frames=most, span=span, mode=mode)
        self.frames += len(clip.timestamps)
        return clip

    def fresh(self) -> Session:
        """A context that has seen nothing; what it costs is counted in `spent`."""
        return Session(self.model, self.tokenizer, spent=self.spent, frame_tokens=self.frame_tokens)

    def asked(self, clip: Clip | None, question: str, *, quoted: Sequence[str] = (), origin: float = 0.0) -> Session:
        """A fresh context that has read frames, lines and a question; origin: the second that is shown as 0."""
        session = self.fresh()
        session.read([{"role": "user", "content": question_parts(clip, question, quoted, origin)}])
        return session


def question_parts(
    clip: Clip | None, question: str, quoted: Sequence[str] = (), origin: float = 0.0
) -> list[dict[str, Any]]:
    """Frames, subtitles and a question as the content of a message."""
    parts = [] if clip is None else [{**video_part(clip.frames, clip.timestamps), "origin": origin}]
    text = f"Subtitles:\n{chr(10).join(quoted)}\n\n{question}" if quoted else question
    return [*parts, {"type": "text", "text": text}]


def video_part(frames: np.ndarray, times: Sequence[float]) -> dict[str, Any]:
    """Frames with their own times as a part of a message."""
    return {"type": "video", "video": frames, "times": list(times)}
