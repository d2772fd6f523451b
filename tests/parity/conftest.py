"""Fixtures of the parity tests: the two backends, the reference checkpoints, and random checkpoints of any shape."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.inputs import ModelInputs
from ivcore.schedule import DEFAULT_MEMORY_BUDGET
from ivcore.shards import TensorSpec, write_checkpoint

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
BACKENDS = ("mlx", "torch")
Weights = dict[str, np.ndarray]
WriteRandom = Callable[..., Weights]


@dataclass(frozen=True)
class Reference:
    """A reference checkpoint, the prompt it was given, and what the outside implementation computed on it."""

    path: Path
    expected: dict[str, np.ndarray]
    inputs: ModelInputs


@cache
def _reference(name: str) -> Reference:
    with np.load(REFERENCE / name / "expected.npz") as arrays:
        expected = dict(arrays)
    inputs = ModelInputs(
        expected["input_ids"].astype(np.int32),
        np.concatenate([expected["pixel_values_videos"], expected["pixel_values"]]),
        np.concatenate([expected["video_grid_thw"], expected["image_grid_thw"]]).astype(np.int32),
    )
    return Reference(REFERENCE / name, expected, inputs)


@cache
def _reference_model(backend: str, name: str) -> Any:
    return pytest.importorskip(f"iv{backend}").load(REFERENCE / name)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Matrices here are tiny: where cores are shared, handing them to several threads makes a test 100 times slower."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["iv3-micro", "qwen3vl-micro"])
def reference(request: pytest.FixtureRequest) -> Reference:
    return _reference(request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """ivmlx, then ivtorch; a backend that is not installed is skipped."""
    return pytest.importorskip(f"iv{request.param}")


@pytest.fixture
def model(backend: ModuleType, reference: Reference) -> Iterator[Any]:
    """The reference checkpoint on a backend; its settings are put back after the test."""
    loaded = _reference_model(backend.__name__.removeprefix("iv"), reference.path.name)
    yield loaded
    loaded.form, loaded.memory_budget = "auto", DEFAULT_MEMORY_BUDGET


@pytest.fixture
def both(reference: Reference) -> dict[str, Any]:
    """The reference checkpoint on both backends, by their names."""
    return {name: _reference_model(name, reference.path.name) for name in BACKENDS}


@pytest.fixture(scope="session")
def libraries() -> dict[str, ModuleType]:
    """Both backends by name; skipped where one is not installed."""
    return {name: pytest.importorskip(f"iv{name}") for name in BACKENDS}


@pytest.fixture(scope="session")
def restatement() -> ModuleType:
    """restatement.py, the whole model in plain NumPy float64."""
    name = "parity_restatement"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("restatement.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def write_random() -> WriteRandom:
    """Function (folder, config.json's content, seed=0) that writes a random float32 checkpoint; gives its weights."""
    return _write_random


def _write_random(folder: Path, raw: dict[str, Any], seed: int = 0, **how: Any) -> Weights:
    random = np.random.default_rng(seed)
    weights = {
        name: _random_tensor(random, name, shape) for name, shape in manifest(ModelConfig.from_dict(raw)).items()
    }
    specs = {name: TensorSpec(array.shape, "F32") for name, array in weights.items()}
    write_checkpoint(folder, raw, specs, weights.items(), **how)
    return weights


def _random_tensor(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Scaled so that every term of the model matters: activations and attention scores stay near 1."""
    values = random.standard_normal(shape)
    if "norm" in name and name.endswith("weight"):
        values = 1 + values / 4
    elif name.endswith("weight") and len(shape) > 1 and "embed_tokens" not in name and "pos_embed" not in name:
        values /= np.sqrt(np.prod(shape[1:]))
    elif name.endswith("bias"):
        values /= 3
    return values.astype(np.float32)
