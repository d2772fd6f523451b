"""cpt and sft: a step is a pack of rows a lane, and the loss is the next token of what the assistant wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ivcore.errors import TrainingError
from ivcore.training import NextToken
from train.order import RowStream
from train.packing import Pack, Packer
from train.processes import ALONE, Processes, agreed, by_lane, summed
from train.recipe import CptRecipe, ResolvedPhase, SftRecipe
from train.rows import Rows
from train.samples import SampleBuilder
from train.trainer import Trainer, Update, accumulate_all


class Supervised:
    """The steps of one phase, of which this process has its lanes."""

    def __init__(
        self,
        recipe: CptRecipe | SftRecipe,
        phase: ResolvedPhase,
        rows: Rows,
        builder: SampleBuilder,
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._stream = RowStream(
            rows, phase.batch, seed=seed, shares=phase.data.mix, rank=processes.rank, world=processes.world
        )
        self._packer = Packer(
            self._stream, builder, budget=phase.data.max_tokens, window=phase.data.window, weighting=recipe.weighting
        )

    def step(self, trainer: Trainer, update: Update) -> dict[str, float]:
        """Gather a step's gradient and call `update`; its loss, and how many rows and tokens made it.

        Raises TrainingError, naming the rows, for a loss that is not a number.
        """
        processes = self._processes
        with agreed(processes):
            packs = self.last_packs = self._packer.step()
        total = sum(by_lane(processes, [pack.weight for pack in packs]))
        batches = ((self._packer.batch(pack, total), NextToken()) for pack in packs)
        losses = [found["loss"] for found in accumulate_all(trainer, processes, batches)]
        with agreed(processes):
            for pack, loss in zip(packs, losses, strict=True):
                if not math.isfinite(loss):
                    raise TrainingError(f"the loss of {self._rows(pack)} is {loss}")
        update()
        sums = {
            "rows": sum(len(pack.rows) for pack in packs),
            "tokens": sum(pack.tokens for pack in packs),
            "epoch": self._stream.epoch / processes.world,
        }
        sums = summed(processes, sums)
        return {"loss": sum(by_lane(processes, losses)), **sums, "epoch": round(sums["epoch"], 6)}

    def blame(self) -> str:
        """The rows of the last step, for an error that comes after it."""
        return ", ".join(self._rows(pack) for pack in self.last_packs)

    def state(self) -> dict[str, Any]:
        return self._packer.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._packer.load_state(state)

    def _rows(self, pack: Pack) -> str:
        places = ", ".join(self._stream.rows.where(row) for row in pack.rows)
        return f"{'rows' if len(pack.rows) > 1 else 'row'} {places}"
