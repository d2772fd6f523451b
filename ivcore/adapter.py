"""A LoRA adapter in PEFT's file form: read, to be merged into its model's weights or to run beside them, and written.

Notable:
- The names of modules are our checkpoints' own; PEFT puts `base_model.model.` before them.
- What a merge could not honour is an error: DoRA and other variants, trained biases or whole modules, embeddings, and
  adapters that began by changing the base weights, such as PiSSA's.
- The matrices stay in the mapped file and are widened a block at a time.

Source: LoRA, arXiv 2106.09685; its scale with `use_rslora`, arXiv 2312.03732; files and patterns as PEFT 0.21 has them
(peft/tuners/lora/model.py, peft/utils/other.py `get_pattern_key`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivcore.errors import CheckpointError, ConfigError
from ivcore.files import read_json
from ivcore.floats import finite, widen
from ivcore.shards import FLOATS, STORED_AS, TensorSpec, header_bytes, read_header, read_spans
from ivcore.training import LoraSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")
# Fields that, when set, mean more than W + scale * B @ A.
_UNSUPPORTED = (
    *("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    "monteclora_config",
)
# Initialisations that subtract what the adapter begins with from the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class _Update:
    """A module's scale * b @ a; a: (rank, in), b: (out, rank), each in the stored form of its dtype."""

    a: np.ndarray
    b: np.ndarray
    a_dtype: str
    b_dtype: str
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


class Adapter:
    """The low-rank updates of an adapter's folder; `files` are what it was read from."""

    def __init__(self, path: Path, updates: Mapping[str, _Update]) -> None:
        self.path = path
        self.files = (path / CONFIG, path / WEIGHTS)
        self.modules = frozenset(updates)
        self._updates = dict(updates)

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """The adapter in a folder; CheckpointError where a file is missing or damaged, or cannot be merged."""
        folder = Path(path)
        _refuse_missing(folder)
        settings = _Settings.read(folder / CONFIG)
        file = folder / WEIGHTS
        specs = read_header(file)
        modules = {name.removeprefix(_PREFIX).removesuffix(end) for end in _FACTORS for name in specs
                   if name.startswith(_PREFIX) and name.endswith(end)}  # fmt: skip
        if problems := _problems(specs, modules, settings):
            raise CheckpointError(f"{file} cannot be merged: " + "; ".join(problems) + ".")
        spans = read_spans(file)

        def read(name: str) -> np.ndarray:
            spec = specs[name]
            array = np.memmap(file, STORED_AS[spec.dtype], "r", spans[name][0], spec.shape)
            if not finite(array, spec.dtype):
                raise CheckpointError(f"{file}: {name} holds NaN or infinity; save or download the adapter again.")
            return array

        updates = {}
        for module in sorted(modules):
            a, b = (f"{_PREFIX}{module}{end}" for end in _FACTORS)
            updates[module] = _Update(read(a), read(b), specs[a].dtype, specs[b].dtype, settings.scale(module))
        return cls(folder, updates)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with a model's modules, name -> shape of the weight; one CheckpointError lists all that differ."""
        problems = []
        for module, update in self._updates.items():
            if module not in shapes:
                problems.append(f"there is no {module}")
            elif shapes[module] != update.shape:
                problems.append(f"{module} is {list(shapes[module])}, not {list(update.shape)}")
        if problems:
            raise CheckpointError(
                f"The adapter in {self.path} was made for another model; in this one "
                + "; ".join(sorted(problems)) + "."
            )  # fmt: skip

    def delta(self, module: str, rows: slice) -> np.ndarray:
        """What a module's weight gains in these rows, float32 (rows, in)."""
        update = self._updates[module]
        gain = widen(update.b[rows], update.b_dtype) @ widen(update.a, update.a_dtype)
        gain *= np.float32(update.scale)
        return gain

    def factors(self, module: str) -> tuple[np.ndarray, np.ndarray, float]:
        """A module's A (rank, in) and B (out, rank) in float32, and the scale of their product."""
        update = self._updates[module]
        return widen(update.a, update.a_dtype), widen(update.b, update.b_dtype), update.scale


def write_adapter(
    path: str | Path, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], settings: LoraSettings
) -> None:
    """Write module -> float32 A (rank, in) and B (out, rank) as a folder that PEFT and `Adapter.load` read.

    Both files are written beside and renamed when they are whole, the weights last: an adapter that was there before
    stays until then. Raises CheckpointError when they cannot be written.
    """
    folder = Path(path)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rank_stabilized,
        "lora_dropout": settings.dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(factors),
    }
    tensors = {
        f"{_PREFIX}{module}{end}": np.ascontiguousarray(factor)
        for module in sorted(factors)
        for end, factor in zip(_FACTORS, factors[module], strict=True)
    }
    specs = {name: TensorSpec(tensor.shape, "F32") for name, tensor in tensors.items()}
    parts = {name: folder / f"{name}.part" for name in (CONFIG, WEIGHTS)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts[CONFIG].write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        with parts[WEIGHTS].open("wb") as stream:
            stream.write(header_bytes(specs))
            for tensor in tensors.values():
                stream.write(tensor.data)
            stream.flush()
            os.fsync(stream.fileno())
        for name, part in parts.items():
            os.replace(part, folder / name)
    except OSError as error:
        raise CheckpointError(f"The adapter {folder} cannot be written ({error.strerror}); it is unchanged.") from None
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.unlink()


@dataclass(frozen=True)
class _Settings:
    """What an adapter_config.json says of ranks and scales; the patterns are regular expressions of modules' ends."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool

    @classmethod
    def read(cls, file: Path) -> _Settings:
        try:
            config = read_json(file)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if config.get("peft_type") != "LORA":
            raise CheckpointError(f"{file}: peft_type is {config.get('peft_type')!r}, but only LORA can be merged.")
        unsupported = [f"{name}={config[name]!r}" for name in _UNSUPPORTED if config.get(name)]
        if config.get("bias", "none") != "none":
            unsupported.append(f"bias={config['bias']!r}")
        if unsupported:
            raise CheckpointError(
                f"{file} sets {', '.join(unsupported)}, which cannot be merged here; merge the adapter with PEFT, "
                "or train one without."
            )
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise CheckpointError(
                f"{file}: init_lora_weights is {start!r}, which changed the base weights before training; save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion."
            )
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        for field, ok in {
            "r": _is_rank(config.get("r")),
            "lora_alpha": _is_number(config.get("lora_alpha")),
            "rank_pattern": _is_pattern(ranks) and all(map(_is_rank, ranks.values())),
            "alpha_pattern": _is_pattern(alphas) and all(map(_is_number, alphas.values())),
        }.items():
            if not ok:
                raise CheckpointError(f"{file} has no valid {field}; save or download the adapter again.")
        return cls(config["r"], config["lora_alpha"], ranks, alphas, bool(config.get("use_rslora")))

    def rank_of(self, module: str) -> int:
        return _of_module(module, self.rank_pattern, self.rank)

    def scale(self, module: str) -> float:
        rank = self.rank_of(module)
        return _of_module(module, self.alpha_pattern, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def _refuse_missing(folder: Path) -> None:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; name the folder of a LoRA adapter.")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            if name == WEIGHTS and (folder / _PICKLE).exists():
                raise CheckpointError(f"{folder / _PICKLE} is a pickle, which is not opened; save it as {WEIGHTS}.")
            raise CheckpointError(f"There is no {name} in {folder}; name the folder of a LoRA adapter in PEFT's form.")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST


def _is_pattern(value: Any) -> bool:
    """Whether it is an object whose keys are regular expressions."""
    try:
        return isinstance(value, dict) and all(map(_expression, value))
    except re.error:
        return False


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _of_module(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that matches a module's name or its end, in the file's order as in PEFT."""
    for pattern, value in patterns.items():
        if _expression(pattern).match(module):
            return value
    return default


def _problems(specs: Mapping[str, TensorSpec], modules: Set[str], settings: _Settings) -> list[str]:
    """What is wrong with an adapter's tensors, each in a few words."""
    known = {f"{_PREFIX}{module}{end}": (module, axis) for module in modules for axis, end in enumerate(_FACTORS)}
    problems = [f"{name} is missing" for name in known.keys() - specs.keys()]
    for name, spec in specs.items():
        if name not in known:
            problems.append(f"{name} is not lora_A or lora_B of a linear layer")
            continue
        module, axis = known[name]
        if spec.dtype not in FLOATS:
            problems.append(f"{name} is {spec.dtype}, which is not supported")
        if len(spec.shape) != 2 or 0 in spec.shape:
            problems.append(f"{name} has shape {list(spec.shape)}, which is no matrix")
        elif spec.shape[axis] != (rank := settings.rank_of(module)):
            problems.append(f"{name} has rank {spec.shape[axis]}, but {CONFIG} says {rank}")
    if not specs:
        problems.append("it holds no tensors")
    return sorted(problems)
