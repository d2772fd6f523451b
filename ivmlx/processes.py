"""The processes that mlx.launch has started: what they tell each other, and sums over them.

Notable:
- MLX's own backends: a ring over TCP, or JACCL over Thunderbolt.
- Words and small numbers are exchanged as JSON, on the CPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ivcore.errors import BackendError, TrainingError
from ivcore.shards import split

BUCKET_BYTES = 1 << 26
"""Arrays are summed so many bytes at a time."""


class Processes:
    """One process of a run, the `rank`-th of `world`; the only one unless `join` has made it."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, on every one of them; what JSON can hold."""
        if self.world == 1:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = [int(length) for length in self._all(np.array([len(text)]))[:, 0]]
        texts = self._all(np.pad(text, (0, max(lengths) - len(text))))
        return [json.loads(each[:length].tobytes()) for each, length in zip(texts, lengths, strict=True)]

    def sum(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The sums over processes of float32 arrays, which all have of the same names and shapes."""
        if self.world == 1:
            return dict(arrays)
        sums: dict[str, mx.array] = {}
        for names in split({name: array.nbytes for name, array in arrays.items()}, BUCKET_BYTES):
            flat = mx.concatenate([arrays[name].flatten() for name in names])
            with _connected():
                flat = mx.distributed.all_sum(flat)
                mx.eval(flat)
            parts = mx.split(flat, np.cumsum([arrays[name].size for name in names])[:-1].tolist())
            sums |= {name: part.reshape(arrays[name].shape) for name, part in zip(names, parts, strict=True)}
        return sums

    def broadcast(self, array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        """The float32 array of process 0, of a shape that all know; that of the others is not looked at."""
        if self.world == 1 and array is not None:
            return array
        given = np.zeros(shape, np.float32) if self.rank or array is None else array
        with _connected():
            # As integers: a sum of floats would turn -0 into 0.
            found = np.array(mx.distributed.all_sum(mx.array(np.ascontiguousarray(given).view(np.int32))))
        return found.view(np.float32)

    def _all(self, array: np.ndarray) -> np.ndarray:
        """(world, ...) of arrays of one shape."""
        with _connected():
            return np.array(mx.distributed.all_gather(mx.array(array)[None]))


def join() -> Processes:
    """This process among those of mlx.launch, or alone; BackendError where they do not find each other."""
    if "MLX_RANK" not in os.environ:
        return Processes()
    reason = "they do not see each other"
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        group, reason = None, str(error).splitlines()[0].rstrip(".")
    # Where no connection is tried, MLX gives a group of one.
    if group is None or group.rank() != int(os.environ["MLX_RANK"]):
        raise BackendError(f"The processes of mlx.launch cannot be joined ({reason}); see its options.")
    return Processes(group.rank(), group.size())


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise TrainingError("Another process of this run has stopped; what it said last tells why.") from None
