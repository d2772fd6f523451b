"""Sampling a token from logits, in NumPy: one implementation, so that a seed means the same on both backends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ivcore.errors import BackendError, ConfigError
from ivcore.files import read_json

GREEDY_BELOW = 1e-4  # a lower temperature is greedy as well, and logits divided by it could overflow


@dataclass(frozen=True)
class Sampling:
    """How to pick the next token; the defaults are greedy.

    temperature 0 takes the most likely token. top_k, top_p (nucleus, arXiv 1904.09751) and min_p (arXiv 2407.01082)
    keep, in this order, the k likeliest tokens, the smallest set with that much probability, and the tokens with at
    least that fraction of the best one's probability. repetition_penalty divides positive and multiplies negative
    logits of tokens generated so far (CTRL, arXiv 1909.05858).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": 0 <= self.temperature < float("inf"),
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p < 1,
            "repetition_penalty": 0 < self.repetition_penalty < float("inf"),
            "seed": self.seed is None or self.seed >= 0,
        }
        for name, holds in limits.items():
            if not holds:
                raise BackendError(f"{name} is {getattr(self, name)}, which is outside its range; see the help.")


class Sampler:
    """Draws tokens one after the other; holds the random state of one generation."""

    def __init__(self, sampling: Sampling | None = None) -> None:
        self.sampling = sampling or Sampling()
        self._random = np.random.default_rng(self.sampling.seed)

    def __call__(self, logits: np.ndarray, generated: Collection[int] = ()) -> int:
        """A token id from logits (vocab,); `generated`: the ids that the repetition penalty applies to."""
        how = self.sampling
        if not np.isfinite(logits.max()):
            raise BackendError("The model's output is not a number; its weights or the dtype do not hold: try float32.")
        if how.repetition_penalty != 1.0 and generated:
            logits = logits.copy()
            seen = np.fromiter(set(generated), dtype=np.int64)
            past = logits[seen]
            logits[seen] = np.where(past > 0, past / how.repetition_penalty, past * how.repetition_penalty)
        if how.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        candidates, probabilities = self._distribution(logits.astype(np.float64) / how.temperature)
        # Inverse transform on the sorted distribution: one uniform number a token, whatever the vocabulary.
        cumulative = probabilities.cumsum()
        index = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(candidates[min(index, len(candidates) - 1)])

    def _distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, likeliest first, and their probabilities after top_k, top_p and min_p (not renormalised)."""
        how = self.sampling
        top = len(logits) if how.top_k == 0 else min(how.top_k, len(logits))
        candidates = np.argpartition(-logits, top - 1)[:top] if top < len(logits) else np.arange(len(logits))
        candidates = candidates[np.argsort(-logits[candidates], kind="stable")]
        weights = np.exp(logits[candidates] - logits[candidates[0]])
        probabilities = weights / weights.sum()
        keep = probabilities.cumsum() - probabilities < how.top_p
        keep &= probabilities >= how.min_p * probabilities[0]
        return candidates[keep], probabilities[keep]


def stop_ids(path: str | Path) -> frozenset[int]:
    """The ids that end an answer: `eos_token_id` of a folder's generation_config.json, none without that file."""
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return frozenset()
    ids = read_json(file).get("eos_token_id")
    ids = [ids] if isinstance(ids, int) else ids or []
    if not isinstance(ids, list) or not all(isinstance(token_id, int) for token_id in ids):
        raise ConfigError(f"{file}: eos_token_id must be a token id or a list of them.")
    return frozenset(ids)
