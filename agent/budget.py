"""What a run may spend, which limit it has come to, and what it has spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from agent.entries import Cost, Entry
from agent.workspace import Workspace

MISTAKES = 3
"""Calls in a row that could not be run; then the run ends."""


@dataclass(frozen=True)
class Budget:
    """Of one question. turns: messages of the model. tokens: prefilled and generated, fresh looks included. frames:
    decoded for looks. seconds: of work, not of waiting for a person. context: tokens that the context may hold before
    the oldest observations make room."""

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


class Meter:
    """What a run has spent in its workspace and how long it has worked, before it was stopped and since."""

    def __init__(self, workspace: Workspace, entries: Sequence[Entry] = ()) -> None:
        """entries: of a run to go on from; those that will be void count, too."""
        self._workspace = workspace
        last = entries[-1] if entries else None
        self._before = last.cost if last else Cost()
        self._at_first = self._here()
        self._last = last.seconds if last else 0.0
        self.start()

    def start(self) -> None:
        """The clock goes on from where it was last read; until now, nobody worked."""
        self._started = time.monotonic() - self._last

    @property
    def seconds(self) -> float:
        """Of work since the run began."""
        self._last = round(time.monotonic() - self._started, 3)
        return self._last

    @property
    def cost(self) -> Cost:
        """Since the run began."""
        return self._before + self._here() - self._at_first

    def _here(self) -> Cost:
        spent = self._workspace.spent
        return Cost(
            prefilled=spent.prefilled, visual=spent.visual, generated=spent.generated, frames=self._workspace.frames
        )
