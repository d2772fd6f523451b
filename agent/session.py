"""A conversation with a model whose cache grows with it: what was read once is not read again.

- `read` prefills the messages that are new, and nothing else; `answer` generates the model's own next message.
- `rewrite` puts another conversation in its place and keeps the cache of what both begin with.
- `log_likelihoods` weighs given answers without saying any.
- The cache holds the tokens that the messages are written in, so that it is the same for who reads them in one go.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ivcore.backend import Model, Progress
from ivcore.errors import IvError
from ivcore.inputs import ModelInputs
from ivcore.prompt import build_inputs
from ivcore.sampling import Sampling
from ivcore.tokenizer import TextStream, Tokenizer

Message = Mapping[str, Any]


class ContextFull(IvError):
    """A conversation that is longer than the model's context."""


@dataclass
class Spent:
    """What sessions have cost: tokens prefilled, visual ones among them, and tokens generated."""

    prefilled: int = 0
    visual: int = 0
    generated: int = 0


class Session:
    """Messages in the form of `build_inputs`, and the cache of a model that has read them.

    spent: adds up what this session costs; several may share one. frame_tokens: see `build_inputs`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        spent: Spent | None = None,
        frame_tokens: int | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.messages: list[Message] = []
        self.spent = spent if spent is not None else Spent()
        self._tools, self._frame_tokens, self._on_progress = tools, frame_tokens, on_progress
        self._cache = model.new_cache()
        self._logits: np.ndarray | None = None
        # Number of messages, the last an answer -> length of the cache with them, and the last token of an answer that
        # was cut off, which is generated but not in the cache.
        self._answers: dict[int, tuple[int, int | None]] = {}

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._cache.length)

    @property
    def waits(self) -> bool:
        """Whether something was read that has no answer yet."""
        return self._logits is not None

    def read(self, messages: Sequence[Message]) -> int:
        """Append messages, none of them an answer, and prefill them; returns how many tokens that took.

        Raises ContextFull, and nothing is read, where there is no room for them.
        """
        if self._logits is not None:
            raise ValueError("the session waits for an answer to what it has read")
        return self._prefill([*self.messages, *messages], len(self.messages))

    def answer(self, max_tokens: int, sampling: Sampling | None = None) -> Iterator[str]:
        """Generate the next message, piece by piece, and append it; closing the iterator keeps what there is so far."""
        assert self._logits is not None, "there is nothing to answer"
        logits, self._logits = self._logits, None
        stream, pieces, said, last, start = TextStream(self.tokenizer), [], [], None, self.length
        stops = self.model.stop_ids | self.tokenizer.stop_ids
        tokens = self.model.continue_from(logits, self._cache, max_tokens=max_tokens, sampling=sampling)
        try:
            for last in tokens:
                self.spent.generated += 1
                if last in stops:
                    break
                said.append(last)
                pieces.append(stream.push(last))
                yield pieces[-1]
            pieces.append(stream.finish())
            yield pieces[-1]
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
            self._answers[len(self.messages)] = self.length, None if last in stops else last
        self._write_as_read("".join(pieces), said, start)

    def begun(self, text: str) -> Session:
        """This conversation with an answer that begins so, to be gone on with; this one stays as it is."""
        assert self._logits is not None, "there is nothing to answer"
        other = Session(
            self.model, self.tokenizer, tools=self._tools, spent=self.spent, frame_tokens=self._frame_tokens
        )
        other.messages, other._cache = list(self.messages), self._cache.fork()
        ids = np.array(self.tokenizer.encode(text), np.int32)
        other._logits = self.model.prefill(ModelInputs(ids, None, None), other._cache)
        self.spent.prefilled += len(ids)
        return other

    def foreseen(self, max_tokens: int) -> str:
        """The likeliest answer, on a fork: nothing is said."""
        assert self._logits is not None, "there is nothing to answer"
        tokens = list(self.model.continue_from(self._logits, self._cache.fork(), max_tokens=max_tokens))
        self.spent.generated += len(tokens)
        return self.tokenizer.decode(tokens)

    def log_likelihoods(self, answers: Sequence[str], *, whole: bool = True) -> np.ndarray:
        """float64 (n,): how likely each of these is the answer to what was read, in nats; nothing is said.

        whole: the answer ends there; else it only begins so.
        """
        assert self._logits is not None, "there is nothing to answer"
        end = self.tokenizer.token_id("<|im_end|>") if whole else None
        scores = []
        for answer in answers:
            ids = [*self.tokenizer.encode_pieces([answer]), *([] if end is None else [end])]
            cache, logits, score = self._cache.fork(), self._logits, 0.0
            for place, token_id in enumerate(ids):
                score += float(_log_softmax(logits)[token_id])
                if place + 1 < len(ids):
                    logits = self.model.decode(token_id, cache)
            self.spent.generated += len(ids) - 1
            scores.append(score)
        return np.array(scores)

    def rewrite(self, messages: Sequence[Message]) -> int:
        """Make this the conversation, to be answered next; returns how many tokens had to be read for it.

        Raises ContextFull where there is no room for it; what both begin with is the conversation then.
        """
        kept = 0
        for count in sorted(self._answers):
            if list(messages[:count]) == self.messages[:count]:
                kept = count
        self._answers = {count: there for count, there in self._answers.items() if count <= kept}
        self._cache.trim(self.length - (self._answers[kept][0] if kept else 0))
        self.messages, self._logits = list(messages[:kept]), None
        return self._prefill(messages, kept)

    def _prefill(self, messages: Sequence[Message], held: int) -> int:
        inputs = build_inputs(
            self.tokenizer, messages, tools=self._tools, frame_tokens=self._frame_tokens, held=held,
            context_length=sys.maxsize,  # which would not count what is in the cache
        )  # fmt: skip
        if held and (cut_off := self._answers[held][1]) is not None:
            inputs = replace(inputs, token_ids=np.concatenate(([cut_off], inputs.token_ids)).astype(np.int32))
        before, limit = self.length, self.model.config.text.max_position_embeddings
        if (length := before + len(inputs.token_ids)) > limit:
            raise ContextFull(f"That makes {length:,} tokens, but the model's context holds {limit:,}; look at less.")
        try:
            self._logits = self.model.prefill(inputs, self._cache, on_progress=self._on_progress)
        except BaseException:  # Ctrl-C between two chunks must not leave the first one there
            self._cache.trim(self.length - before)
            raise
        self.messages = list(messages)
        self.spent.prefilled += len(inputs.token_ids)
        self.spent.visual += _visual_tokens(self.model, inputs)
        return len(inputs.token_ids)

    def _write_as_read(self, text: str, said: Sequence[int], start: int) -> None:
        """Have the answer behind `start` in the cache in the tokens that its text is read in, if it was said in others.

        A model may spell a word in other pieces than the tokenizer cuts it into, and a resumed run has the text only.
        """
        asked = [{"role": "user", "content": "?"}]
        prompt = self._ids(asked, True)
        whole = self._ids([*asked, {"role": "assistant", "content": text}], False)
        end = self.tokenizer.token_id("<|im_end|>")
        if whole[: len(prompt)] != prompt or end not in whole[len(prompt) :]:
            return  # the template begins or ends an answer in a way of its own
        read = whole[len(prompt) : len(whole) - 1 - whole[::-1].index(end)]
        if read == list(said):
            return
        self._cache.trim(self.length - start)
        if read:
            self.model.prefill(ModelInputs(np.array(read, np.int32), None, None), self._cache)
        self.spent.prefilled += len(read)
        self._answers[len(self.messages)] = self.length, None

    def _ids(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        pieces = self.tokenizer.template_pieces(messages, self._tools, add_generation_prompt)
        return self.tokenizer.encode_pieces(pieces)


def _visual_tokens(model: Model, inputs: ModelInputs) -> int:
    config = model.config
    return int(np.isin(inputs.token_ids, (config.image_token_id, config.video_token_id)).sum())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
