"""Samples -> batches within a token budget, no row split and none wasted.

- Each lane of a step (see `train.order`) keeps a window of rows it has drawn. A pack is the oldest of them and then, in
  order, each that still fits: first fit, with nothing left waiting for ever.
- A step is planned first, as lengths and weights, so that its weights can be normalised over all processes before the
  first batch is made. Samples are kept from planning to use as far as `hold_bytes` goes, and made again beyond it.
- Where a lane stands is its number of rows drawn and the rows in its window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ivcore.errors import PromptError
from ivcore.training import Batch
from ivcore.vision import Patches
from train.order import RowStream
from train.row import Row, RowError
from train.samples import Sample, SampleBuilder
from train.weighting import Weighting, place_weights


@dataclass(frozen=True)
class Pack:
    """Rows that make one batch. tokens: all of theirs. weight: of their places together, before normalising."""

    rows: tuple[int, ...]
    row_ids: tuple[str, ...]
    tokens: int
    weight: float


@dataclass(frozen=True)
class _Waiting:
    row: int
    row_id: str
    tokens: int
    weight: float


class Packer:
    """Plans the packs of a step and makes their batches.

    budget: the most tokens of a batch. window: how many rows of a lane are looked at to fill one.
    hold_bytes: of pixels kept between planning and use.
    """

    def __init__(
        self,
        stream: RowStream,
        builder: SampleBuilder,
        *,
        budget: int,
        window: int,
        weighting: Weighting,
        hold_bytes: int = 1 << 28,
    ) -> None:
        self.stream = stream
        self._builder, self._budget, self._window, self._weighting = builder, budget, window, weighting
        self._hold_bytes = hold_bytes
        self._held: dict[int, Sample] = {}
        self._waiting: dict[int, list[_Waiting]] = {lane: [] for lane in stream.lanes}

    def step(self) -> list[Pack]:
        """The packs of this process for the next step, one a lane."""
        return [self._pack(lane) for lane in self.stream.lanes]

    def batch(self, pack: Pack, total: float) -> Batch:
        """A pack's batch. total: the weights of all packs of the step, of all processes."""
        samples = [self._take(row) for row in pack.rows]
        weights = [place_weights(sample.trained, self._weighting) / total for sample in samples]
        return to_batch(samples, weights)

    def state(self) -> dict[str, Any]:
        """The stream's state, and each lane's window; for JSON."""
        state = self.stream.state()
        for lane, waiting in self._waiting.items():
            state["lanes"][str(lane)]["window"] = [each.row for each in waiting]
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, whose windows are read again; TrainingError where it does not belong to this run."""
        self.stream.load_state(state)
        for lane in self.stream.lanes:
            window = state["lanes"][str(lane)]["window"]
            self._waiting[lane] = [self._weigh(row, self._sample(self.stream.rows[row])) for row in window]

    def _pack(self, lane: int) -> Pack:
        waiting = self._waiting[lane]
        while len(waiting) < self._window:
            waiting.append(self._weigh(*self.stream.draw(lane, self._sample)))
        taken, tokens = [], 0
        for each in list(waiting):
            if tokens + each.tokens <= self._budget:
                taken.append(each)
                waiting.remove(each)
                tokens += each.tokens
        rows, row_ids = tuple(each.row for each in taken), tuple(each.row_id for each in taken)
        return Pack(rows, row_ids, tokens, sum(each.weight for each in taken))

    def _sample(self, row: Row) -> Sample:
        try:
            sample = self._builder.sample(row)
        except PromptError as error:
            if "context holds" not in str(error):
                raise
            raise RowError("longer than the budget", str(error).rstrip(".")) from None
        if len(sample) > self._budget:
            raise RowError(
                "longer than the budget", f"it takes {len(sample):,} tokens, but a batch holds {self._budget:,}"
            )
        return sample

    def _weigh(self, row: int, sample: Sample) -> _Waiting:
        if sample.nbytes + sum(each.nbytes for each in self._held.values()) <= self._hold_bytes:
            self._held[row] = sample
        weight = float(place_weights(sample.trained, self._weighting).sum(dtype=np.float64))
        return _Waiting(row, sample.row_id, len(sample), weight)

    def _take(self, row: int) -> Sample:
        held = self._held.pop(row, None)
        return self._sample(self.stream.rows[row]) if held is None else held


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of things of these lengths in packs of at most `budget`, each in the first pack with room for it."""
    packs: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        fitting = next((number for number, free in enumerate(room) if length <= free), None)
        if fitting is None:
            packs.append([])
            room.append(budget)
            fitting = len(packs) - 1
        packs[fitting].append(index)
        room[fitting] -= length
    return packs


def to_batch(samples: Sequence[Sample], weights: Sequence[np.ndarray], families: Sequence[int] | None = None) -> Batch:
    """One batch of samples in their order; weights: float (S,) of each one's places.

    A target is the next token of the same sample.

    families: how many samples after each other have one prompt, media and all, and are trained on nothing in it; None:
        each is one by itself. Of several the prompt is there once, but for its last token, and they go on from it.
    """
    rows = list(_rows(samples, families or [1] * len(samples)))
    token_ids = np.concatenate([samples[index].token_ids[part] for index, part, _ in rows])
    place_weight = np.concatenate([weights[index][part] for index, part, _ in rows]).astype(np.float32)
    following = np.append(token_ids[1:], 0)
    shown = [samples[index] for index, part, _ in rows if part.start == 0]
    grids = [sample.grid_thw for sample in shown if sample.grid_thw is not None]
    parents = np.array([parent for _, _, parent in rows], np.int32)
    positions = [samples[index].position_ids[:, part] for index, part, _ in rows]
    return Batch(
        token_ids=token_ids.astype(np.int32),
        position_ids=np.concatenate(positions, axis=1).astype(np.int32),
        lengths=np.array([part.stop - part.start for _, part, _ in rows], np.int32),
        pixels=_joined([sample.pixels for sample in shown if sample.pixels is not None]),
        grid_thw=np.concatenate(grids) if grids else None,
        targets=np.where(place_weight != 0, following, 0).astype(np.int32),
        weights=place_weight,
        parents=parents if (parents >= 0).any() else None,
    )


def _rows(samples: Sequence[Sample], families: Sequence[int]) -> Iterator[tuple[int, slice, int]]:
    """Of every row of a batch the sample, the part of its tokens, and the row that it goes on from."""
    row = first = 0
    for size in families:
        parent, start = -1, 0
        if size > 1:  # the prompt's last token predicts the first of every answer, so each answer has it
            parent, start = row, int(np.argmax(samples[first].trained)) - 1
            yield first, slice(0, start), -1
            row += 1
        for index in range(first, first + size):
            yield index, slice(start, len(samples[index])), parent
            row += 1
        first += size


def _joined(pixels: Sequence[np.ndarray | Patches]) -> np.ndarray | Patches | None:
    """The patches of several samples; those that are still frames stay so, at a quarter of the bytes."""
    if not pixels:
        return None
    patches = [each for each in pixels if isinstance(each, Patches)]
    if len(patches) == len(pixels):
        return Patches([clip for each in patches for clip in each._clips], patches[0]._config)
    return np.concatenate([np.asarray(each) for each in pixels])
