"""Which row comes when: a shuffled order without end, dealt out to the lanes of a step.

- An epoch is a permutation that follows from the seed and the epoch's number. Epochs follow one another without a gap.
- A step takes something from each of `batch` lanes; lane k sees rows k, k + batch, k + 2 * batch, ... of the order.
  A process has every world-th lane, so what a step sees does not depend on how many processes share it, and none needs
  to open another's rows.
- A row that proves unusable is rejected and the lane goes on, which it will do again after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from ivcore.errors import ConfigError, MediaError, PromptError, TrainingError
from train.row import Row, RowError
from train.rows import Rows

T = TypeVar("T")

MOST_FAILURES = 1000
"""Rows that may fail one after the other; after more, it is not the rows that are wrong."""
MOST_EPOCHS = 50
"""Epochs of rows that a lane looks at for a usable one; it misses the only one there is with a chance of exp(-50)."""


def check_names(option: str, names: Iterable[str], datasets: Mapping[str, range]) -> None:
    """Raises ConfigError for a data set that an option names and the data does not have."""
    for name in names:
        if name not in datasets:
            near = get_close_matches(name, datasets, 1)
            hint = f"the nearest is {near[0]!r}" if near else f"there are {', '.join(map(repr, datasets))}"
            raise ConfigError(f"{option} names the data set {name!r}, which the data does not have; {hint}.")


def epoch_order(datasets: Mapping[str, range], shares: Mapping[str, float], seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in their order, int64: of a data set with share 2.3 each row twice, and 30 % a third time.

    Which those are is drawn anew in every epoch.
    """
    random = np.random.default_rng([seed, epoch])
    parts = []
    for name in sorted(datasets):
        positions = np.arange(datasets[name].start, datasets[name].stop)
        copies, rest = divmod(shares.get(name, 0.0), 1)
        parts += [positions] * int(copies)
        parts.append(random.permutation(positions)[: round(rest * len(positions))])
    return random.permutation(np.concatenate(parts))


class RowStream:
    """The rows that one process's lanes take, one at a time.

    shares: how often an epoch shows each data set's rows, those it does not name not at all; None is `rows.ratios`.
    """

    def __init__(
        self,
        rows: Rows,
        batch: int,
        *,
        seed: int,
        shares: Mapping[str, float] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Raises ConfigError for a share of an unknown data set, or a batch that the processes cannot share evenly."""
        if batch % world:
            raise ConfigError(f"batch is {batch}, which {world} processes cannot share evenly; use a multiple.")
        shares = rows.ratios if shares is None else shares
        check_names("mix", shares, rows.datasets)
        self.rows = rows
        self.lanes = range(rank, batch, world)
        self._batch, self._seed = batch, seed
        self._drawn = dict.fromkeys(self.lanes, 0)
        self._unusable: set[int] = set()
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(rows.datasets, shares, seed, epoch))
        self.epoch_rows = len(self._order(0))
        if not self.epoch_rows:
            raise TrainingError(f"There is no row to train on: {rows.summary()}")

    def draw(self, lane: int, use: Callable[[Row], T]) -> tuple[int, T]:
        """The lane's next row that `use` takes, and what it gives; MediaError, PromptError or RowError rejects a row.

        Raises TrainingError where no row is left, or too many fail one after the other.
        """
        failed = 0
        for _ in range(MOST_EPOCHS * self.epoch_rows):
            place = lane + self._batch * self._drawn[lane]
            self._drawn[lane] += 1
            position = int(self._order(place // self.epoch_rows)[place % self.epoch_rows])
            if position in self._unusable:
                continue
            try:
                return position, use(self.rows[position])
            except (MediaError, PromptError, RowError) as error:
                self._unusable.add(position)
                self.rows.reject(position, error)
                failed += 1
            if failed == MOST_FAILURES:
                break
        raise TrainingError(f"There is no row to train on: {self.rows.summary()}")

    @property
    def epoch(self) -> float:
        """How many epochs this process's lanes have drawn, a fraction of one counted."""
        return self._batch * sum(self._drawn.values()) / (len(self._drawn) * self.epoch_rows)

    def state(self) -> dict[str, Any]:
        """Where this process's lanes are, for JSON; `lanes` of all processes together is the state of the step."""
        return {
            "seed": self._seed,
            "epoch_rows": self.epoch_rows,
            "lanes": {str(lane): {"drawn": drawn} for lane, drawn in self._drawn.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; TrainingError where it is of other data, another seed or another batch."""
        lanes = state["lanes"]
        if (state["seed"], state["epoch_rows"]) != (self._seed, self.epoch_rows):
            raise TrainingError(
                f"The run was begun with {state['epoch_rows']:,} rows an epoch and seed {state['seed']}, but now there "
                f"are {self.epoch_rows:,} and seed {self._seed}; resume with the same data."
            )
        if missing := [lane for lane in self.lanes if str(lane) not in lanes]:
            raise TrainingError(f"The run was begun with a smaller batch, without lane {missing[0]}; use the same one.")
        self._drawn = {lane: int(lanes[str(lane)]["drawn"]) for lane in self.lanes}


def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a step from those of its processes: the lanes of all of them."""
    lanes = {lane: where for state in states for lane, where in state["lanes"].items()}
    return {**states[0], "lanes": dict(sorted(lanes.items(), key=lambda each: int(each[0])))}
