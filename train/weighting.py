"""What each token counts in the loss of a step: by tokens, by samples, or by the square root between them.

The weights of InternVL 2.5 (arXiv 2412.05271, section 3.3, loss reweighting): each of the n trained tokens of a sample
weighs n**-e before all weights of the step are made to add up to 1; e is 0 for `token`, 1 for `sample`, 1/2 for
`square`. The step is all of its micro-batches in all processes, so how it is divided changes nothing, and what each
micro-batch contributes is a plain weighted sum; sums are added up, over micro-batches and processes, never averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from ivcore.errors import TrainingError
from ivcore.training import Batch

Weighting = Literal["token", "sample", "square"]
EXPONENTS: dict[Weighting, float] = {"token": 0.0, "sample": 1.0, "square": 0.5}


def place_weights(trained: np.ndarray, weighting: Weighting) -> np.ndarray:
    """float32 (S,): what each place of a sample counts, before the step is normalised.

    trained: bool (S,), the tokens to be predicted. A place has the weight of the token after it; the last place
    predicts nothing. The first token is predicted by none, and is not counted.
    """
    predicts = np.append(trained[1:], False)
    count = int(predicts.sum())
    return predicts * np.float32(max(count, 1) ** -EXPONENTS[weighting])


def total_weight(batches: Sequence[Batch]) -> float:
    """The sum of all weights, to be added up over all processes before it is given to `normalised`."""
    return float(sum(batch.weights.sum(dtype=np.float64) for batch in batches))


def normalised(batches: Sequence[Batch], total: float) -> list[Batch]:
    """The batches of a step with their weights divided by the step's total, that of all processes.

    Raises TrainingError where there is nothing to train on.
    """
    if not total:
        raise TrainingError("A step has no token to train on; no row of it has an answer.")
    return [replace(batch, weights=(batch.weights / total).astype(np.float32)) for batch in batches]
