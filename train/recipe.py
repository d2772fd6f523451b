"""The recipe of a run: what each stage can be told, with units and ranges. How it is read: `train.recipe_file`.

- A table has the fields of its class and no others.
- `plan` gives the phases of a run with every value filled in; of most stages there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ivcore.training import DECODER_LINEARS, LoraSettings, OptimizerSettings
from train.rewards import RewardKind
from train.row import Stage
from train.schedule import Schedule, Shape
from train.weighting import Weighting

Positive = Annotated[float, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Table(BaseModel):
    """A table of a recipe: no unknown fields, no values of another type, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _check_frames(least: int | None, most: int | None) -> None:
    if least and most and least > most:
        raise ValueError(f"min_frames is {least}, more than max_frames, {most}")


class Data(Table):
    """How rows become batches.

    fps: frames sampled a second. min_frames, max_frames: of a video. frame_tokens: the most that a temporal patch (two
    frames) or an image may cost. Of these four, what is not given is the checkpoint's. max_tokens: of a batch, and so
    of a row. window: rows looked at to fill a batch. mix: how often an epoch shows each data set. cache_gib: gibibytes
    of decoded clips on disk.
    """

    fps: Positive | None = None
    min_frames: Count | None = None
    max_frames: Count | None = None
    frame_tokens: Count | None = None
    max_tokens: Count = 4096
    window: Count = 16
    mix: dict[str, AtLeastZero] | None = None
    cache_gib: AtLeastZero = 10.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_frames(self.min_frames, self.max_frames)
        return self


class LearningRate(Table):
    """peak, and the floor that it falls to; warmup: the share of all steps in which it rises."""

    peak: Positive
    floor: AtLeastZero = 0.0
    warmup: Share = 0.0
    shape: Shape = "cosine"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.floor > self.peak:
            raise ValueError(f"floor is {self.floor:g}, above peak, {self.peak:g}")
        return self

    def schedule(self, steps: int) -> Schedule:
        return Schedule(self.peak, self.floor, round(self.warmup * steps), steps, self.shape)


class Optimizer(Table):
    """AdamW. max_norm: gradients are scaled down to it. multipliers: of the learning rate, by pattern of names."""

    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: AtLeastZero = 0.0
    max_norm: Positive = 1.0
    multipliers: dict[str, AtLeastZero] = {}

    def settings(self) -> OptimizerSettings:
        return OptimizerSettings(self.betas, self.eps, self.weight_decay, tuple(self.multipliers.items()))


class Lora(Table):
    """Low-rank adapters. targets: patterns of the linear layers that get one."""

    rank: Count = 16
    alpha: Positive = 32.0
    dropout: BelowOne = 0.0
    rank_stabilized: bool = False
    targets: tuple[str, ...] = DECODER_LINEARS

    def settings(self) -> LoraSettings:
        return LoraSettings(self.rank, self.alpha, self.dropout, self.rank_stabilized, self.targets)


class Rollout(Table):
    """Sampling from the policy. max_tokens: of an answer. rollouts: answers to one prompt."""

    rollouts: Count = 8
    max_tokens: Count = 512
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class PhaseData(Table):
    """The fields of `Data` that a phase may change."""

    fps: Positive | None = None
    min_frames: Count | None = None
    max_frames: Count | None = None
    frame_tokens: Count | None = None
    max_tokens: Count | None = None
    window: Count | None = None
    mix: dict[str, AtLeastZero] | None = None


class Phase(Table):
    """A part of a run with its own data; what it leaves out is as in the recipe's `data` and `batch`."""

    name: str
    steps: Count
    batch: Count | None = None
    data: PhaseData = PhaseData()


@dataclass(frozen=True)
class ResolvedPhase:
    """A phase with every value filled in."""

    name: str
    steps: Count
    batch: Count
    data: Data


class _Recipe(Table):
    """What all stages have.

    steps: of the optimiser. batch: micro-batches a step, of all processes together; for rl and distill, prompts a step.
    full: train all weights instead of adapters. checkpointing: keep no activations, compute them again. save_every,
    evaluate_every: steps; 0 is only at the end, or never. keep: checkpoints that stay.
    """

    seed: int = Field(0, ge=0)
    steps: Count
    batch: Count = 1
    full: bool = False
    checkpointing: bool = True
    save_every: int = Field(100, ge=0)
    evaluate_every: int = Field(0, ge=0)
    keep: Count = 2
    data: Data = Data()
    learning_rate: LearningRate
    optimizer: Optimizer = Optimizer()
    lora: Lora = Lora()

    def plan(self) -> tuple[ResolvedPhase, ...]:
        """The phases of the run, in order; of most stages the only one."""
        return (ResolvedPhase(name="all", steps=self.steps, batch=self.batch, data=self.data),)


class CptRecipe(_Recipe):
    """Continued pretraining: next-token loss on the assistant's tokens."""

    stage: Literal["cpt"]
    weighting: Weighting = "square"


class SftRecipe(_Recipe):
    """Supervised fine-tuning, with phases where it has a curriculum; `steps` is then their sum."""

    stage: Literal["sft"]
    weighting: Weighting = "square"
    phases: tuple[Phase, ...] = ()

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.phases and (total := sum(phase.steps for phase in self.phases)) != self.steps:
            raise ValueError(f"steps is {self.steps}, but the phases have {total}; leave steps out")
        for phase in self.plan():
            try:
                _check_frames(phase.data.min_frames, phase.data.max_frames)
            except ValueError as error:
                raise ValueError(f"phase {phase.name!r}: {error}") from None
        return self

    def plan(self) -> tuple[ResolvedPhase, ...]:
        if not self.phases:
            return super().plan()
        return tuple(
            ResolvedPhase(
                name=phase.name,
                steps=phase.steps,
                batch=phase.batch or self.batch,
                data=self.data.model_copy(update=phase.data.model_dump(exclude_none=True)),
            )
            for phase in self.phases
        )


class Rewards(Table):
    """weights: of the kinds of reward. form: the regular expression of a whole answer, for the kind "format"."""

    weights: dict[RewardKind, AtLeastZero] = {"choice": 1.0, "iou": 1.0}
    form: str = ""

    @model_validator(mode="after")
    def _form_is_valid(self) -> Self:
        try:
            re.compile(self.form)
        except re.error as error:
            raise ValueError(f"form is no regular expression ({error})") from None
        if self.weights.get("format") and not self.form:
            raise ValueError("the reward format has a weight, so form must say which form answers have")
        return self


class RlRecipe(_Recipe):
    """Group-relative policy optimisation on verifiable rewards.

    environment: what a rollout is, one answer to a prompt or a whole run of the agent. updates: optimiser steps on the
    rollouts of one step. clip_low, clip_high: how far the ratio of probabilities may fall and rise. kl_weight: of the
    penalty for leaving the start. scale_by_std: divide advantages by the group's standard deviation. overlong_buffer:
    tokens before the most in which a reward is lowered, by up to 1. mask_cut_off: leave out rollouts that reached the
    most.
    """

    stage: Literal["rl"]
    environment: Literal["answer", "acting"] = "answer"
    rollout: Rollout = Rollout()
    rewards: Rewards = Rewards()
    updates: Count = 1
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.28
    kl_weight: AtLeastZero = 0.0
    scale_by_std: bool = False
    overlong_buffer: int = Field(0, ge=0)
    mask_cut_off: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rollout.rollouts < 2:
            raise ValueError("rollout.rollouts is 1, but an advantage compares the rollouts of a group: use 2 or more")
        if self.overlong_buffer > self.rollout.max_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}, more than rollout.max_tokens, {self.rollout.max_tokens}"
            )
        return self


class Teacher(Table):
    """Who scores the student's tokens: a checkpoint, "" for the student's own base; and what it sees of a video.

    by_dataset: who does instead for the rows of a data set. What is not given of fps, max_frames and frame_tokens is as
    the student sees it.
    """

    model: str = ""
    by_dataset: dict[str, str] = {}
    fps: Positive | None = None
    max_frames: Count | None = None
    frame_tokens: Count | None = None


class DistillRecipe(_Recipe):
    """On-policy distillation: reverse KL to a teacher on the student's own tokens.

    vocabulary: the teacher scores all of it, or the sampled tokens alone. forward_share: of forward KL in the loss.
    """

    stage: Literal["distill"]
    rollout: Rollout = Rollout(rollouts=1)
    teacher: Teacher = Teacher()
    vocabulary: Literal["full", "sampled"] = "full"
    forward_share: Share = 0.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.forward_share and self.vocabulary == "sampled":
            raise ValueError('forward_share needs the whole vocabulary: set vocabulary = "full"')
        return self


Recipe = CptRecipe | SftRecipe | RlRecipe | DistillRecipe
STAGES: Mapping[Stage, type[Recipe]] = {"cpt": CptRecipe, "sft": SftRecipe, "rl": RlRecipe, "distill": DistillRecipe}
