"""What is said in a video, or in a span of it, from the first of three sources that knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from agent.spans import Span
from agent.transcript.cues import Line, Source, Track
from agent.transcript.speech import speech_track
from agent.transcript.subtitles import sidecar_track, stream_track
from ivcore.demux import PacketIndex, read_index
from ivcore.errors import BackendError
from ivcore.media_file import readable_file
from ivcore.video import checked_span


@dataclass(frozen=True)
class Transcript:
    """What is said in a span of a video.

    lines: by time; each overlaps the span, none is cut at its edges. source: where they come from, None where nothing
    has any; origin: the same for a reader. notes: sentences on what was looked for and not found, or left out.
    """

    span: Span
    lines: tuple[Line, ...]
    source: Source | None
    origin: str
    notes: tuple[str, ...]


def transcript(
    video: str | Path,
    span: Span | None = None,
    *,
    speech_model: str | Path | None = None,
    language: str | None = None,
    on_progress: Callable[[float, float], None] | None = None,
) -> Transcript:
    """What is said in a video, or from span[0] to span[1] (seconds).

    The video's own subtitle streams come first, then .srt and .vtt files beside it, then, given a model, speech
    recognition of the span. The first source with any text in the video is the one that answers, also where it has
    nothing in the span. speech_model: a folder or an id of a Whisper model; language: the one spoken, None to detect
    it; on_progress: called with (seconds recognised, seconds in all).
    Raises MediaError if the file is no video or the span is not in it, CheckpointError for a model that cannot be
    loaded, BackendError where chardet is needed for a subtitle's encoding and missing.
    """
    path = readable_file(video)
    status = path.stat()
    index, embedded = _embedded(path, status.st_mtime_ns, status.st_size)
    span = checked_span(span, index.seconds, path)
    notes = list(embedded.notes)
    if embedded.lines:
        return _answer(embedded, span, notes)
    beside = sidecar_track(path, index.seconds)
    notes += beside.notes
    if beside.lines:
        return _answer(beside, span, notes)
    if speech_model is None:
        notes.append("Speech was not recognised: no Whisper model was named.")
        return Transcript(span, (), None, "", tuple(notes))
    try:
        heard = speech_track(path, index, span, speech_model, language=language, on_progress=on_progress)
    except BackendError as error:
        return Transcript(span, (), None, "", (*notes, str(error)))
    return _answer(heard, span, [*notes, *heard.notes])


def _answer(track: Track, span: Span, notes: list[str]) -> Transcript:
    start, end = span
    lines = tuple(line for line in track.lines if line.span[0] < end and line.span[1] > start)
    if track.lines and not lines:
        notes.append(f"Nothing is said from {start:g} to {end:g} s.")
    source = track.lines[0].source if track.lines else None
    return Transcript(span, lines, source, track.origin if track.lines else "", tuple(notes))


@lru_cache(maxsize=8)
def _embedded(path: Path, _modified: int, _size: int) -> tuple[PacketIndex, Track]:
    # Cached, because finding one line in a long film takes reading all of it.
    index = read_index(path)
    return index, stream_track(path, index)
