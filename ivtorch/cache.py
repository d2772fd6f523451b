"""The cache: append-only rows per layer, with a cheap `trim`; a latent row a token for M2LA, keys and values for GQA.

Notable:
- Storage grows in steps and is written in place; what was appended is never copied again inside a step.
- A layer is written at a given offset, so a prefill that was interrupted half-way leaves nothing behind.
- The model-level cache knows the next M-RoPE position after every token: going on after `trim` starts at the right one.
- Forks share their rows until one of them appends; storage that is shared is never written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch

from ivcore.config import TextConfig

GROWTH = 256
"""Tokens of room that a full buffer gains at least."""


class Buffer:
    """A tensor that grows along one axis."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.array: torch.Tensor | None = None
        self._shared = False

    def write(self, new: torch.Tensor, at: int, room: int) -> None:
        """Put `new` at index `at`; `room`: the length to make place for when it must grow."""
        stop = at + new.shape[self.axis]
        if self.array is None or self._shared or self.array.shape[self.axis] < stop:
            shape = list(new.shape)
            shape[self.axis] = max(room, stop + GROWTH)
            grown = new.new_empty(shape)
            if self.array is not None and at:
                grown[self._span(0, at)] = self.array[self._span(0, at)]
            self.array, self._shared = grown, False
        self.array[self._span(at, stop)] = new

    def view(self, start: int, stop: int) -> torch.Tensor:
        assert self.array is not None
        return self.array[self._span(start, stop)]

    def fork(self, rows: int = 1) -> Buffer:
        """A buffer with the same tokens, which are copied when it is next written to; as often as `rows` says."""
        self._shared = True
        other = copy(self)
        if self.array is not None and rows > 1:
            other.array = self.array.expand(rows, *self.array.shape[1:])
        return other

    def keep(self, rows: Sequence[int]) -> None:
        """Of several rows only these."""
        if self.array is not None:
            self.array, self._shared = self.array[list(rows)], False

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes."""
        return 0 if self.array is None else self.array.nbytes // self.array.shape[self.axis]

    def _span(self, start: int, stop: int) -> tuple[slice, ...]:
        return (slice(None),) * self.axis + (slice(start, stop),)


class LatentCache:
    """One layer of M2LA: rows `c | k_r`, (B, length, r + R * dr), the rotary keys already rotated."""

    def __init__(self) -> None:
        self.rows = Buffer(axis=1)

    def append(self, rows: torch.Tensor, at: int, room: int) -> None:
        self.rows.write(rows, at, room)

    def fork(self, rows: int = 1) -> LatentCache:
        other = copy(self)
        other.rows = self.rows.fork(rows)
        return other

    @property
    def buffers(self) -> list[Buffer]:
        return [self.rows]


class KeyValueCache:
    """One layer of GQA: keys (rotated) and values, (B, G, length, d) each."""

    def __init__(self) -> None:
        self.keys, self.values = Buffer(axis=2), Buffer(axis=2)

    def append(self, keys: torch.Tensor, values: torch.Tensor, at: int, room: int) -> None:
        self.keys.write(keys, at, room)
        self.values.write(values, at, room)

    def fork(self, rows: int = 1) -> KeyValueCache:
        other = copy(self)
        other.keys, other.values = self.keys.fork(rows), self.values.fork(rows)
        return other

    @property
    def buffers(self) -> list[Buffer]:
        return [self.keys, self.values]


class Cache:
    """The whole model's cache: one layer cache a decoder layer, and the positions of what they hold."""

    def __init__(self, text: TextConfig) -> None:
        kind = KeyValueCache if text.attention == "gqa" else LatentCache
        self.layers: list[LatentCache | KeyValueCache] = [kind() for _ in range(text.num_hidden_layers)]
        self.room = 0
        self._next_positions = np.zeros(0, dtype=np.int32)

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self._next_positions)

    @property
    def next_position(self) -> int:
        """The M-RoPE position at which the next text token goes."""
        return int(self._next_positions[-1]) if self.length else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held (the room for growth not counted)."""
        return self.length * sum(buffer.token_bytes for buffer in self._buffers())

    def reserve(self, tokens: int) -> None:
        """Make place for `tokens` more when a buffer grows next, so that a long prefill allocates once."""
        self.room = self.length + tokens

    def commit(self, position_ids: np.ndarray) -> None:
        """Count tokens at positions (3, S) as held; every layer has been written by then."""
        after = np.maximum.accumulate(position_ids.max(axis=0) + 1)
        after = np.maximum(after, self.next_position).astype(np.int32)
        self._next_positions = np.concatenate([self._next_positions, after])

    def trim(self, n: int) -> int:
        """Forget the last `n` tokens (all, if there are fewer); returns how many were forgotten. Frees no memory."""
        n = max(0, min(n, self.length))
        self._next_positions = self._next_positions[: self.length - n]
        return n

    def fork(self, rows: int = 1) -> Cache:
        """Another cache that holds the same; what is appended to one is not in the other.

        rows: how many sequences go on from it side by side, each with a copy of what is held.
        """
        other = copy(self)
        other.layers = [layer.fork(rows) for layer in self.layers]
        return other

    def keep(self, rows: Sequence[int]) -> None:
        """Of the sequences side by side only these."""
        for buffer in self._buffers():
            buffer.keep(rows)

    def _buffers(self) -> list[Buffer]:
        return [buffer for layer in self.layers for buffer in layer.buffers]
