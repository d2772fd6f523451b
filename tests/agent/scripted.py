"""A model whose answers are written down: it reads with real weights, and says what a test tells it to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ivcore.backend import Model
from ivcore.sampling import Sampling
from ivcore.tokenizer import Tokenizer


class Scripted:
    """Answers in order; one that ends in `...` is cut off, without the token that ends a turn.

    least: where fewer tokens than these are allowed, it is the real model that answers.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, answers: Sequence[str], least: int = 0) -> None:
        self._model, self._tokenizer, self._answers, self._least = model, tokenizer, list(answers), least

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def continue_from(
        self, logits: np.ndarray, cache: Any, *, max_tokens: int = 512, sampling: Sampling | None = None
    ) -> Iterator[int]:
        if max_tokens < self._least:
            yield from self._model.continue_from(logits, cache, max_tokens=max_tokens, sampling=sampling)
            return
        answer = self._answers.pop(0)
        ids = self._tokenizer.encode(answer)
        end = self._tokenizer.token_id("<|im_end|>")
        assert end is not None
        said = ids if answer.endswith("...") else [*ids, end]
        for place, token_id in enumerate(said[:max_tokens]):
            yield token_id
            if place + 1 < len(said[:max_tokens]):
                self._model.decode(token_id, cache)
