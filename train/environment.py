"""Where rl's rollouts come from and what they are worth: one answer to a prompt, or a whole run with tools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ivcore.backend import Model
from ivcore.tokenizer import Tokenizer
from train.advantages import overlong_penalty
from train.processes import ALONE, Processes
from train.recipe import ResolvedPhase, RlRecipe
from train.rewards import Judge
from train.rollouts import Group, Roller
from train.rows import Rows
from train.samples import Sample, SampleBuilder


@dataclass(frozen=True)
class Judged:
    """The rollouts of one row, and what each is worth.

    position: the row's, among all. rewards: float (size,). kinds: their parts by name, of those that have one. answers:
    the tokens that each has sampled, and whether it was cut off. tokens: read and written for all of them. sample: what
    there is to train on of one of them.
    """

    position: int
    rewards: np.ndarray
    kinds: Mapping[str, Sequence[float]]
    answers: Sequence[tuple[int, bool]]
    tokens: int
    sample: Callable[[int], Sample]


class Environment(Protocol):
    """Rolls a step's rows out, of this process's lanes; it goes on from its state with the very same rollouts."""

    def step(self, model: Model) -> list[Judged]: ...
    def epoch(self) -> float: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Setting:
    """What an environment is made with: a phase of a recipe, its rows, and who makes samples of them."""

    recipe: RlRecipe
    phase: ResolvedPhase
    rows: Rows
    builder: SampleBuilder
    tokenizer: Tokenizer
    seed: int
    processes: Processes = ALONE


MakeEnvironment = Callable[[Setting], Environment]


class SingleTurn:
    """One answer to a row's prompt, judged by the row's choices or span."""

    def __init__(self, setting: Setting) -> None:
        self._recipe, self._builder, self._tokenizer = setting.recipe, setting.builder, setting.tokenizer
        self._judge = Judge(setting.recipe.rewards.weights, setting.recipe.rewards.form)
        self._roller = Roller(
            setting.rows,
            setting.phase,
            setting.recipe.rollout,
            lambda row: (setting.builder.prompt(row),),
            setting.seed,
            setting.processes,
        )

    def step(self, model: Model) -> list[Judged]:
        return [self._judged(group) for group in self._roller.step(model)]

    def epoch(self) -> float:
        return self._roller.epoch()

    def state(self) -> dict[str, Any]:
        return self._roller.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._roller.load_state(state)

    def _judged(self, group: Group) -> Judged:
        recipe = self._recipe
        rewards = np.zeros(len(group.answers))
        kinds: defaultdict[str, list[float]] = defaultdict(list)
        for number, answer in enumerate(group.answers):
            score = self._judge(group.row, self._tokenizer.decode(answer.token_ids))
            penalty = overlong_penalty(len(answer), recipe.rollout.max_tokens, recipe.overlong_buffer)
            rewards[number] = score.total + penalty
            for kind, reward in score.rewards.items():
                kinds[kind].append(float(reward.value))

        def sample(number: int) -> Sample:
            return self._builder.rollout(group.row.id, group.prompts[0], group.answers[number].token_ids)

        return Judged(group.position, rewards, kinds, group.lengths, group.tokens, sample)
