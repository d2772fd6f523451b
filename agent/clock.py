"""Seconds of a video as a person reads them on a player: minutes, seconds, tenths."""

from __future__ import annotations

import math


def clock(seconds: float) -> str:
    """`00:12.0`, from an hour on `1:02:03.4`; rounded as `f"{seconds:.1f}"` rounds, `--:--.-` where it is no number."""
    if not math.isfinite(seconds):
        return "--:--.-"
    tenths = round(abs(round(seconds, 1)) * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes:02}:{rest // 10:02}.{rest % 10}"
    sign = "-" if seconds < 0 and tenths else ""
    return sign + (f"{hours}:{text}" if hours else text)


def span_text(span: tuple[float, float]) -> str:
    """`[00:12.0-00:15.5]`, as answers cite their evidence."""
    return f"[{clock(span[0])}-{clock(span[1])}]"
