"""Rollouts: answers that the model being trained samples itself, several to one prompt.

- A prompt is prefilled once; its rollouts go on from that cache side by side.
- A rollout's seed follows from the run's seed, the step, the prompt's lane and the rollout's number: it does not depend
  on what was sampled before it, on another process, or on where the run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ivcore.backend import Model
from ivcore.errors import TrainingError
from ivcore.inputs import ModelInputs
from ivcore.sampling import Sampling
from ivcore.training import Batch
from train.order import RowStream
from train.packing import first_fit, to_batch
from train.processes import ALONE, Processes, by_lane
from train.recipe import ResolvedPhase, Rollout
from train.row import Row
from train.rows import Rows
from train.samples import Sample
from train.weighting import place_weights

MakePrompts = Callable[[Row], tuple[ModelInputs, ...]]

ATTEMPTS = 100
"""How often an answer that holds a placeholder of media is drawn anew."""


@dataclass(frozen=True)
class Answer:
    """What was sampled, with the token that ended it; cut_off: there is none, the answer was as long as it may be."""

    token_ids: tuple[int, ...]
    cut_off: bool

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Group:
    """The answers to one row. prompts: the one that they were sampled from first; position: the row's, among all."""

    position: int
    row: Row
    prompts: tuple[ModelInputs, ...]
    answers: tuple[Answer, ...]

    @property
    def tokens(self) -> int:
        """Tokens read and written: of the prompt once, and of every answer."""
        return len(self.prompts[0].token_ids) + sum(map(len, self.answers))

    @property
    def lengths(self) -> list[tuple[int, bool]]:
        """Of every answer its tokens, and whether it was cut off."""
        return [(len(answer), answer.cut_off) for answer in self.answers]


class Roller:
    """Draws a step's prompts, one a lane, and rolls them out.

    make_prompts: the prompt of a row, and perhaps others of the same row that its answers are scored after.
    """

    def __init__(
        self,
        rows: Rows,
        phase: ResolvedPhase,
        settings: Rollout,
        make_prompts: MakePrompts,
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._stream = RowStream(
            rows, phase.batch, seed=seed, shares=phase.data.mix, rank=processes.rank, world=processes.world
        )
        self._settings, self._make_prompts, self._seed = settings, make_prompts, seed
        self._steps = 0

    def step(self, model: Model) -> list[Group]:
        """The groups of the next step, of this process's lanes."""
        self._steps += 1
        groups = []
        for lane in self._stream.lanes:
            position, (row, prompts) = self._stream.draw(lane, lambda row: (row, self._make_prompts(row)))
            answers = roll_out(model, prompts[0], self._settings, self._seed, self._steps, lane)
            groups.append(Group(position, row, prompts, answers))
        return groups

    def epoch(self) -> float:
        """How many epochs the lanes of all processes have drawn."""
        return round(sum(self._processes.gather(self._stream.epoch)) / self._processes.world, 6)

    def state(self) -> dict[str, Any]:
        return {**self._stream.state(), "steps": self._steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state(state)
        self._steps = int(state["steps"])


def rollout_seed(*where: int) -> int:
    """What the sampling of one rollout begins with: 128 bits for each run's seed, step, lane, rollout and attempt."""
    words = np.random.SeedSequence(where).generate_state(2, np.uint64)
    return int(words[0]) << 64 | int(words[1])


def roll_out(model: Model, prompt: ModelInputs, settings: Rollout, *where: int) -> tuple[Answer, ...]:
    """The answers to a prompt, each what `generate` gives with its seed; where: what the seeds follow from.

    Raises TrainingError for a model that writes nothing but placeholders of media.
    """
    cache = model.new_cache()
    logits = model.prefill(prompt, cache)
    # In a sample a placeholder stands for a visual token, which no answer can hold, so such an answer is drawn again.
    placeholders = {model.config.image_token_id, model.config.video_token_id}
    answers: dict[int, Answer] = {}
    for attempt in range(ATTEMPTS):
        missing = [number for number in range(settings.rollouts) if number not in answers]
        samplings = [
            Sampling(settings.temperature, top_p=settings.top_p, seed=rollout_seed(*where, number, attempt))
            for number in missing
        ]
        drawn = model.continue_each(logits, cache, samplings, max_tokens=settings.max_tokens)
        for number, token_ids in zip(missing, drawn, strict=True):
            if placeholders.isdisjoint(token_ids):
                answers[number] = Answer(tuple(token_ids), cut_off=token_ids[-1] not in model.stop_ids)
        if len(answers) == settings.rollouts:
            return tuple(answers[number] for number in range(settings.rollouts))
    raise TrainingError(f"{ATTEMPTS} answers in a row held placeholders of images or videos; the model is broken.")


def prompt_budget(max_tokens: int, settings: Rollout) -> int:
    """The most tokens of a prompt that leaves room for its answer in a batch; TrainingError where there is none."""
    if settings.max_tokens >= max_tokens:
        raise TrainingError(
            f"rollout.max_tokens is {settings.max_tokens}, which leaves no room for a prompt in "
            f"data.max_tokens, {max_tokens}; lower the one or raise the other."
        )
    return max_tokens - settings.max_tokens


def packs(samples: Sequence[Sample], total: int, budget: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of rollouts of at most `budget` tokens, and which of the samples each holds, in order.

    total: the tokens of all answers of the step, in all processes; each weighs 1/total. A sample beyond the budget is
    alone. Neighbours that were sampled from one prompt have it in the batch once.
    """
    families, sizes = _families(samples, budget)
    for chosen in first_fit(sizes, budget):
        indices = [index for family in chosen for index in families[family]]
        weights = [place_weights(samples[index].trained, "token") / total for index in indices]
        shared = [len(families[family]) for family in chosen]
        yield indices, to_batch([samples[index] for index in indices], weights, shared)


def _families(samples: Sequence[Sample], budget: int) -> tuple[list[list[int]], list[int]]:
    """Indices of neighbours that share a prompt and a batch, and the tokens that each family of them takes."""
    families: list[list[int]] = []
    sizes: list[int] = []
    for index, sample in enumerate(samples):
        prompt = int(np.argmax(sample.trained))
        more = len(sample) - prompt + 1  # its answer, and the prompt's last token, which all of them have
        if families and _one_prompt(samples[families[-1][0]], sample, prompt) and sizes[-1] + more <= budget:
            families[-1].append(index)
            sizes[-1] += more
        else:
            families.append([index])
            sizes.append(len(sample))
    return families, sizes


def _one_prompt(one: Sample, other: Sample, prompt: int) -> bool:
    """Whether both begin with the same `prompt` tokens and media, and are trained on what follows."""
    return (
        prompt > 1
        and int(np.argmax(one.trained)) == prompt
        and one.pixels is other.pixels
        and np.array_equal(one.token_ids[:prompt], other.token_ids[:prompt])
    )


def at_places(batch: Batch, values: np.ndarray) -> np.ndarray:
    """float32 (S,) from values (K,) of the places with a weight; 0 elsewhere."""
    out = np.zeros(len(batch.token_ids), np.float32)
    out[batch.places] = values
    return out


def answer_metrics(
    groups: Sequence[tuple[int, Sequence[tuple[int, bool]]]], processes: Processes = ALONE
) -> dict[str, float]:
    """What was sampled, by all processes: prompts, tokens, the mean and the largest length of answers, and the share of
    those cut off. groups: of each the tokens read and written, and its answers' lengths and whether they were cut off.
    """
    everywhere = by_lane(processes, list(groups))
    answers = [answer for _, said in everywhere for answer in said]
    return {
        "rows": len(everywhere),
        "tokens": sum(tokens for tokens, _ in everywhere),
        "answer_tokens": float(np.mean([length for length, _ in answers])),
        "longest_answer": max(length for length, _ in answers),
        "cut_off": float(np.mean([cut_off for _, cut_off in answers])),
    }


def named_rows(positions: Sequence[int]) -> str:
    """The rows of a step, for an error: "rows 3, 17"."""
    return f"{'rows' if len(positions) > 1 else 'row'} {', '.join(map(str, positions))}"
