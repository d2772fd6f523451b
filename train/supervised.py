"""cpt and sft: a step is a pack of rows a lane, and the loss is the next token of what the assistant wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ivcore.errors import TrainingError
from ivcore.training import NextToken
from train.order import RowStream
from train.packing import Pack, Packer
from train.recipe import CptRecipe, ResolvedPhase, SftRecipe
from train.rows import Rows
from train.samples import SampleBuilder
from train.trainer import Trainer, Update


class Supervised:
    """The steps of one phase."""

    def __init__(
        self, recipe: CptRecipe | SftRecipe, phase: ResolvedPhase, rows: Rows, builder: SampleBuilder, seed: int
    ) -> None:
        self._stream = RowStream(rows, phase.batch, seed=seed, shares=phase.data.mix)
        self._packer = Packer(
            self._stream, builder, budget=phase.data.max_tokens, window=phase.data.window, weighting=recipe.weighting
        )

    def step(self, trainer: Trainer, update: Update) -> dict[str, float]:
        """Gather a step's gradient and call `update`; its loss, and how many rows and tokens made it.

        Raises TrainingError, naming the rows, for a loss that is not a number.
        """
        packs = self._packer.step()
        total = sum(pack.weight for pack in packs)
        loss = 0.0
        for pack in packs:
            found = trainer.accumulate(self._packer.batch(pack, total), NextToken())["loss"]
            if not math.isfinite(found):
                raise TrainingError(f"the loss of {self._rows(pack)} is {found}")
            loss += found
        rows, tokens = sum(len(pack.rows) for pack in packs), sum(pack.tokens for pack in packs)
        self.last_packs = packs
        update()
        return {"loss": loss, "rows": rows, "tokens": tokens, "epoch": round(self._stream.epoch, 6)}

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
