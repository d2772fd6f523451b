"""Bars on stderr for work that is told as (words, done, total)."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Display:
    """A bar on stderr for each thing that is done, while it is done; nothing where stderr is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, words: str, done: int, total: int) -> None:
        """An `on_progress`: what is being done, how much of it is done, and how much there is."""
        if words not in self._tasks:
            self._tasks[words] = self._progress.add_task(words, total=total)
        self._progress.update(self._tasks[words], completed=done)
