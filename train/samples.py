"""A row -> a sample: its tokens, which of them the assistant wrote, positions and pixels.

Notable:
- The loss is on what the model is to write: an assistant's message up to and with the token that closes it, not the
  header before it. The places are found by rendering the conversation up to before and after each such message, so any
  chat template will do whose prefixes stay as they are when the conversation goes on; for others it is an error.
- The media are expanded once, in the whole conversation. No assistant's message shows any, so what follows a medium is
  found again behind the last of its tokens, and compared.
- The sample of a rollout is made of the very ids that were sampled; encoding its text could give others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ivcore.errors import PromptError
from ivcore.inputs import ModelInputs
from ivcore.messages import read_messages
from ivcore.positions import position_ids
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from ivcore.vision import Patches
from train.row import Row

Tools = Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Sample:
    """One row as a model takes it.

    token_ids: int32 (S,). trained: bool (S,), True for the tokens that are to be predicted. position_ids: int32 (3, S).
    pixels, grid_thw: of its media, in order, or None. warnings: sentences on what of them could not be decoded.
    """

    row_id: str
    token_ids: np.ndarray
    trained: np.ndarray
    position_ids: np.ndarray
    pixels: np.ndarray | Patches | None
    grid_thw: np.ndarray | None
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        return 0 if self.pixels is None else self.pixels.nbytes


@dataclass(frozen=True)
class Framing:
    """How the media of a sample are sampled, and how long it may be; None leaves a value to the checkpoint.

    fps: frames a second. frame_tokens: the most of a temporal patch or an image. max_tokens: of the whole sample.
    """

    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    frame_tokens: int | None = None
    max_tokens: int | None = None


class SampleBuilder:
    """Makes samples of rows, and prompts to roll out from.

    build: `build_inputs`, or it with a cache of clips.
    """

    def __init__(
        self, tokenizer: Tokenizer, framing: Framing | None = None, build: Callable[..., ModelInputs] = build_inputs
    ) -> None:
        self.framing = framing or Framing()
        self._tokenizer = tokenizer
        self._build = build
        ids = (tokenizer.token_id(name) for name in ("<|image_pad|>", "<|video_pad|>", "<|vision_end|>"))
        self._image, self._video, self._end = (-1 if each is None else each for each in ids)

    def sample(self, row: Row) -> Sample:
        """The whole conversation of a row.

        Raises PromptError where it has more than max_tokens, no assistant's message, or a template in whose rendering
        that cannot be found; and MediaError.
        """
        inputs = self._inputs(row.messages, row.tools, add_generation_prompt=False)
        trained = self.trained_places(row.messages, inputs, row.tools)
        return self._sample(row.id, inputs, inputs.token_ids, trained)

    def prompt(self, row: Row) -> ModelInputs:
        """What a rollout starts from: the conversation without its last answer, and the header of the next one."""
        inputs = self._inputs(row.prompt(), row.tools, add_generation_prompt=True)
        return replace(inputs, position_ids=self._positions(inputs.token_ids, inputs.grid_thw))

    def rollout(self, row_id: str, prompt: ModelInputs, generated: Sequence[int]) -> Sample:
        """The sample of a prompt and what was sampled after it; all of the latter is trained on."""
        token_ids = np.concatenate([prompt.token_ids, np.asarray(generated, np.int32)])
        return self._sample(row_id, prompt, token_ids, np.arange(len(token_ids)) >= len(prompt.token_ids))

    def trained_places(
        self, messages: Sequence[Mapping[str, Any]], inputs: ModelInputs, tools: Tools = None
    ) -> np.ndarray:
        """bool (S,): the tokens that the assistant wrote, with what closes each turn, but for messages of weight 0.

        PromptError as `sample`.
        """
        clean, _ = read_messages(messages)
        whole = self._render(clean, tools, header=False)
        places = np.zeros(len(inputs.token_ids), bool)
        for index, message in enumerate(clean):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            where = f"messages[{index}]"
            start = self._prefix(whole, clean[:index], tools, header=True, where=where)
            last = index + 1 == len(clean)
            end = len(whole) if last else self._prefix(whole, clean[: index + 1], tools, header=False, where=where)
            closing = np.flatnonzero(np.isin(whole[start:end], list(self._tokenizer.stop_ids)))
            if closing.size:  # what the template writes after it, a line break, the model never does
                end = start + int(closing[-1]) + 1
            shift = self._shift(whole, start, inputs)
            if start >= end or not np.array_equal(whole[start:end], inputs.token_ids[start + shift : end + shift]):
                raise PromptError(f"{where}: its tokens cannot be found in the rendered conversation.")
            places[start + shift : end + shift] = True
        if not places.any():
            raise PromptError("The conversation has no assistant message to learn from.")
        return places

    def _inputs(
        self, messages: Sequence[Mapping[str, Any]], tools: Tools, *, add_generation_prompt: bool
    ) -> ModelInputs:
        how = self.framing
        return self._build(
            self._tokenizer,
            messages,
            tools=tools,
            fps=how.fps,
            min_frames=how.min_frames,
            max_frames=how.max_frames,
            frame_tokens=how.frame_tokens,
            context_length=how.max_tokens,
            add_generation_prompt=add_generation_prompt,
        )

    def _sample(self, row_id: str, inputs: ModelInputs, token_ids: np.ndarray, trained: np.ndarray) -> Sample:
        positions = self._positions(token_ids, inputs.grid_thw)
        warnings = tuple(warning for medium in inputs.media for warning in medium.warnings)
        return Sample(row_id, token_ids, trained, positions, inputs.pixels, inputs.grid_thw, warnings)

    def _positions(self, token_ids: np.ndarray, grid_thw: np.ndarray | None) -> np.ndarray:
        return position_ids(
            token_ids,
            grid_thw,
            image_token_id=self._image,
            video_token_id=self._video,
            merge_size=self._tokenizer.processor.merge_size,
        )

    def _render(self, clean: Sequence[Mapping[str, Any]], tools: Tools, *, header: bool) -> np.ndarray:
        """Ids of a conversation with one placeholder a medium."""
        pieces = self._tokenizer.template_pieces(clean, tools, add_generation_prompt=header)
        return np.array(self._tokenizer.encode_pieces(pieces), np.int32)

    def _prefix(
        self, whole: np.ndarray, clean: Sequence[Mapping[str, Any]], tools: Tools, *, header: bool, where: str
    ) -> int:
        """How many tokens of `whole` the first messages take; PromptError where they are not its beginning."""
        prefix = self._render(clean, tools, header=header)
        if not np.array_equal(prefix, whole[: len(prefix)]):
            raise PromptError(
                f"{where}: the chat template writes what comes before it differently when the conversation goes on, so "
                "where the answer begins and ends is not known; use one turn, or a template that changes nothing."
            )
        return len(prefix)

    def _shift(self, whole: np.ndarray, place: int, inputs: ModelInputs) -> int:
        """How much later a place of `whole`, with one placeholder a medium, stands among the expanded tokens."""
        pads = np.flatnonzero(np.isin(whole[:place], (self._image, self._video)))
        if not pads.size or inputs.grid_thw is None:
            return 0
        last = int(pads[-1])
        behind = last + 1 + int(whole[last + 1] == self._end)
        runs = int(inputs.grid_thw[: pads.size, 0].sum())  # each temporal patch is a run, closed by the end token
        ids = inputs.token_ids
        visual = np.isin(ids, (self._image, self._video))
        ends = np.flatnonzero(visual[:-1] & ~visual[1:]) + 2
        return int(ends[runs - 1]) - behind
