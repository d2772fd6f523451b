"""What a run may spend, and which limit it has come to."""

from __future__ import annotations

from dataclasses import dataclass

MISTAKES = 3
"""Calls in a row that could not be run; then the run ends."""


@dataclass(frozen=True)
class Budget:
    """turns: messages of the model. tokens: prefilled and generated, fresh looks included. frames: decoded for looks.
    seconds: wall time. context: tokens that the context may hold before the oldest observations make room."""

    turns: int = 20
    tokens: int | None = None
    frames: int | None = None
    seconds: float | None = None
    context: int | None = None

    def spent(self, *, turns: int, tokens: int, frames: int, seconds: float) -> str | None:
        """The limit that is reached, in words; None while all of them leave room."""
        if turns >= self.turns:
            return f"{self.turns} turns"
        if self.tokens is not None and tokens >= self.tokens:
            return f"{self.tokens:,} tokens"
        if self.frames is not None and frames >= self.frames:
            return f"{self.frames:,} frames"
        if self.seconds is not None and seconds >= self.seconds:
            return f"{self.seconds:g} seconds"
        return None
