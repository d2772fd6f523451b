"""rl: a step is a group of answers to each of its prompts, their rewards, and updates towards the better ones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivcore.backend import BackendName, load
from ivcore.errors import TrainingError
from ivcore.training import Batch, Policy
from train.advantages import counted_rollouts, group_advantages
from train.environment import Environment, Judged
from train.processes import ALONE, Processes, agreed, by_lane, summed
from train.recipe import ResolvedPhase, RlRecipe
from train.rollouts import answer_metrics, at_places, named_rows, packs
from train.samples import Sample
from train.trainer import Score, Trainer, Update, accumulate_all, frozen_score


class PolicyStage:
    """Group-relative policy optimisation, step by step.

    environment: where the rollouts come from. reference: gives the log-probabilities of the model that `kl_weight`
    holds the policy to; None where it is 0.
    """

    def __init__(
        self,
        recipe: RlRecipe,
        phase: ResolvedPhase,
        environment: Environment,
        reference: Score | None,
        processes: Processes = ALONE,
    ) -> None:
        self._processes, self._environment = processes, environment
        self._recipe, self._budget, self._reference = recipe, phase.data.max_tokens, reference

    def step(self, trainer: Trainer, update: Update) -> dict[str, float]:
        """Roll out, reward, and call `update` as often as the recipe says; not at all where no group has spread.

        Raises TrainingError, naming the rows, for a loss that is not a number.
        """
        processes = self._processes
        with trainer.unsharded():
            with agreed(processes):
                groups = self._last = self._environment.step(trainer.model)
            metrics = self._reward_metrics(groups) | answer_metrics(
                [(group.tokens, group.answers) for group in groups], processes
            )
            rewards = np.array([group.rewards for group in groups])
            advantages = group_advantages(rewards, scale_by_std=self._recipe.scale_by_std)
            cut_off = np.array([[cut_off for _, cut_off in group.answers] for group in groups])
            counted = counted_rollouts(advantages, cut_off, mask_cut_off=self._recipe.mask_cut_off)
            metrics |= {
                "skipped_groups": sum(processes.gather(advantages.skipped)),
                "epoch": self._environment.epoch(),
            }
            places = [(int(group), int(number)) for group, number in np.argwhere(counted)]
            samples = [groups[group].sample(number) for group, number in places]
            total = sum(processes.gather(sum(int(sample.trained.sum()) for sample in samples)))
            if not total:
                return {**metrics, "updates": 0}
            with agreed(processes):
                batches = self._batches(trainer, samples, advantages.values[counted], total)
        sums: defaultdict[str, float] = defaultdict(float)
        for _ in range(self._recipe.updates):
            for found in accumulate_all(trainer, processes, batches):
                for name, value in found.items():
                    sums[name] += value / self._recipe.updates
            with agreed(processes):
                if not math.isfinite(sums["loss"]):
                    raise TrainingError(f"the loss of {self.blame()} is {sums['loss']}")
            update()
        return {**metrics, **summed(processes, sums), "updates": self._recipe.updates}

    def blame(self) -> str:
        """The rows of the last step, for an error that comes after it."""
        return named_rows([group.position for group in self._last])

    def state(self) -> dict[str, Any]:
        return self._environment.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._environment.load_state(state)

    def _reward_metrics(self, groups: Sequence[Judged]) -> dict[str, float]:
        """The means over all answers of all processes, by kind over those that have one of it."""
        found: defaultdict[str, list[float]] = defaultdict(list)
        for kinds in by_lane(self._processes, [dict(group.kinds) for group in groups]):
            for kind, values in kinds.items():
                found[kind] += values
        means = {f"reward_{kind}": float(np.mean(values)) for kind, values in sorted(found.items())}
        rewards = by_lane(self._processes, [group.rewards.tolist() for group in groups])
        return {"reward": float(np.mean(rewards)), **means}

    def _batches(
        self, trainer: Trainer, samples: Sequence[Sample], advantages: np.ndarray, total: int
    ) -> list[tuple[Batch, Policy]]:
        """The step's batches, with the log-probabilities of the policy before its first update; total: of tokens."""
        lengths = np.array([sample.trained.sum() for sample in samples])
        made = []
        for indices, batch in packs(samples, total, self._budget):
            loss = Policy(
                old_logprobs=trainer.logprobs(batch),
                advantages=at_places(batch, np.repeat(advantages[indices], lengths[indices])),
                clip_low=self._recipe.clip_low,
                clip_high=self._recipe.clip_high,
                reference_logprobs=self._reference(batch) if self._reference else None,
                kl_weight=self._recipe.kl_weight,
            )
            made.append((batch, loss))
        return made


def load_reference(
    recipe: RlRecipe, trainer: Trainer, base: Path, backend: BackendName, dtype: str | None
) -> Score | None:
    """How the model that training began from scores a batch, where the policy is held to it: a LoRA is taken off for
    that, and where all weights are trained, `base` is loaded once more."""
    if not recipe.kl_weight:
        return None
    if trainer.lora is not None:
        return trainer.reference_logprobs
    return frozen_score(load(base, backend, dtype), full=False)
