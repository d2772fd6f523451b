"""What the loop needs of a backend's `Trainer`, and how one is made; see `ivtorch.train` or its twin."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ivcore.backend import Model
from ivcore.shards import TensorSpec
from ivcore.training import Batch, LoraSettings, Loss, OptimizerSettings
from train.processes import Processes, agreed
from train.recipe import Recipe

Update = Callable[[], None]
"""Takes the optimiser's step with the gradient gathered; the loop gives it to a stage, which says when."""

Score = Callable[[Batch], np.ndarray]
"""Log-probabilities of a batch's targets (S,), or of the whole vocabulary (K, vocab) at its places with a weight."""


class Trainer(Protocol):
    """Trains a loaded model in place."""

    model: Model
    lora: LoraSettings | None
    trainable: dict[str, tuple[int, ...]]

    def accumulate(self, batch: Batch, loss: Loss) -> dict[str, float]: ...
    def take_part(self) -> None: ...
    def unsharded(self) -> AbstractContextManager[None]: ...
    def apply(self, learning_rate: float, max_norm: float | None) -> float: ...
    def gradients(self) -> dict[str, np.ndarray]: ...
    def set_gradients(self, gradients: dict[str, np.ndarray]) -> None: ...
    def logprobs(self, batch: Batch) -> np.ndarray: ...
    def reference_logprobs(self, batch: Batch, *, full: bool = False) -> np.ndarray: ...
    def state(self) -> dict[str, np.ndarray]: ...
    def load_state(self, state: dict[str, np.ndarray]) -> None: ...
    def save_adapter(self, path: str | Path) -> None: ...
    def specs(self) -> dict[str, TensorSpec]: ...
    def tensors(self) -> Iterator[tuple[str, np.ndarray]]: ...


def make_trainer(model: Model, recipe: Recipe, processes: Processes | None = None) -> Trainer:
    """The trainer of a loaded model, as a recipe says; processes: those of the backend, as `join` gives them."""
    return new_trainer(
        model,
        lora=None if recipe.full else recipe.lora.settings(),
        optimizer=recipe.optimizer.settings(),
        checkpointing=recipe.checkpointing,
        seed=recipe.seed,
        processes=processes,
    )


def new_trainer(model: Model, *, lora: LoraSettings | None, optimizer: OptimizerSettings, **how: Any) -> Trainer:
    """The trainer of the backend that a model runs on; how: its checkpointing, seed and processes."""
    module = importlib.import_module(f"iv{model.backend}.train")
    trainer: Trainer = module.Trainer(model, lora=lora, optimizer=optimizer, **how)
    return trainer


def accumulate_all(
    trainer: Trainer, processes: Processes, batches: Iterable[tuple[Batch, Loss]]
) -> list[dict[str, float]]:
    """The gradient of all of this process's batches; returns what `accumulate` gives for each.

    They are made one by one, and an error in that is raised on all processes. A process with fewer than another one
    takes part in the rest with nothing.
    """
    source = iter(batches)
    found: list[dict[str, float]] = []
    while True:
        with agreed(processes):
            given = next(source, None)
        if not any(processes.gather(given is not None)):
            return found
        if given is None:
            trainer.take_part()
        else:
            found.append(trainer.accumulate(*given))
        del given  # or its pixels would lie beside those of the next one


def frozen_score(model: Model, *, full: bool) -> Score:
    """How a loaded model that is not trained scores a batch: the whole vocabulary, or its targets."""
    module = importlib.import_module(f"iv{model.backend}.train")
    return partial(module.token_logprobs_full if full else module.logprobs, model)
