"""Calibration prompts from a user's files: videos and images with a request to describe them, texts in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from convert.parity.probe import file_messages
from ivcore.errors import PromptError
from ivcore.inputs import ModelInputs
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer

TEXT_ENDINGS = (".txt", ".md")
REQUEST = "Describe what is seen here in detail: what happens, in which order, where, and in which colours."
MAX_TEXT_TOKENS = 2048


def prompts_of_files(
    model: str | Path, files: Iterable[str | Path], *, max_tokens: int = MAX_TEXT_TOKENS, max_frames: int | None = None
) -> list[ModelInputs]:
    """model: the source's folder, for its tokenizer and processor. A text makes a prompt of every `max_tokens` tokens.

    Raises PromptError for a text that cannot be read or is empty, MediaError for a video or an image.
    """
    prompts = []
    tokenizer = Tokenizer.from_dir(model)
    for file in map(Path, files):
        if file.is_dir():
            raise PromptError(f"{file} is a folder; name the videos, images and texts to calibrate with.")
        if file.suffix.lower() not in TEXT_ENDINGS:
            prompts.append(build_inputs(tokenizer, file_messages(file, REQUEST), max_frames=max_frames))
            continue
        ids = tokenizer.encode(_text(file))
        prompts += [
            ModelInputs(np.array(ids[start : start + max_tokens], np.int32), None, None)
            for start in range(0, len(ids), max_tokens)
        ]
    return prompts


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(f"{file} cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError:
        raise PromptError(f"{file} is not text in UTF-8; name a video, an image or a text to calibrate with.") from None
    if not text.strip():
        raise PromptError(f"{file} holds no text to calibrate with; leave it out.")
    return text
