"""Messages and their media -> ModelInputs, as Hugging Face's `Qwen3VLProcessor` builds them.

- The number of tokens is checked against the context as soon as it is known: the text's before any file is opened, a
  video's before its frames are decoded.
- A video becomes `<0.6 seconds><|vision_start|><|video_pad|>...<|vision_end|>` per temporal patch, an image one such
  run without the time.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ivcore.errors import ConfigError, PromptError
from ivcore.files import read_json
from ivcore.inputs import ModelInputs
from ivcore.media import LoadedMedia, MediaLoader, Mode, Progress, Videos
from ivcore.messages import MediaItem, read_messages
from ivcore.processor import ProcessorConfig
from ivcore.tokenizer import Piece, Tokenizer
from ivcore.vision import Patches


def build_inputs(
    model_dir_or_tokenizer: str | Path | Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    min_frames: int | None = None,
    frame_tokens: int | None = None,
    mode: Mode = "uniform",
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    context_length: int | None = None,
    on_progress: Progress | None = None,
    videos: Videos | None = None,
    held: int = 0,
) -> ModelInputs:
    """The prompt that messages make: token ids, `Patches`, and where each medium came from.

    messages: in the Hugging Face form, {"type": "video", "video": path or frames}, with "fps" beside an array of frames
        for the rate they were taken at, or with "times" for the seconds of the frames to take, which are all of an
        array, and "origin" for the second that is shown as 0; or in the OpenAI form, {"type": "image_url", "image_url":
        {"url": ...}}.
    fps, min_frames, max_frames: how videos are sampled; None is what the checkpoint says.
    frame_tokens: the most tokens that a temporal patch of video, or an image, may cost.
    mode, on_progress: see `ivcore.video.decode`.
    videos: who probes and decodes files, such as a cache; `ivcore.video` by default.
    context_length: the most tokens of a prompt; None is the checkpoint's max_position_embeddings, where it says so.
    held: how many of the messages are in a cache already, the last of them the model's own answer, without the token
        that ended it: the inputs are what comes after that answer, to be appended to the cache.

    Raises PromptError (messages, template, too many tokens), MediaError (files) or ConfigError (the checkpoint).
    """
    tokenizer = model_dir_or_tokenizer
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_dir(tokenizer)
    config = _sampling(tokenizer.processor, fps, min_frames, max_frames)
    if frame_tokens is not None and frame_tokens < 1:
        raise PromptError(f"frame_tokens is {frame_tokens}; a frame takes at least one token.")
    clean, items = read_messages(messages)
    if held:
        pieces = _after_answer(tokenizer, clean, held, tools, add_generation_prompt)
        items = items[len(read_messages(messages[:held])[1]) :]
    else:
        pieces = tokenizer.template_pieces(clean, tools, add_generation_prompt)
    vision = _VisionTokens.of(tokenizer, pieces, items)
    context = _context_length(tokenizer) if context_length is None else context_length
    text_tokens = len(tokenizer.encode_pieces(pieces)) - len(items)  # the placeholders are not text
    _check_context(text_tokens, context, media=False)

    def check(visual_tokens: int) -> None:
        _check_context(text_tokens + visual_tokens, context, media=True, exact=False)

    loader = MediaLoader(config, frame_tokens=frame_tokens, mode=mode, on_progress=on_progress, videos=videos)
    loaded = loader.load(items, check)
    runs = [_runs(each, config) for each in loaded]
    token_ids = np.array(tokenizer.encode_pieces(_join_text(vision.expand(pieces, runs))), np.int32)
    _check_context(len(token_ids), context, media=bool(items))
    patches = Patches([each.frames for each in loaded], config) if loaded else None
    grid_thw = None if patches is None else patches.grid_thw
    return ModelInputs(token_ids, patches, grid_thw, media=tuple(each.media for each in loaded))


def _after_answer(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    held: int,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> list[Piece]:
    """What the template writes behind the content of messages[held - 1], found by a mark in its place."""
    if not (0 < held <= len(messages) and messages[held - 1]["role"] == "assistant"):
        raise PromptError(f"held is {held}, but messages[{held - 1}] is no answer of the model that could be held.")
    mark = str(secrets.randbits(128))
    marked = [*messages[: held - 1], {"role": "assistant", "content": mark}, *messages[held:]]
    pieces = tokenizer.template_pieces(marked, tools, add_generation_prompt)
    places = [place for place, piece in enumerate(pieces) if isinstance(piece, str) and mark in piece]
    if len(places) != 1:
        raise PromptError(f"The chat template does not print messages[{held - 1}] once, so it cannot be gone on from.")
    rest = str(pieces[places[0]]).partition(mark)[2]
    return [*([rest] if rest else []), *pieces[places[0] + 1 :]]


def _runs(loaded: LoadedMedia, config: ProcessorConfig) -> list[tuple[str, int]]:
    """(text before it, number of placeholders) of every temporal patch."""
    tokens = loaded.frames.shape[1] * loaded.frames.shape[2] // config.factor**2
    if loaded.media.kind == "image":
        return [("", tokens)]
    step, times = config.temporal_patch_size, loaded.media.timestamps
    groups = (times[first : first + step] for first in range(0, len(times), step))
    # A group that is cut short is filled up with its last frame, so its last time stays the same.
    return [(f"<{(group[0] + group[-1]) / 2:.1f} seconds>", tokens) for group in groups]


@dataclass(frozen=True)
class _VisionTokens:
    """Ids of the tokens that stand for media, -1 where the tokenizer has none."""

    start: int
    end: int
    image: int
    video: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, pieces: Sequence[Piece], items: Sequence[MediaItem]) -> _VisionTokens:
        """The tokenizer's ids; PromptError unless a prompt's pieces hold one placeholder for each medium, in order."""
        names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        ids = [tokenizer.token_id(name) for name in names]
        if items and None in ids:
            raise PromptError(f"The tokenizer has no {names[ids.index(None)]}, so its model takes no images or videos.")
        tokens = cls(*(-1 if each is None else each for each in ids))
        kinds = {tokens.image: "image", tokens.video: "video"}
        written = [kinds[piece] for piece in pieces if isinstance(piece, int) and piece in kinds]
        if written != [item.kind for item in items]:
            raise PromptError(
                f"The chat template wrote placeholders for {len(written)} media ({', '.join(written) or 'none'}) but "
                f"the messages have {len(items)} ({', '.join(item.kind for item in items) or 'none'})."
            )
        return tokens

    def expand(self, pieces: Iterable[Piece], runs: Iterable[Sequence[tuple[str, int]]]) -> list[Piece]:
        """The pieces with every placeholder, and the marks around it, made into its medium's runs."""
        out: list[Piece] = []
        media = iter(runs)
        after_medium = False
        for piece in pieces:
            if piece in (self.image, self.video):
                if out and out[-1] == self.start:
                    out.pop()
                for text, tokens in next(media):
                    out += [text, self.start, *[piece] * tokens, self.end]
            elif not (after_medium and piece == self.end):
                out.append(piece)
            after_medium = piece in (self.image, self.video)
        return out


def _join_text(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces with neighbouring texts joined, so that BPE merges across them as in one text."""
    for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_text:
            yield "".join(map(str, group))
        else:
            yield from group


def _check_context(tokens: int, context: int | None, *, media: bool, exact: bool = True) -> None:
    if context is None or tokens <= context:
        return
    remedy = "lower --max-frames, --fps or --frame-tokens" if media else "shorten the text"
    raise PromptError(
        f"The prompt takes {'' if exact else 'at least '}{tokens:,} tokens but the context holds {context:,}; {remedy}."
    )


def _sampling(
    config: ProcessorConfig, fps: float | None, min_frames: int | None, max_frames: int | None
) -> ProcessorConfig:
    """The checkpoint's config with the caller's sampling; a smaller max_frames pulls the default min_frames down."""
    most = config.max_frames if max_frames is None else max_frames
    least = min(config.min_frames, most) if min_frames is None else min_frames
    rate = config.fps if fps is None else fps
    if not 0 < rate < float("inf"):
        raise PromptError(f"fps is {rate}; it must be above 0.")
    if not 1 <= least <= most:
        raise PromptError(f"min_frames is {least} and max_frames {most}; they must be at least 1 and in this order.")
    return replace(config, fps=rate, min_frames=least, max_frames=most)


def _context_length(tokenizer: Tokenizer) -> int | None:
    """max_position_embeddings of the checkpoint's config.json; None where there is none to read."""
    if tokenizer.directory is None:
        return None
    try:
        text = read_json(tokenizer.directory / "config.json").get("text_config")
    except ConfigError:
        return None
    length = text.get("max_position_embeddings") if isinstance(text, dict) else None
    return length if isinstance(length, int) and length > 0 else None
