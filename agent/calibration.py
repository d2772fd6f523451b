"""The prompts that a conversion of the attention calibrates with when the user names no files.

Clips of the toy world with a question and its answer, and every fourth a transcript with one, so that visual and text
tokens, questions and answers are all among what the errors are weighed by.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from ivcore.inputs import ModelInputs
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from train.toyworld.compose import make_script
from train.toyworld.dataset import BASE_SHARES, kind_of, row
from train.toyworld.questions import ask
from train.toyworld.render import write_clip
from train.toyworld.script import LONG_SECONDS, SHORT_SECONDS, Split, seeds
from train.toyworld.subtitles import transcript

TEXT_EVERY = 4
FIRST_SEED = 900_000  # behind what the toy models are trained and judged on


def mixture(model: str | Path, samples: int) -> tuple[list[ModelInputs], list[ModelInputs]]:
    """`samples` prompts of training seeds to calibrate with, and a quarter as many of held-out ones to measure on.

    model: the source's folder, for its tokenizer and processor. Errors as `build_inputs`.
    """
    tokenizer = Tokenizer.from_dir(model)
    return _prompts(tokenizer, "train", samples), _prompts(tokenizer, "heldout", max(samples // 4, 1))


def _prompts(tokenizer: Tokenizer, split: Split, count: int) -> list[ModelInputs]:
    with tempfile.TemporaryDirectory() as folder:
        return [
            _text(tokenizer, seed) if number % TEXT_EVERY == TEXT_EVERY - 1 else _clip(tokenizer, seed, Path(folder))
            for number, seed in enumerate(seeds(split, FIRST_SEED, count))
        ]


def _clip(tokenizer: Tokenizer, seed: int, folder: Path) -> ModelInputs:
    script = make_script(seed, kind_of(seed, BASE_SHARES), SHORT_SECONDS)
    clip = folder / f"{seed}.mp4"
    write_clip(clip, script)
    messages = row(script, ask(script, script.kind), str(clip))["messages"]
    return build_inputs(tokenizer, messages, add_generation_prompt=False)


def _text(tokenizer: Tokenizer, seed: int) -> ModelInputs:
    script = make_script(seed, "said", LONG_SECONDS)
    question = ask(script, "said")
    messages = [
        {"role": "user", "content": f"Subtitles:\n{transcript(script.lines)}\n\n{question.text}"},
        {"role": "assistant", "content": question.answer},
    ]
    return build_inputs(tokenizer, messages, add_generation_prompt=False)
