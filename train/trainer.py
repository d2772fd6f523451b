"""What the loop needs of a backend's `Trainer`, and how one is made; see `ivtorch.train` or its twin."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ivcore.backend import Model
from ivcore.shards import TensorSpec
from ivcore.training import Batch, LoraSettings, Loss, OptimizerSettings
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
    def apply(self, learning_rate: float, max_norm: float | None) -> float: ...
    def gradients(self) -> dict[str, np.ndarray]: ...
    def set_gradients(self, gradients: dict[str, np.ndarray]) -> None: ...
    def logprobs(self, batch: Batch) -> np.ndarray: ...
    def reference_logprobs(self, batch: Batch) -> np.ndarray: ...
    def state(self) -> dict[str, np.ndarray]: ...
    def load_state(self, state: dict[str, np.ndarray]) -> None: ...
    def save_adapter(self, path: str | Path) -> None: ...
    def specs(self) -> dict[str, TensorSpec]: ...
    def tensors(self) -> Iterator[tuple[str, np.ndarray]]: ...


def make_trainer(model: Model, recipe: Recipe) -> Trainer:
    """The trainer of a loaded model, as a recipe says."""
    return new_trainer(
        model,
        lora=None if recipe.full else recipe.lora.settings(),
        optimizer=recipe.optimizer.settings(),
        checkpointing=recipe.checkpointing,
        seed=recipe.seed,
    )


def new_trainer(
    model: Model, *, lora: LoraSettings | None, optimizer: OptimizerSettings, checkpointing: bool = True, seed: int = 0
) -> Trainer:
    """The trainer of the backend that a model runs on."""
    module = importlib.import_module(f"iv{model.backend}.train")
    trainer: Trainer = module.Trainer(model, lora=lora, optimizer=optimizer, checkpointing=checkpointing, seed=seed)
    return trainer


def frozen_score(model: Model, *, full: bool) -> Score:
    """How a loaded model that is not trained scores a batch: the whole vocabulary, or its targets."""
    module = importlib.import_module(f"iv{model.backend}.train")
    return partial(module.token_logprobs_full if full else module.logprobs, model)
