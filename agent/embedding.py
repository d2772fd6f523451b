"""Vectors of texts and clips from a loaded model itself: what it is about to say when it is asked for one word.

The prompt asks to say a text, or a clip, in one word; the vector is the last hidden state, after the final norm, at the
prompt's last position, where all that was read has to be gathered for the next token. For texts this is PromptEOL
(arXiv 2307.16645); with the same question about pictures, texts and clips share a space (E5-V, arXiv 2407.12580).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent.workspace import video_part
from ivcore.backend import Model
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer

TEXT_QUESTION = "Say what this text is about in one word."
CLIP_QUESTION = "Say what this video is about in one word."

TEXT_CHARACTERS = 2000
"""What a text says after these is not in its vector: it would cost a long prompt, and one word cannot gather it."""


def collection_name(model: str) -> str:
    """What a library calls the vectors of a model: by its Hugging Face id, or its folder's whole path."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


class Embedder:
    """Vectors of a model, float32 and of length 1; both backends give the same ones.

    A vector costs the prefill of its prompt. Raises what `ivcore.prompt.build_inputs` and the model do.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, hidden), a row a text."""
        vectors = np.empty((len(texts), self.model.config.text.hidden_size), np.float32)
        for row, text in enumerate(texts):
            vectors[row] = self._vector(f"{text[:TEXT_CHARACTERS]}\n\n{TEXT_QUESTION}")
        return vectors

    def clip(self, frames: np.ndarray, times: Sequence[float], frame_tokens: int | None = None) -> np.ndarray:
        """(hidden,) of frames uint8 (N, H, W, 3), RGB, and their times in seconds, all of which are read.

        frame_tokens: the most tokens that a pair of frames may cost.
        """
        return self._vector([clip_part(frames, times), {"type": "text", "text": CLIP_QUESTION}], frame_tokens)

    def _vector(self, content: str | list[Mapping[str, Any]], frame_tokens: int | None = None) -> np.ndarray:
        inputs = build_inputs(self.tokenizer, [{"role": "user", "content": content}], frame_tokens=frame_tokens)
        last = np.empty(0, np.float32)

        def observe(name: str, rows: np.ndarray) -> None:
            nonlocal last
            if name == "norm":  # one chunk of the prompt after the other; the last row of the last one stays
                last = np.array(rows[-1], np.float32)

        # No position's logits are wanted: the head, a quarter of a small model, is left out.
        self.model.logits(inputs, observe, np.empty(0, np.int64))
        return last / np.linalg.norm(last)


def clip_part(frames: np.ndarray, times: Sequence[float]) -> dict[str, Any]:
    """The part of a message that shows frames; times count from the first one, so a clip is the same wherever it is."""
    return video_part(frames, [time - times[0] for time in times])
