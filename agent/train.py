"""`iv3 train`: a stage from the command line, with a line of progress; the work is done in `train`."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ivcore.errors import TrainingError
from train.environment import MakeEnvironment, SingleTurn
from train.loop import Job
from train.loop import train as run_stage
from train.processes import is_first
from train.recipe import Recipe, RlRecipe
from train.recipe_file import read_recipe
from train.tensorboard import TensorBoard

SMOOTHED = 20
"""Steps whose mean loss is shown."""


def train(
    stage: str, recipe: str, model: str, data: str, out: str, *, backend: str, dtype: str | None,
    overrides: list[str], resume: bool, held_out: str | None = None, tensorboard: bool = False,
) -> None:  # fmt: skip
    """Run a stage to its end, with progress on stderr; prints where the result is.

    Of several processes only the first says anything.
    """
    known = read_recipe(recipe, overrides, stage=stage)  # type: ignore[arg-type]
    job = Job(
        known, model, data, Path(out), backend, dtype, held_out=held_out, environment=_environment(known)  # type: ignore[arg-type]
    )  # fmt: skip
    if job.recipe.evaluate_every and held_out is None and is_first():
        _say(f"evaluate_every is {job.recipe.evaluate_every}, but without --held-out FILE nothing is evaluated.")
    events = TensorBoard(job.out) if tensorboard else None
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn(stage), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[say]}"), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not (console.is_terminal and is_first())) as display:
        task = display.add_task(stage, total=None, say="loading")
        losses: deque[float] = deque(maxlen=SMOOTHED)

        def show(step: int, steps: int, metrics: Mapping[str, Any]) -> None:
            if (loss := metrics.get("loss")) is not None:  # rl has none where no answer was better than the others
                losses.append(loss)
            mean = sum(losses) / max(len(losses), 1)
            say = f"loss {mean:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s"
            display.update(task, completed=step, total=steps, say=say)
            nonlocal events
            try:
                if events:
                    events.add(step, metrics)
            except TrainingError as error:  # a picture of the run, which goes on without
                events = None
                _say(f"{error} TensorBoard shows nothing from step {step} on.")

        folder = run_stage(job, resume=resume, on_progress=show)
    if not is_first():
        return
    rejected = folder.path / "rejected.jsonl"
    if rejected.exists() and (count := len(rejected.read_text(encoding="utf-8").splitlines())):
        _say(f"{count} rows could not be used; {rejected} says which and why.")
    result = next(name for name in ("adapter", "model") if (folder.path / name).exists())
    print(f"{folder.path / result}")


def _environment(recipe: Recipe) -> MakeEnvironment:
    if isinstance(recipe, RlRecipe) and recipe.environment == "acting":
        from agent.oracle.environment import Acting

        return Acting
    return SingleTurn


def _say(sentence: str) -> None:
    print(f"iv3: {sentence}", file=sys.stderr)
