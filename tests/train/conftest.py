"""Fixtures of the training tests: both backends, small checkpoints of every attention, packed batches, each loss."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ivcore.config import ModelConfig
from ivcore.inputs import ModelInputs
from ivcore.positions import position_ids
from ivcore.training import Batch, Distill, LoraSettings, Loss, NextToken, OptimizerSettings, Policy

__all__ = ["ModelConfig", "ModelInputs"]
TESTS = Path(__file__).resolve().parents[1]
REFERENCE = TESTS / "data" / "reference"
BACKENDS = ("mlx", "torch")
LOSSES = ("next token", "policy", "policy with a reference", "distill", "distill with a forward share",
          "distill on samples")  # fmt: skip
SMALL_RANK = LoraSettings(rank=3, alpha=5, rank_stabilized=True)


def neighbour(room: str, name: str) -> ModuleType:
    """A module of another folder of tests."""
    known = f"{room}_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, TESTS / room / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


@dataclass(frozen=True)
class Row:
    """One row of a batch before it is packed."""

    token_ids: np.ndarray
    pixels: np.ndarray | None = None
    grid_thw: np.ndarray | None = None


def pack(config: ModelConfig, rows: list[Row], seed: int = 0) -> Batch:
    """Rows as one batch with random targets and, at about half of the places, random weights."""
    random = np.random.default_rng(seed)
    positions = [
        position_ids(
            row.token_ids,
            row.grid_thw,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            merge_size=config.vision.spatial_merge_size,
        )
        for row in rows
    ]
    count = sum(len(row.token_ids) for row in rows)
    with_media = [row for row in rows if row.pixels is not None]
    weights = random.uniform(0.2, 1, count) * (random.random(count) < 0.5) / count
    return Batch(
        np.concatenate([row.token_ids for row in rows]).astype(np.int32),
        np.concatenate(positions, axis=1),
        np.array([len(row.token_ids) for row in rows], np.int32),
        np.concatenate([row.pixels for row in with_media]) if with_media else None,
        np.concatenate([row.grid_thw for row in with_media]) if with_media else None,
        np.where(weights > 0, random.integers(0, config.text.vocab_size, count), 0).astype(np.int32),
        weights.astype(np.float32),
    )


def trainer_of(model: Any, lora: LoraSettings | None, *, optimizer: OptimizerSettings | None = None, **how: Any) -> Any:
    """A Trainer of the model's backend."""
    library = importlib.import_module(f"iv{model.backend}.train")
    return library.Trainer(model, lora=lora, optimizer=optimizer or OptimizerSettings(), **how)


def array_of(backend: str, array: np.ndarray) -> Any:
    """An array of a backend's own."""
    make = {"mlx": ("mlx.core", "array"), "torch": ("torch", "tensor")}[backend]
    return getattr(importlib.import_module(make[0]), make[1])(array)


def load_adapter(model: Any, path: Path) -> None:
    """The backend's own `load_adapter`."""
    importlib.import_module(f"iv{model.backend}.lora").load_adapter(model, path)


def make_loss(kind: str, batch: Batch, vocab_size: int, seed: int = 0) -> Loss:
    """A loss of random numbers around which its kinks are not hit exactly."""
    random, count = np.random.default_rng(seed), len(batch.token_ids)

    def numbers(scale: float, shift: float = 0.0) -> np.ndarray:
        return (shift + scale * random.standard_normal(count)).astype(np.float32)

    if kind == "next token":
        return NextToken()
    if kind.startswith("policy"):
        old = numbers(1, -np.log(vocab_size))
        loss = Policy(old, numbers(1), clip_low=0.2, clip_high=0.28)
        return replace(loss, reference_logprobs=old + numbers(0.3), kl_weight=0.1) if "reference" in kind else loss
    if kind == "distill on samples":
        return Distill(numbers(1, -np.log(vocab_size)))
    scores = random.standard_normal((len(batch.places), vocab_size))
    teacher = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return Distill(teacher.astype(np.float32), forward_share=0.3 if "forward" in kind else 0.0)


def randomize(trainer: Any, seed: int = 0) -> Any:
    """Give a LoRA's B numbers, with which its A has a gradient too; returns the trainer."""
    random, state = np.random.default_rng(seed), trainer.state()
    for name in sorted(state):
        if name.startswith("weight.") and name.endswith("lora_B.weight"):
            state[name] = (random.standard_normal(state[name].shape) / 10).astype(np.float32)
    trainer.load_state(state)
    return trainer


def furthest(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative distance of two gradients' tensors, |found - expected| / |expected|.

    A tensor a thousand times smaller than the largest one counts as that large: a gradient that is zero in exact
    arithmetic, such as that of a bias to the keys, is rounding alone.
    """
    assert found.keys() == expected.keys()
    least = 1e-3 * max(np.linalg.norm(array) for array in expected.values())
    assert least > 0
    return max(
        float(np.linalg.norm(found[name] - array) / max(np.linalg.norm(array), least))
        for name, array in expected.items()
    )


@dataclass(frozen=True)
class Lab:
    """One checkpoint and a packed batch, to be trained on either backend from the same start."""

    path: Path
    batch: Batch

    def model(self, backend: str, **how: Any) -> Any:
        return pytest.importorskip(f"iv{backend}").load(self.path, **how)

    def trainer(self, backend: str, lora: LoraSettings | None = SMALL_RANK, *, model: Any = None, **how: Any) -> Any:
        """A Trainer on a model, freshly loaded unless given, with numbers in the B of a LoRA."""
        trainer = trainer_of(model or self.model(backend), lora, **how)
        return trainer if lora is None else randomize(trainer)

    def loss(self, kind: str, batch: Batch | None = None) -> Loss:
        return make_loss(kind, batch or self.batch, ModelConfig.from_dir(self.path).text.vocab_size)


@cache
def reference_row(name: str) -> Row:
    """The prompt of a reference checkpoint: text, a video of 3 temporal patches, text, an image, text."""
    with np.load(REFERENCE / name / "expected.npz") as arrays:
        expected = dict(arrays)
    return Row(
        expected["input_ids"].astype(np.int32),
        np.concatenate([expected["pixel_values_videos"], expected["pixel_values"]]),
        np.concatenate([expected["video_grid_thw"], expected["image_grid_thw"]]).astype(np.int32),
    )


def media_row(seed: int) -> Row:
    """Text, a video of 2 frames of 4 x 4 patches, text, an image of 2 x 4, text, for a reference checkpoint."""
    random = np.random.default_rng(seed)
    words = iter(random.integers(0, 500, 20).tolist())
    frame, image = [502, *[506] * 4, 503], [502, *[505] * 2, 503]
    token_ids = [next(words), *frame, next(words), *frame, next(words), next(words), *image, *words]
    pixels = random.standard_normal((40, 1536)).astype(np.float32)
    return Row(np.array(token_ids[:30], np.int32), pixels, np.array([[2, 4, 4], [1, 2, 4]], np.int32))


def lab_of(name: str) -> Lab:
    """A reference checkpoint with rows of text, media, text, media, text, of lengths that group oddly."""
    random = np.random.default_rng(1)
    text = [Row(random.integers(0, 500, length).astype(np.int32)) for length in (9, 28, 1)]
    rows = [text[0], media_row(1), text[1], media_row(2), text[2]]
    return Lab(REFERENCE / name, pack(ModelConfig.from_dir(REFERENCE / name), rows))


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Matrices here are tiny: where cores are shared, handing them to several threads makes a test 100 times slower.

    So also for an OpenBLAS that was preloaded: its sums depend on how many threads share them, and bytes are compared.
    """
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if openblas := getattr(ctypes.CDLL(None), "openblas_set_num_threads", None):
        openblas(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["iv3-micro", "qwen3vl-micro"])
def lab(request: pytest.FixtureRequest) -> Lab:
    return lab_of(request.param)


@pytest.fixture
def one_lab() -> Lab:
    """The same of InternVideo3's form alone, where the form of the attention makes no difference."""
    return lab_of("iv3-micro")


@pytest.fixture(params=LOSSES)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of loss that `make_loss` knows."""
    return str(request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """`mlx`, then `torch`; a backend that is not installed is skipped."""
    pytest.importorskip(f"iv{request.param}")
    return str(request.param)


@pytest.fixture(scope="session")
def tools() -> Any:
    """This module: what tests call by name."""
    return sys.modules[__name__]


@pytest.fixture
def write_random() -> Callable[..., dict[str, np.ndarray]]:
    """The random checkpoints of the parity tests."""
    write: Callable[..., dict[str, np.ndarray]] = neighbour("parity", "conftest")._write_random
    return write
