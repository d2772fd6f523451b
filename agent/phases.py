"""Seconds and bytes of each phase of a job, with a progress display on a terminal and silence in a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

WORDS = {
    "decode": "decoding frames",
    "load": "loading weights",
    "encode": "encoding frames (tokens)",
    "prefill": "reading the prompt (tokens)",
}


@dataclass
class Phase:
    seconds: float = 0.0
    bytes: int = 0


@dataclass
class Phases:
    """`mark` counts the time since the last mark as the named phase's; use as a context manager for the display.

    console: stderr. The display is shown only when stderr is a terminal.
    """

    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    spent: dict[str, Phase] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)
    _progress: Progress | None = None
    _tasks: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_display()

    def close_display(self) -> None:
        """Take the bars away, so that an answer can stream to the terminal."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def start(self, phase: str) -> None:
        """What follows is `phase`'s."""
        self._last = time.perf_counter()
        self.spent.setdefault(phase, Phase())
        self._show(phase, 0, None)

    def mark(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` steps of a phase are through; also the `on_progress` of decoding and of the model."""
        self._count(phase)
        self._show(phase, done, total)

    def on_frames(self, done: int, total: int) -> None:
        """`on_progress` of a decoder, which has only one phase."""
        self.mark("decode", done, total)

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Count a block as one phase."""
        self.start(name)
        yield self.spent[name]
        self._count(name)

    def say(self, text: str) -> None:
        """A line for the person at the terminal; nothing in a pipe."""
        if self.console.is_terminal:
            self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def _count(self, phase: str) -> None:
        now = time.perf_counter()
        self.spent.setdefault(phase, Phase()).seconds += now - self._last
        self._last = now

    def _show(self, phase: str, done: int, total: int | None) -> None:
        if self._progress is None or phase not in WORDS:
            return
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(WORDS[phase], total=total)
        self._progress.update(self._tasks[phase], completed=done, total=total)
