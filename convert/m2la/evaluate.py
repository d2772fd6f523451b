"""What the conversion cost the whole model: its predictions beside the source's on held-out prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.m2la.plan import Prompt
from convert.parity.measures import TokenDistance, token_distance
from convert.parity.run import Prompt as ComparedPrompt
from convert.parity.run import release
from ivcore.backend import Model, load

POSITIONS = 128
"""Positions of each kind, visual and text, whose predictions are compared in a prompt."""


def compare_models(source: Path, converted: Path, prompts: Sequence[Prompt], backend: str) -> dict[str, Any]:
    """Of text and visual positions apart: mean KL(source || converted) in nats, how often both put the same token
    first, and the negative log-likelihood in nats of the text that follows, under each; None where there is none.

    One model is in memory at a time; the source's logits wait on disk.
    """
    compared = [_compared(prompt) for prompt in prompts]
    found: list[TokenDistance] = []
    with tempfile.TemporaryDirectory(prefix="iv3-m2la-") as folder:
        files = [Path(folder) / f"{number}.npy" for number in range(len(compared))]
        with_model = _Loaded(source, backend)
        for file, prompt in zip(files, compared, strict=True):
            np.save(file, with_model.logits(prompt))
        with_model.close()
        with_model = _Loaded(converted, backend)
        for file, prompt in zip(files, compared, strict=True):
            found.append(token_distance(np.load(file), with_model.logits(prompt), prompt.following))
        with_model.close()
    distance = TokenDistance.joined(found)
    visual = np.concatenate([prompt.visual[prompt.positions] for prompt in compared])
    return {"text": _summary(distance, ~visual), "visual": _summary(distance, visual)}


class _Loaded:
    def __init__(self, folder: Path, backend: str) -> None:
        self.backend = backend
        self.model: Model | None = load(folder, backend)  # type: ignore[arg-type]

    def logits(self, prompt: ComparedPrompt) -> np.ndarray:
        assert self.model is not None
        return self.model.logits(prompt.inputs, positions=prompt.positions)

    def close(self) -> None:
        self.model = None
        release(self.backend)


def _compared(prompt: Prompt) -> ComparedPrompt:
    chosen = [
        kind[np.linspace(0, len(kind) - 1, min(POSITIONS, len(kind))).round().astype(int)]
        for kind in (np.flatnonzero(~prompt.visual), np.flatnonzero(prompt.visual))
    ]
    return ComparedPrompt(prompt.inputs, prompt.visual, np.sort(np.concatenate(chosen)))


def _summary(distance: TokenDistance, chosen: np.ndarray) -> dict[str, Any] | None:
    if not chosen.any():
        return None

    def mean(values: np.ndarray) -> float | None:
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None

    return {
        "positions": int(chosen.sum()),
        "kl": float(distance.kl[chosen].mean()),
        "top1": float(distance.agrees[chosen].mean()),
        "nll_source": mean(distance.reference_nll[chosen]),
        "nll_converted": mean(distance.other_nll[chosen]),
    }
