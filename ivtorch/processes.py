"""The processes that torchrun has started: what they tell each other, and sums over them.

Notable:
- Gloo on the CPU, NCCL between GPUs; each process has the GPU of its local rank.
- Words and small numbers are exchanged as JSON, on the CPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ivcore.errors import BackendError, TrainingError
from ivcore.shards import split

BUCKET_BYTES = 1 << 26
"""Arrays are summed so many bytes at a time."""
PATIENCE = timedelta(hours=3)
"""The longest that a process waits for another one, as while that writes a large checkpoint to a slow disk."""


class Processes:
    """One process of a run, the `rank`-th of `world`; the only one unless `join` has made it."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, on every one of them; what JSON can hold."""
        if self.world == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self._all(torch.tensor([len(text)]))]
        texts = self._all(F.pad(text, (0, max(lengths) - len(text))))
        return [json.loads(each[:length].numpy().tobytes()) for each, length in zip(texts, lengths, strict=True)]

    def sum(self, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums over processes of float32 arrays, which all have of the same names and shapes."""
        if self.world == 1:
            return dict(arrays)
        sums: dict[str, torch.Tensor] = {}
        for names in split({name: array.nbytes for name, array in arrays.items()}, BUCKET_BYTES):
            flat = torch.cat([arrays[name].flatten() for name in names])
            with _connected():
                dist.all_reduce(flat)
            parts = flat.split([arrays[name].numel() for name in names])
            sums |= {name: part.view_as(arrays[name]) for name, part in zip(names, parts, strict=True)}
        return sums

    def broadcast(self, array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        """The float32 array of process 0, of a shape that all know; that of the others is not looked at."""
        if self.world == 1 and array is not None:
            return array
        tensor = torch.empty(shape) if self.rank or array is None else torch.tensor(array)
        with _connected():
            dist.broadcast(tensor, 0)
        return tensor.numpy()

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        with _connected():
            dist.all_gather(found, tensor)
        return found


def join() -> Processes:
    """This process among those of torchrun, or alone; BackendError where they do not find each other or a GPU."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in os.environ:
        return Processes()
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= count:
                raise BackendError(f"This machine has {count} GPUs; start no more processes on it than that.")
            torch.cuda.set_device(local)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise BackendError(f"The processes of torchrun cannot be joined ({reason}); see its options.") from None
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise TrainingError("Another process of this run has stopped; what it said last tells why.") from None
