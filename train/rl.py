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
from ivcore.tokenizer import Tokenizer
from ivcore.training import Batch, Policy
from train.advantages import counted_rollouts, group_advantages, overlong_penalty
from train.recipe import ResolvedPhase, RlRecipe
from train.rewards import Judge
from train.rollouts import Group, Roller, answer_metrics, at_places, named_rows, packs
from train.rows import Rows
from train.samples import Sample, SampleBuilder
from train.trainer import Score, Trainer, Update, frozen_score


class PolicyStage:
    """Group-relative policy optimisation, step by step.

    reference: gives the log-probabilities of the model that `kl_weight` holds the policy to; None where it is 0.
    """

    def __init__(
        self,
        recipe: RlRecipe,
        phase: ResolvedPhase,
        rows: Rows,
        builder: SampleBuilder,
        tokenizer: Tokenizer,
        reference: Score | None,
        seed: int,
    ) -> None:
        self._recipe, self._budget, self._builder = recipe, phase.data.max_tokens, builder
        self._tokenizer, self._reference = tokenizer, reference
        self._judge = Judge(recipe.rewards.weights, recipe.rewards.form)
        self._roller = Roller(rows, phase, recipe.rollout, lambda row: (builder.prompt(row),), seed)

    def step(self, trainer: Trainer, update: Update) -> dict[str, float]:
        """Roll out, reward, and call `update` as often as the recipe says; not at all where no group has spread.

        Raises TrainingError, naming the rows, for a loss that is not a number.
        """
        groups = self._last = self._roller.step(trainer.model)
        rewards, metrics = self._rewards(groups)
        advantages = group_advantages(rewards, scale_by_std=self._recipe.scale_by_std)
        cut_off = np.array([[answer.cut_off for answer in group.answers] for group in groups])
        counted = counted_rollouts(advantages, cut_off, mask_cut_off=self._recipe.mask_cut_off)
        metrics |= answer_metrics(groups) | {
            "skipped_groups": advantages.skipped,
            "epoch": round(self._roller.epoch, 6),
        }
        places = [(int(group), int(number)) for group, number in np.argwhere(counted)]
        if not places:
            return {**metrics, "updates": 0}
        samples = [self._sample(groups[group], number) for group, number in places]
        batches = self._batches(trainer, samples, advantages.values[counted])
        sums: defaultdict[str, float] = defaultdict(float)
        for _ in range(self._recipe.updates):
            for batch, loss in batches:
                for name, value in trainer.accumulate(batch, loss).items():
                    sums[name] += value / self._recipe.updates
            if not math.isfinite(sums["loss"]):
                raise TrainingError(f"the loss of {self.blame()} is {sums['loss']}")
            update()
        return {**metrics, **sums, "updates": self._recipe.updates}

    def blame(self) -> str:
        """The rows of the last step, for an error that comes after it."""
        return named_rows(self._last)

    def state(self) -> dict[str, Any]:
        return self._roller.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._roller.load_state(state)

    def _rewards(self, groups: Sequence[Group]) -> tuple[np.ndarray, dict[str, float]]:
        """(groups, size): the reward of every answer; and the means, by kind over the answers that have one of it."""
        rewards, kinds = np.zeros((len(groups), self._recipe.rollout.rollouts)), defaultdict(list)
        for index, group in enumerate(groups):
            for number, answer in enumerate(group.answers):
                score = self._judge(group.row, self._tokenizer.decode(answer.token_ids))
                penalty = overlong_penalty(len(answer), self._recipe.rollout.max_tokens, self._recipe.overlong_buffer)
                rewards[index, number] = score.total + penalty
                for kind, reward in score.rewards.items():
                    kinds[kind].append(reward.value)
        means = {f"reward_{kind}": float(np.mean(values)) for kind, values in sorted(kinds.items())}
        return rewards, {"reward": float(rewards.mean()), **means}

    def _sample(self, group: Group, number: int) -> Sample:
        return self._builder.rollout(group.row.id, group.prompts[0], group.answers[number].token_ids)

    def _batches(
        self, trainer: Trainer, samples: Sequence[Sample], advantages: np.ndarray
    ) -> list[tuple[Batch, Policy]]:
        """The step's batches, with the log-probabilities of the policy before its first update."""
        lengths = np.array([sample.trained.sum() for sample in samples])
        made = []
        for indices, batch in packs(samples, int(lengths.sum()), self._budget):
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
