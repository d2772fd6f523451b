"""The protocol that both backends meet, and `load`, which picks one."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ivcore.config import ModelConfig
from ivcore.errors import BackendError
from ivcore.hub import resolve
from ivcore.inputs import ModelInputs
from ivcore.sampling import Sampling

BackendName = Literal["auto", "mlx", "torch"]
Progress = Callable[[str, int, int], None]
Observer = Callable[[str, np.ndarray], np.ndarray | None]


class Cache(Protocol):
    """What the model has read so far; append-only but for `trim`."""

    @property
    def length(self) -> int: ...
    @property
    def next_position(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def trim(self, n: int) -> int: ...
    def fork(self) -> Cache: ...


class Model(Protocol):
    """A loaded checkpoint; see `ivmlx.generate.Model` or its twin for each method's shapes."""

    backend: str
    config: ModelConfig
    dtype: str
    stop_ids: frozenset[int]
    memory_budget: int

    @property
    def weight_bytes(self) -> int: ...
    def peak_bytes(self) -> int: ...
    def new_cache(self) -> Any: ...
    def encode_vision(self, pixels: np.ndarray, grid_thw: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def encode_groups(
        self, pixels: np.ndarray, grid_thw: np.ndarray, observe: Observer | None = None
    ) -> Iterator[tuple[Any, list[Any]]]: ...
    def logits(
        self, inputs: ModelInputs, observe: Observer | None = None, positions: np.ndarray | None = None
    ) -> np.ndarray: ...
    def prefill(
        self, inputs: ModelInputs, cache: Any, *, chunk: int | None = None, on_progress: Progress | None = None
    ) -> np.ndarray: ...
    def decode(self, token_id: int, cache: Any) -> np.ndarray: ...
    def generate(
        self,
        inputs: ModelInputs,
        *,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        cache: Any = None,
        on_progress: Progress | None = None,
    ) -> Iterator[int]: ...
    def continue_from(
        self, logits: np.ndarray, cache: Any, *, max_tokens: int = 512, sampling: Sampling | None = None
    ) -> Iterator[int]: ...
    def continue_each(
        self, logits: np.ndarray, cache: Any, samplings: Sequence[Sampling], *, max_tokens: int = 512
    ) -> list[list[int]]: ...


def load(path: str | Path, backend: BackendName = "auto", dtype: str | None = None) -> Model:
    """The model in a folder, or of a Hugging Face id with an optional `@revision`, on a backend.

    "auto" is MLX on Apple silicon, else PyTorch, on CUDA where there is a GPU. dtype: "float32", "bfloat16" or
    "float16"; None keeps what is stored. Remote code is never run and nothing is unpickled.
    """
    module = importlib.import_module(f"iv{choose(backend)}")
    model: Model = module.load(resolve(path), dtype=dtype)
    return model


def choose(backend: str = "auto") -> Literal["mlx", "torch"]:
    """The backend that a name means on this machine; BackendError when it is not installed."""
    if backend not in ("auto", "mlx", "torch"):
        raise BackendError(f"There is no backend {backend!r}; use mlx, torch or auto.")
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    wanted = [backend] if backend != "auto" else ["mlx", "torch"] if apple else ["torch", "mlx"]
    for name in wanted:
        if importlib.util.find_spec(name):
            return "mlx" if name == "mlx" else "torch"
    raise BackendError(f"No backend is installed: run pip install 'ivmlx[{wanted[0]}]'.")
