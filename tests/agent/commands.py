"""`iv3 agent`, `chat` and `replay` with the small checkpoint, whose messages are written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.calls import written
from agent.loop import MESSAGE_TOKENS
from ivcore.backend import Model, load
from ivcore.sampling import Sampling
from ivcore.tokenizer import Tokenizer
from tests.agent.scripted import Scripted
from train.toyworld.compose import make_script
from train.toyworld.render import write_clip

MICRO = Path(__file__).resolve().parents[1] / "data/reference/iv3-micro"
LOOK = written("look", {"start": 2.0, "end": 3.0})
STOPS = "^C"
"""A message that ends so is stopped there, as by a person."""

Says = Callable[..., "Stoppable"]


def answer(text: str, *evidence: str) -> str:
    """The call that ends a run."""
    return written("answer", {"text": text, "claims": [{"text": f"It is {text}.", "evidence": list(evidence)}]})


class Stoppable(Scripted):
    """As Scripted, with somebody at the keyboard."""

    def continue_from(
        self, logits: np.ndarray, cache: Any, *, max_tokens: int = 512, sampling: Sampling | None = None
    ) -> Iterator[int]:
        stops = max_tokens >= self._least and self._answers[0].endswith(STOPS)
        if stops:
            self._answers[0] = self._answers[0].removesuffix(STOPS) + "..."
        yield from super().continue_from(logits, cache, max_tokens=max_tokens, sampling=sampling)
        if stops:
            raise KeyboardInterrupt


@cache
def loaded() -> Model:
    """The model itself, loaded once for all tests of a process."""
    return load(MICRO, "torch", "float32")


def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """Function (messages) that has every model that a command loads say them."""

    def script(*messages: str) -> Stoppable:
        model = Stoppable(loaded(), Tokenizer.from_dir(MICRO), messages, least=MESSAGE_TOKENS)
        monkeypatch.setattr("agent.belief.ANSWER_TOKENS", 4)  # what random weights foresee is noise, and takes long
        monkeypatch.setattr("agent.act.load", lambda folder, backend, dtype: model)
        return model

    return script


OPTIONS = ["-m", str(MICRO), "--dtype", "float32", "--tools", "look"]


def film(folder: Path, seed: int = 1) -> Path:
    """A short film in a folder."""
    path = folder / "film.mp4"
    write_clip(path, make_script(seed, "said", 16.0))
    return path
