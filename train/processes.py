"""The processes that share a run: what the loop asks of them, and how the error of one stops them all.

- `torchrun` or `mlx.launch` starts them; each takes every world-th lane of a step (see `train.order`).
- All of them must exchange the same things in the same order, or they wait for each other for ever. So a process fails
  only where the others look whether it has: in `agreed`.
- Process 0 writes the folder, logs, and tells the user; the others are quiet.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ivcore.backend import choose
from ivcore.errors import BackendError, IvError, OtherProcessError, TrainingError

T = TypeVar("T")


class Processes(Protocol):
    """One process among those of a run: the `rank`-th of `world`, counted from 0."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, on every one of them; what JSON can hold."""
        ...


class Alone:
    """The only process of a run."""

    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


ALONE = Alone()


def launched() -> dict[str, int]:
    """This process's rank by what has started it with others, `torchrun` or `mlx.launch`, from the environment."""
    found = {}
    if {"RANK", "MASTER_ADDR"} <= os.environ.keys() and os.environ.get("WORLD_SIZE", "1") != "1":
        found["torchrun"] = int(os.environ["RANK"])
    if "MLX_RANK" in os.environ:
        found["mlx.launch"] = int(os.environ["MLX_RANK"])
    return found


def is_first() -> bool:
    """Whether this process is the one that speaks to the user; known before any backend is loaded."""
    return not any(launched().values())


def join(backend: str) -> Processes:
    """This process among those that were started together; BackendError where another backend's launcher has."""
    name = choose(backend)
    ours, other = ("mlx.launch", "torchrun") if name == "mlx" else ("torchrun", "mlx.launch")
    if other in (found := launched()) and ours not in found:
        if not is_first():
            raise OtherProcessError
        raise BackendError(
            f"{other} has started this, which is not for the backend {name}; use {ours}, or name the other --backend."
        )
    processes: Processes = importlib.import_module(f"iv{name}.processes").join()
    return processes


@contextmanager
def agreed(processes: Processes) -> Iterator[None]:
    """What every process does for itself: where it fails on one, it fails on all, once all are done with it.

    Process 0 raises its own error, or one with the message of another's. The others raise OtherProcessError, or their
    own error where it is none that is meant for users.
    """
    own, said = None, None
    try:
        yield
    except Exception as error:
        if processes.world == 1:
            raise
        unexpected = f"Process {processes.rank} stopped with an unexpected {type(error).__name__}: {error}."
        own, said = error, str(error) if isinstance(error, IvError) else unexpected
    reasons = [each for each in processes.gather(said) if each is not None]
    if not reasons:
        return
    if own is not None and (processes.rank == 0 or not isinstance(own, IvError)):
        raise own
    raise OtherProcessError if processes.rank else TrainingError(reasons[0])


def summed(processes: Processes, numbers: Mapping[str, float]) -> dict[str, float]:
    """Sums over processes, name by name; a process need not have all of them."""
    totals: dict[str, float] = {}
    for each in processes.gather(dict(numbers)):
        for name, value in each.items():
            totals[name] = totals.get(name, 0) + value
    return totals


def by_lane(processes: Processes, values: Sequence[T]) -> list[T]:
    """What all processes have, one value a lane, in the order in which one process alone would have them."""
    turns = zip(*processes.gather(list(values)), strict=True)
    return [value for turn in turns for value in turn]
