"""distill: a step is answers of the student's own, and teachers, who may see more of the video, score every token.

There may be several, each for the data that it is best at: multi-teacher on-policy distillation, arXiv 2606.30406.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivcore.backend import BackendName, load
from ivcore.errors import TrainingError
from ivcore.hub import resolve
from ivcore.tokenizer import Tokenizer
from ivcore.training import Batch, Distill
from train.order import check_names
from train.packing import first_fit
from train.processes import ALONE, Processes, agreed, summed
from train.recipe import DistillRecipe, ResolvedPhase, Teacher
from train.rollouts import Roller, answer_metrics, at_places, named_rows, packs
from train.rows import Rows
from train.samples import Framing, Sample, SampleBuilder
from train.trainer import Score, Trainer, Update, accumulate_all, frozen_score

HELD_BYTES = 1 << 30
"""Of what the teacher says of the whole vocabulary, how much is held at a time; that of one answer, if it is more."""


@dataclass(frozen=True, eq=False)
class Guide:
    """A teacher at work. builder: makes prompts as it sees them. score: of a batch, the whole vocabulary (K, vocab) or
    the tokens in it (S,), as the recipe's `vocabulary` says.
    """

    builder: SampleBuilder
    score: Score


class DistillStage:
    """On-policy distillation, step by step; guides: by data set, all of the data's."""

    def __init__(
        self,
        recipe: DistillRecipe,
        phase: ResolvedPhase,
        rows: Rows,
        builder: SampleBuilder,
        guides: Mapping[str, Guide],
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._recipe, self._budget, self._builder = recipe, phase.data.max_tokens, builder
        self._guides = guides
        self._roller = Roller(
            rows,
            phase,
            recipe.rollout,
            lambda row: (builder.prompt(row), guides[row.dataset].builder.prompt(row)),
            seed,
            processes,
        )

    def step(self, trainer: Trainer, update: Update) -> dict[str, float]:
        """Roll out, let the teachers score it, and call `update`; the divergence before that.

        Raises TrainingError, naming the rows, for a loss that is not a number.
        """
        processes = self._processes
        with agreed(processes), trainer.unsharded():
            groups = self._last = self._roller.step(trainer.model)
        students, teachers = [], []
        for group in groups:
            (seen, shown), guide = group.prompts, self._guides[group.row.dataset]
            for answer in group.answers:
                students.append(self._builder.rollout(group.row.id, seen, answer.token_ids))
                teachers.append((guide, guide.builder.rollout(group.row.id, shown, answer.token_ids)))
        total = sum(processes.gather(sum(int(sample.trained.sum()) for sample in students)))
        batches = self._batches(students, teachers, total, trainer.model.config.text.vocab_size)
        sums: defaultdict[str, float] = defaultdict(float)
        for found in accumulate_all(trainer, processes, batches):
            for name, value in found.items():
                sums[name] += value
        with agreed(processes):
            if not math.isfinite(sums["loss"]):
                raise TrainingError(f"the loss of {self.blame()} is {sums['loss']}")
        update()
        return {
            **summed(processes, sums),
            **answer_metrics([(group.tokens, group.lengths) for group in groups], processes),
            "epoch": self._roller.epoch(),
        }

    def blame(self) -> str:
        """The rows of the last step, for an error that comes after it."""
        return named_rows([group.position for group in self._last])

    def state(self) -> dict[str, Any]:
        return self._roller.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._roller.load_state(state)

    def _batches(
        self, students: Sequence[Sample], teachers: Sequence[tuple[Guide, Sample]], total: int, vocab_size: int
    ) -> Iterator[tuple[Batch, Distill]]:
        """This process's batches with what teachers say, one by one; total: tokens of all answers of the step."""
        lengths = [int(sample.trained.sum()) for sample in students]
        held = HELD_BYTES // (4 * vocab_size) if self._recipe.vocabulary == "full" else total
        for portion in first_fit(lengths, held):
            for indices, batch in packs([students[index] for index in portion], total, self._budget):
                scores = self._scores([teachers[portion[index]] for index in indices], batch)
                yield batch, Distill(scores, self._recipe.forward_share)

    def _scores(self, samples: Sequence[tuple[Guide, Sample]], batch: Batch) -> np.ndarray:
        """What `Distill` takes for a batch of the student's, from the teachers' samples of the same answers."""
        lengths = [int(sample.trained.sum()) for _, sample in samples]
        found: dict[int, np.ndarray] = {}
        for guide in dict.fromkeys(guide for guide, _ in samples):
            theirs = [index for index, (each, _) in enumerate(samples) if each is guide]
            for places, shown in packs([samples[index][1] for index in theirs], 1, self._budget):
                scores = guide.score(shown)
                if scores.ndim == 1:
                    scores = scores[shown.places]
                indices = [theirs[place] for place in places]
                ends = np.cumsum([lengths[index] for index in indices])[:-1]
                found |= zip(indices, np.split(scores, ends), strict=True)
        joined = np.concatenate([found[index] for index in range(len(samples))])
        return joined if joined.ndim == 2 else at_places(batch, joined)


def teacher_framing(teacher: Teacher, student: Framing) -> Framing:
    """What the teacher sees of a video; it may take as many tokens as its context holds."""
    seen = teacher.model_dump(include={"fps", "max_frames", "frame_tokens"}, exclude_none=True)
    return replace(student, max_tokens=None, **seen)


def check_teachers(teacher: Teacher, datasets: Mapping[str, range]) -> None:
    """Raises an IvError for a data set or a teacher that is not there, before anything is loaded or written."""
    check_names("teacher.by_dataset", teacher.by_dataset, datasets)
    for name in filter(None, (teacher.model, *teacher.by_dataset.values())):
        resolve(name)


def load_guides(
    recipe: DistillRecipe,
    trainer: Trainer,
    base: Path,
    backend: BackendName,
    dtype: str | None,
    datasets: Mapping[str, range],
    builder: Callable[[Tokenizer], SampleBuilder],
) -> dict[str, Guide]:
    """By data set who scores the answers to its rows, each loaded once; `base`: what the student was loaded from, and
    its own teacher with its LoRA taken off.

    Raises TrainingError for a teacher of another vocabulary.
    """
    teacher = recipe.teacher
    named = {name: teacher.by_dataset.get(name, teacher.model) for name in datasets}
    loaded: dict[str, Guide] = {}
    for model in dict.fromkeys(named.values()):
        tokenizer, score = _load(recipe, model, trainer, base, backend, dtype)
        loaded[model] = Guide(builder(tokenizer), score)
    return {name: loaded[model] for name, model in named.items()}


def _load(
    recipe: DistillRecipe, name: str, trainer: Trainer, base: Path, backend: BackendName, dtype: str | None
) -> tuple[Tokenizer, Score]:
    path, full = resolve(name) if name else base, recipe.vocabulary == "full"
    tokenizer = Tokenizer.from_dir(path)
    if not name and trainer.lora is not None:
        return tokenizer, partial(trainer.reference_logprobs, full=full)
    model = load(path, backend, dtype)
    theirs, ours = model.config.text.vocab_size, trainer.model.config.text.vocab_size
    if theirs != ours:
        raise TrainingError(
            f"The teacher {path} has a vocabulary of {theirs:,} tokens, but the student's has {ours:,}; choose a "
            "teacher with the student's tokenizer."
        )
    return tokenizer, frozen_score(model, full=full)
