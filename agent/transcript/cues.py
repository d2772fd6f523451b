"""Cues of SubRip and WebVTT files, and cues of any origin as lines of plain text.

- Text is data: markup, control characters and invisible characters go, everything else stays as it is written.
- A cue that cannot be read is left out and counted.
- Cues are parsed here and not by a library: FFmpeg's SubRip decoder takes "<tool_call>" and "a < b and c > d" for
  markup, pysubs2 reads WebVTT's comments and styles, and broken cues, into the text of the cue before them.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.spans import Span

Source = Literal["stream", "sidecar", "speech"]
Markup = Literal["srt", "vtt", "ass", "none"]

MAX_CUE_CHARACTERS = 2000

_CLOCK = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_TIMING = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}(?!\d)")
# What was meant to be a timing: two times with some arrow between them, however they are written.
_ARROW = re.compile(r"\s*[-+]?\d[\d:.,;]*\s*(?:-{1,4}>?|=>|[–—→]>?)\s*[-+]?\d+:")
_TIMING_CHARACTERS = 100  # further into a line no timing is looked for

_TAG = re.compile(r"</?(?:[bius]|em|strong|font|span|c|v|lang|ruby|rt)(?:[.\s][^<>]*)?/?>", re.I)
_KARAOKE = re.compile(r"<(?:\d+:)?\d+:\d+\.\d+>")  # WebVTT's times within a text
_BREAK = re.compile(r"<br\s*/?>", re.I)
_OVERRIDE = re.compile(r"\{\\[^{}]*\}")  # {\an8}, which SubRip files use as well
_ASS_BRACES = re.compile(r"\{[^{}]*\}")
_ASS_DRAWING = re.compile(r"\{[^{}]*\\p[1-9][^{}]*\}")
_ASS_SPACE = re.compile(r"\\[Nnh]")
# Embeddings, overrides and isolates of direction, invisible operators, byte order marks, and the tag characters, which
# can hide a text in another. Joiners and marks of direction stay; emoji, Persian and Hindi are written with them.
_INVISIBLE = re.compile("[\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]")


@dataclass(frozen=True)
class Line:
    """What is said from span[0] to span[1], in seconds as ivcore.video counts them."""

    span: Span
    text: str
    source: Source


@dataclass(frozen=True)
class Track:
    """Lines by time. origin: what they were read from; notes: sentences on what was not found or was left out."""

    lines: tuple[Line, ...]
    origin: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Cue:
    """A text with its markup, from `start` to `end` in seconds; end: None where it lasts until the next cue."""

    start: float
    end: float | None
    text: str


def plain(text: str, markup: Markup = "none") -> str:
    """`text` on one line, without its markup and without characters that cannot be seen or that move the cursor."""
    if markup == "ass":
        text = "" if _ASS_DRAWING.search(text) else _ASS_SPACE.sub(" ", _ASS_BRACES.sub("", text))
    elif markup != "none":
        text = _TAG.sub("", _BREAK.sub(" ", _OVERRIDE.sub("", text)))
    if markup == "vtt":
        text = html.unescape(_KARAOKE.sub("", text))
    text = _INVISIBLE.sub("", text)
    text = "".join(character for character in text if character.isspace() or unicodedata.category(character) != "Cc")
    # Line ends become spaces: a line of a transcript stays one line, whatever a subtitle says.
    return " ".join(text.split())


def parse(text: str, markup: Markup) -> tuple[list[Cue], int]:
    """The cues of a SubRip ("srt") or WebVTT ("vtt") file, in its order, and the number of those that are broken.

    Blank lines part blocks. A block without a timing goes on with SubRip's cue before it; in WebVTT it is a comment.
    """
    cues: list[Cue] = []
    broken = 0
    open_cue = False  # whether text that follows belongs to the last cue
    for block in _blocks(text):
        for timing, body in _pieces(block):
            if timing:
                fields = timing.groups()
                cues.append(Cue(_seconds(fields[:4]), _seconds(fields[4:]), ""))
                open_cue = True
            spoilt = _spoilt(body, alone=timing is None)
            if spoilt is not None:
                broken, body = broken + 1, _without_number(body[:spoilt])
            if open_cue and (timing or markup == "srt"):
                # Markup may take some of it, so more is kept here than in the end.
                whole = "\n".join([cues[-1].text, *body])[: 4 * MAX_CUE_CHARACTERS]
                cues[-1] = Cue(cues[-1].start, cues[-1].end, whole)
            open_cue = open_cue and spoilt is None
    return cues, broken


def lines_of(
    cues: Sequence[Cue], broken: int, markup: Markup, source: Source, seconds: float, name: str
) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """The cues as lines within a video of that many seconds, by time and each once, and what is to be said of the rest.

    broken: how many cues could not be parsed; those that end before they begin, or before 0, are counted with them.
    """
    cues = sorted(cues, key=lambda cue: cue.start)
    found: dict[Line, None] = {}  # in order, without doubles
    late = shortened = 0
    for number, cue in enumerate(cues):
        end = cue.end
        if end is None:
            end = next((other.start for other in cues[number + 1 :] if other.start > cue.start), seconds)
        if cue.start >= seconds:
            late += 1
            continue
        if not (end > cue.start and end > 0):
            broken += 1
            continue
        text = plain(cue.text, markup)
        if len(text) > MAX_CUE_CHARACTERS:
            shortened += 1
            text = text[: MAX_CUE_CHARACTERS - 1] + "…"
        if text:
            found[Line((max(cue.start, 0.0), min(end, seconds)), text, source)] = None
    counts = (
        (broken, "that cannot be read, left out"),
        (late, f"after the end of the video ({seconds:.1f} s), left out"),
        (shortened, f"of more than {MAX_CUE_CHARACTERS} characters, cut off"),
    )
    notes = [f"{name} has {count} cue{'s' * (count > 1)} {what}." for count, what in counts if count]
    if not found:
        notes.append(f"{name} has no text within the video.")
    return tuple(sorted(found, key=lambda line: line.span)), tuple(notes)


def _blocks(text: str) -> Iterator[list[str]]:
    block: list[str] = []
    for line in re.split(r"\r\n|\r|\n", text):
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _pieces(block: list[str]) -> Iterator[tuple[re.Match[str] | None, list[str]]]:
    """A block's timings with the lines that follow each; first, with None, the lines before the first timing."""
    timing: re.Match[str] | None = None
    body: list[str] = []
    for line in block:
        following = _TIMING.match(line[:_TIMING_CHARACTERS])
        if following is None:
            body.append(line)
            continue
        body = _without_number(body)
        if timing or body:
            yield timing, body
        timing, body = following, []
    yield timing, body


def _without_number(lines: list[str]) -> list[str]:
    """The lines before a timing, less the cue's number."""
    return lines[:-1] if lines and lines[-1].strip().isdecimal() else lines


def _spoilt(lines: list[str], *, alone: bool) -> int | None:
    """Where in the lines a cue begins whose timing cannot be read, if one does; alone: they follow no timing."""
    for row, line in enumerate(lines):
        head = line[:_TIMING_CHARACTERS]
        if _ARROW.match(head) or (alone and row < 2 and "-->" in head):
            return row
    return 0 if alone and len(lines) > 1 and lines[0].strip().isdecimal() else None


def _seconds(fields: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = (field or "0" for field in fields)
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000
