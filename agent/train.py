"""`iv3 train`: a stage from the command line, with a line of progress; the work is done in `train`."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ivcore.errors import ConfigError
from train.loop import Job
from train.loop import train as run_stage
from train.recipe import STAGES
from train.recipe_file import read_recipe

SMOOTHED = 20
"""Steps whose mean loss is shown."""


def train(
    stage: str, recipe: str, model: str, data: str, out: str, *, backend: str, dtype: str | None,
    overrides: list[str], resume: bool, held_out: str | None = None,
) -> None:  # fmt: skip
    """Run a stage to its end, with progress on stderr; prints where the result is."""
    if stage not in STAGES:
        raise ConfigError(f"There is no stage {stage!r}; use one of {', '.join(STAGES)}.")
    job = Job(
        read_recipe(recipe, overrides, stage=stage), model, data, Path(out), backend, dtype, held_out=held_out  # type: ignore[arg-type]
    )  # fmt: skip
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn(stage), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[say]}"), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        task = display.add_task(stage, total=None, say="loading")
        losses: deque[float] = deque(maxlen=SMOOTHED)

        def show(step: int, steps: int, metrics: Mapping[str, Any]) -> None:
            losses.append(metrics.get("loss") or 0.0)
            mean = sum(losses) / len(losses)
            say = f"loss {mean:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s"
            display.update(task, completed=step, total=steps, say=say)

        folder = run_stage(job, resume=resume, on_progress=show)
    rejected = folder.path / "rejected.jsonl"
    if rejected.exists() and (count := len(rejected.read_text(encoding="utf-8").splitlines())):
        print(f"iv3: {count} rows could not be used; {rejected} says which and why.", file=sys.stderr)
    result = next(name for name in ("adapter", "model") if (folder.path / name).exists())
    print(f"{folder.path / result}")
