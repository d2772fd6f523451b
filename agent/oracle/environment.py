"""rl on whole runs: the policy acts, and a run is worth something if its answer is right and shown by its evidence.

A row asks about a video, as one for `ask` does: {"type": "video"}, the question, `choices` with the right `answer`
where there are any, and as `span` where the answer is to be seen; for a question of when that is the answer itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agent.answering import offered
from agent.budget import Budget
from agent.entries import Call, Entry, Reasoning, Result
from agent.loop import Loop
from agent.workspace import Workspace
from ivcore.backend import Model
from ivcore.errors import IvError
from ivcore.sampling import Sampling
from train.environment import Judged, Setting
from train.order import RowStream
from train.rewards import choice_reward, parse_span, temporal_iou
from train.rollouts import rollout_seed
from train.row import Row
from train.samples import Sample

PRICE = 0.02
"""Of a call."""

OVERLAP = 0.5
"""What the IoU of evidence, or of an answer that is a span, with the truth must be above."""

MOST_TURNS = 8


class Acting:
    """Runs of the loop, sampled: the environment of rl in which iv3-tiny learns to act."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        processes = setting.processes
        self._stream = RowStream(
            setting.rows, setting.phase.batch, seed=setting.seed, shares=setting.phase.data.mix,
            rank=processes.rank, world=processes.world,
        )  # fmt: skip
        self._steps = 0

    def step(self, model: Model) -> list[Judged]:
        self._steps += 1
        return [self._group(model, lane) for lane in self._stream.lanes]

    def epoch(self) -> float:
        processes = self._setting.processes
        return round(sum(processes.gather(self._stream.epoch)) / processes.world, 6)

    def state(self) -> dict[str, Any]:
        return {**self._stream.state(), "steps": self._steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state(state)
        self._steps = int(state["steps"])

    def _group(self, model: Model, lane: int) -> Judged:
        setting = self._setting
        position, row = self._stream.draw(lane, lambda row: row)
        memo: dict[tuple[Any, ...], Any] = {}  # what a tool finds out is the same for all runs of a step
        runs = [self._run(model, row, memo, self._steps, lane, each) for each in range(setting.recipe.rollout.rollouts)]
        kinds: defaultdict[str, list[float]] = defaultdict(list)
        for run in runs:
            for name, value in parts(row, run.context.entries).items():
                kinds[name].append(value)
        rewards = np.array([worth(row, run.context.entries) for run in runs])
        said = [[each for each in run.context.of(Reasoning)] for run in runs]
        answers = [(sum(each.generated for each in one), _stopped(run)) for one, run in zip(said, runs, strict=True)]
        tokens = sum(run.workspace.spent.prefilled + run.workspace.spent.generated for run in runs)

        def sample(number: int) -> Sample:
            run = runs[number]
            messages = run.context.messages()
            while messages[-1]["role"] != "assistant":
                messages.pop()
            shown = tuple(offered(run.workspace))
            whole = Row(row.id, tuple(messages), (), None, None, None, row.kind, row.dataset, shown)
            return setting.builder.sample(whole)

        return Judged(position, rewards, kinds, answers, tokens, sample)

    def _run(self, model: Model, row: Row, memo: dict[tuple[Any, ...], Any], *where: int) -> Loop:
        how = self._setting.recipe.rollout
        (_, path), *_ = row.media
        workspace = Workspace(Path(path), model, self._setting.tokenizer, memo=memo)
        sampling = Sampling(temperature=how.temperature, top_p=how.top_p, seed=rollout_seed(self._setting.seed, *where))
        budget = Budget(turns=MOST_TURNS, context=self._setting.phase.data.max_tokens)
        loop = Loop(workspace, budget, sampling=sampling, message_tokens=how.max_tokens)
        for _ in loop.ask(_question(row)):
            pass
        return loop


def worth(row: Row, entries: list[Entry]) -> float:
    """The reward of a run: a right answer with evidence that overlaps the truth, less the price of its calls."""
    calls = sum(isinstance(entry, Call) for entry in entries)
    return min(parts(row, entries).values()) - PRICE * calls


def parts(row: Row, entries: list[Entry]) -> dict[str, float]:
    """Whether the answer is right, and whether the evidence shows it; 0 or 1 each."""
    result = next((entry for entry in reversed(entries) if isinstance(entry, Result)), None)
    if result is None or result.stopped is not None:
        return {"right": 0.0, "shown": 0.0}
    if row.choices is not None and row.answer is not None:
        right = choice_reward(result.answer, row.choices, row.answer).value
    else:
        span = parse_span(result.answer)
        right = float(span is not None and row.span is not None and temporal_iou(span, row.span) > OVERLAP)
    if row.span is None:
        return {"right": right, "shown": float(result.status == "not found")}
    best = max((temporal_iou(each.span, row.span) for each in result.evidence), default=0.0)
    return {"right": right, "shown": float(best > OVERLAP)}


def _stopped(run: Loop) -> bool:
    result = next((entry for entry in run.context.of(Result)), None)
    return result is None or result.stopped is not None


def _question(row: Row) -> str:
    content = row.messages[0]["content"]
    parts = [part["text"] for part in content if part["type"] == "text"] if isinstance(content, list) else [content]
    if not row.media or not parts:
        raise IvError(f"row {row.id} asks nothing about a video, so nobody can act on it.")
    return str(parts[-1])
