"""A byte-level BPE of about a thousand tokens for the world's own text, and the configs a checkpoint has beside it.

- Digits stand alone, so that times and spans are spelled, never memorised.
- Trained on questions, answers, subtitles and transcripts of training seeds, the times that stand before every temporal
  patch, and the chat template's own words with calls of tools; any other text falls back to bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Bpe

from ivcore.chat_template import QWEN_TEMPLATE, render_template
from train.toyworld.compose import KINDS, make_script
from train.toyworld.questions import ask, kinds_of
from train.toyworld.script import LONG_SECONDS, SHORT_SECONDS, SIZE, seeds
from train.toyworld.subtitles import transcript

PATCH_SIZE, TEMPORAL_PATCH_SIZE, MERGE_SIZE = 8, 2, 2
FPS = 2.0  # sampled from every second of video, unless the user says otherwise

# The names and the order of Qwen3-VL's added tokens; those of SPECIAL are left out of decoded text.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WRITTEN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VOCABULARY = 1024  # at most: it ends where every word is a token of its own
_SEEDS_A_KIND = 60
# Words of someone who searches a film, for models that learn to.
_REMARKS = (
    "I look at the whole video first, then closer at one part of it.",
    "Nothing is visible between these times, so the answer must be in an earlier scene or in a later one.",
    "The transcript says where it lives, but not which colour it has: I still need to see it.",
    "This shows that the claim is right. That contradicts it: the claim was wrong, I have to look again.",
    "It is unclear from these frames; more frames of a shorter span will tell.",
    "Note: found in the second shot, before the cut. Evidence: this observation supports the hypothesis.",
    "My guess is confirmed, and there is no doubt left.",
    "The call failed because the span ends after the video; I try another one.",
    "I have searched every part without finding any, therefore I conclude that it is not there.",
    "What is known so far, what remains unknown, and what to do next.",
    "Summary: first one figure moves up, then two others appear together at the end, and none stays.",
)


def write_tokenizer(folder: str | Path) -> int:
    """Write tokenizer.json and the tokenizer, generation and processor configs; returns the number of token ids.

    Pictures are cut into patches of 8, merged by 2 x 2: a 64x64 clip costs 16 tokens a temporal patch, unresized.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bpe = train_bpe()
    (folder / "tokenizer.json").write_text(bpe.to_str(pretty=True) + "\n", encoding="utf-8")
    for name, content in _configs(bpe).items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return bpe.get_vocab_size()


def train_bpe() -> Bpe:
    """The tokenizer itself, the same every time."""
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(WRITTEN),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in WRITTEN])
    return bpe


def corpus() -> Iterator[str]:
    """The texts that the BPE is trained on."""
    for kind in KINDS:
        for seed in seeds("train", 0, _SEEDS_A_KIND):
            for duration in (SHORT_SECONDS, LONG_SECONDS):
                script = make_script(seed, kind, duration)
                questions = [ask(script, each) for each in kinds_of(script)]
                yield transcript(script.lines)
                for question in questions:
                    yield question.text
                    yield question.answer
        yield from _REMARKS
    yield from (f"<{tenths / 10:.1f} seconds>" for tenths in range(1000))
    yield from [_prompt_with_tools()] * _SEEDS_A_KIND


def _prompt_with_tools() -> str:
    """The chat template's words around a turn of every role, with the marks of `SPECIAL` and `WRITTEN` left out."""
    where = {"start": 1.5, "end": 3.0}
    calls: dict[str, dict[str, Any]] = {
        "overview": {"frames": 8},
        "segment": {},
        "look": {**where, "fps": 2},
        "ground": {"description": "the red circle", **where},
        "transcript": where,
        "search": {"query": "the red circle"},
        "note": {"text": "the red circle is visible"},
        "recall": {"query": "the red circle"},
        "summarize": where,
        "verify": {"claim": "the red circle moves left", **where},
    }
    tools = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object"}}}
        for name in calls
    ]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Answer the question."},
        {"role": "user", "content": "Subtitles:"},
    ]
    for name, arguments in calls.items():
        messages.append({"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]})
        messages.append({"role": "tool", "content": "supported, contradicted or unclear"})
    text = render_template(QWEN_TEMPLATE, messages, tools=tools)
    for mark in SPECIAL + WRITTEN:
        text = text.replace(mark, "")
    return text


def _configs(bpe: Bpe) -> dict[str, dict[str, Any]]:
    end, pad = (bpe.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    patches = {
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    # Pixels of one image, and of all sampled frames of a clip: some 6,000 pictures of the world fit unresized.
    image = {"shortest_edge": SIZE * SIZE, "longest_edge": 64 * SIZE * SIZE}
    video = {"shortest_edge": SIZE * SIZE, "longest_edge": 6144 * SIZE * SIZE}
    return {
        "tokenizer_config.json": {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 32768,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "generation_config.json": {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False},
        "preprocessor_config.json": {**patches, "size": image},
        "video_preprocessor_config.json": {**patches, "size": video, "fps": FPS, "min_frames": 4, "max_frames": 768},
    }
