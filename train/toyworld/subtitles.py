"""A script's lines as a subtitle track, a sidecar .srt, and the transcript of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av

from train.toyworld.score import span_text
from train.toyworld.script import Line

TIME_BASE = Fraction(1, 1000)


def packets(lines: Sequence[Line]) -> Iterator[av.Packet]:
    """The lines as mov_text samples: two bytes of length, then UTF-8 (3GPP TS 26.245, 5.17)."""
    for line in lines:
        text = line.text.encode()
        packet = av.Packet(len(text).to_bytes(2, "big") + text)
        packet.time_base = TIME_BASE
        packet.pts = packet.dts = round(line.span[0] / TIME_BASE)
        packet.duration = round((line.span[1] - line.span[0]) / TIME_BASE)
        yield packet


def write_srt(path: str | Path, lines: Sequence[Line]) -> None:
    """Write the lines as a SubRip file."""
    blocks = (
        f"{number}\n{_clock(line.span[0])} --> {_clock(line.span[1])}\n{line.text}\n"
        for number, line in enumerate(lines, 1)
    )
    Path(path).write_text("\n".join(blocks), encoding="utf-8")


def transcript(lines: Sequence[Line]) -> str:
    """The lines as a prompt quotes them, one a row: `0.5 to 2.0: The red circle likes plums.`"""
    return "\n".join(f"{span_text(line.span)}: {line.text}" for line in lines)


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"
