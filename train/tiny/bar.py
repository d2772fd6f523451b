"""How far a step of `make tiny-base` has come."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Progress on a terminal; elsewhere a line every hundred steps."""

    def __init__(self, name: str) -> None:
        console = Console(stderr=True, highlight=False)
        self._terminal = console.is_terminal
        columns = (
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[say]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self._name, self._display = name, Progress(*columns, console=console, disable=not self._terminal)
        self._task = self._display.add_task(name, total=None, say="")

    def __enter__(self) -> Bar:
        self._display.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._display.stop()

    def __call__(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        loss = metrics.get("loss")
        say = "" if loss is None else f"loss {loss:.3f}"
        self._display.update(self._task, completed=step, total=steps, say=say)
        if not self._terminal and step % 100 == 0:
            print(f"{self._name} {step}/{steps} {say}", file=sys.stderr, flush=True)
