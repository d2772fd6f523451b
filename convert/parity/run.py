"""One run of a model: what it is before it is loaded, and what it does with a prompt once it is.

Notable:
- One model is in memory at a time; the reference's activations lie on disk, those of another run are compared as it
  makes them.
- A second, teacher-forced pass feeds every point with the reference's activations, so that each layer's own error is
  seen without what it inherits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from convert.parity.measures import Distance, TokenDistance, token_distance
from convert.parity.record import Recording
from convert.parity.report import RunName
from ivcore.backend import Model, Observer, load
from ivcore.config import ModelConfig
from ivcore.inputs import ModelInputs
from ivcore.shards import TensorSpec

Result = TypeVar("Result")
Tick = Callable[[int], None]
"""Called with the number of rows that a pass has just seen at one point."""


@dataclass(frozen=True)
class Run:
    """A folder on a backend in a dtype. model: what the user called the folder."""

    model: str
    folder: Path
    backend: Literal["mlx", "torch"]
    dtype: str
    config: ModelConfig
    specs: Mapping[str, TensorSpec]

    @property
    def name(self) -> RunName:
        """What the report calls it."""
        return RunName(self.model, self.backend, self.dtype)

    def with_model(self, work: Callable[[Model], Result]) -> Result:
        """What `work` makes of the loaded model, which is gone from memory afterwards."""
        try:
            return work(load(self.folder, self.backend, self.dtype))
        finally:
            release(self.backend)


@dataclass(frozen=True)
class Prompt:
    """What every run reads. positions: (K,), ascending, whose logits are compared. visual: (S,), where media stand."""

    inputs: ModelInputs
    visual: np.ndarray
    positions: np.ndarray

    @property
    def following(self) -> np.ndarray:
        """(K,): the text token after each position, -1 where a visual one or nothing follows."""
        ids = np.where(self.visual, -1, self.inputs.token_ids)
        return np.append(ids, -1)[self.positions + 1]


@dataclass
class PointDistance:
    """Distances of one point: over all rows, and for the decoder's over visual and text positions apart."""

    all: Distance
    visual: Distance
    text: Distance


@dataclass(frozen=True)
class FreeRun:
    """Distances of a run that goes its own way: of each point by name, and of the logits, (K,) each."""

    points: dict[str, PointDistance]
    tokens: TokenDistance


def release(backend: str) -> None:
    """Give the memory of a model that is not used any more back to the system."""
    gc.collect()
    if backend == "mlx":
        import mlx.core as mx

        mx.clear_cache()
    else:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def record(model: Model, prompt: Prompt, recording: Recording, tick: Tick) -> None:
    """Write all activations of a run to disk."""

    def observe(name: str, rows: np.ndarray) -> None:
        recording.append(name, rows)
        tick(len(rows))

    model.logits(prompt.inputs, observe, prompt.positions)


def run_freely(model: Model, prompt: Prompt, reference: Recording, tick: Tick) -> FreeRun:
    """Compare a run with the reference's, point by point and position by position."""
    found: dict[str, PointDistance] = {}
    tokens: list[TokenDistance] = []
    following = prompt.following

    def compare(name: str, start: int, expected: np.ndarray, rows: np.ndarray) -> None:
        distance = found.setdefault(name, PointDistance(Distance(), Distance(), Distance()))
        distance.all.add(expected, rows)
        if name == "logits":
            tokens.append(token_distance(expected, rows, following[start : start + len(rows)]))
        elif not name.startswith("visual."):
            visual = prompt.visual[start : start + len(rows)]
            distance.visual.add(expected[visual], rows[visual])
            distance.text.add(expected[~visual], rows[~visual])
        tick(len(rows))

    model.logits(prompt.inputs, _beside(reference, compare), prompt.positions)
    return FreeRun(found, TokenDistance.joined(tokens))


def run_forced(model: Model, prompt: Prompt, reference: Recording, tick: Tick) -> dict[str, Distance]:
    """Each point's own error: everything before it is the reference's."""
    found: dict[str, Distance] = {}

    def replace(name: str, start: int, expected: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found.setdefault(name, Distance()).add(expected, rows)
        tick(len(rows))
        return expected

    model.logits(prompt.inputs, _beside(reference, replace), prompt.positions)
    return found


def greedy(model: Model, inputs: ModelInputs, steps: int, stop_ids: Collection[int], tick: Tick) -> tuple[int, ...]:
    """The likeliest tokens, `steps` at most; ends at a stop id, or where the logits are not finite."""
    cache = model.new_cache()
    steps = min(steps, model.config.text.max_position_embeddings - len(inputs.token_ids))
    logits = model.prefill(inputs, cache) if steps > 0 else np.empty(0)
    ids: list[int] = []
    while len(ids) < steps and np.isfinite(logits).all():
        ids.append(int(logits.argmax()))
        tick(1)
        if ids[-1] in stop_ids or len(ids) == steps:
            break
        logits = model.decode(ids[-1], cache)
    return tuple(ids)


def _beside(reference: Recording, see: Callable[[str, int, np.ndarray, np.ndarray], np.ndarray | None]) -> Observer:
    """An observer that hands each portion to see(name, its first row, the reference's rows, rows).

    A point's portions come in order, but two runs may cut them differently: frames are grouped by what memory holds.
    """
    seen: dict[str, int] = {}

    def observe(name: str, rows: np.ndarray) -> np.ndarray | None:
        start = seen.get(name, 0)
        seen[name] = start + len(rows)
        return see(name, start, reference.rows(name, start, start + len(rows)), rows)

    return observe
