"""`iv3 info`: what a checkpoint is, whether it runs here, what memory it takes; as numbers (`info_view` shows them).

Nothing is loaded: config.json and the safetensors headers say it all, so it works on a model that is not downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

from agent.machine import Memory, machine
from agent.units import human_bytes
from ivcore.backend import choose
from ivcore.checkpoint import check_specs, stored_dtype
from ivcore.config import ModelConfig, QuantizationConfig
from ivcore.errors import BackendError, IvError
from ivcore.hub import Description, describe
from ivcore.schedule import DEFAULT_MEMORY_BUDGET
from ivcore.shards import DTYPE_BYTES, TensorSpec

Fit = Literal["fits", "tight", "too large"]

PARTS = {
    "vision": "model.visual.",
    "embeddings": "model.language_model.embed_tokens.",
    "decoder": "model.language_model.",
    "head": "lm_head.",
    "other": "",
}
"""The prefix of a part's tensors; the first that fits counts."""

USUAL_CONTEXTS = (8_192, 32_768, 131_072)
FOUR_BIT = 4.5 / 8
"""Bytes a parameter in MLX's 4-bit form: a float16 scale and bias for every 64."""


@dataclass(frozen=True)
class Part:
    """parameters: of the dense matrices, whatever they are packed into; dtypes: safetensors dtype -> bytes."""

    parameters: int
    nbytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class CacheCost:
    """What one token leaves in the cache, beside the grouped-query form of the same heads."""

    dtype: str
    numbers_by_layer: tuple[int, ...]
    gqa_numbers_by_layer: int
    bytes_per_token: int
    gqa_bytes_per_token: int
    ratio: float


@dataclass(frozen=True)
class ContextMemory:
    """Bytes that a context takes. tight: it fits the memory as a whole, but not in what is free now."""

    tokens: int
    weights: int
    cache: int
    working: int
    total: int
    fit: Fit


@dataclass(frozen=True)
class Report:
    """Everything `iv3 info` says; what cannot be known of a checkpoint that does not run is None or empty."""

    model: str
    title: str
    config: ModelConfig | None
    parts: dict[str, Part]
    nbytes: int
    backend: str | None
    memories: list[Memory]
    error: IvError | None
    cache: CacheCost | None = None
    context: int | None = None
    contexts: tuple[ContextMemory, ...] = ()
    verdict: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints; sizes are in bytes."""
        content = asdict(replace(self, config=None, error=None))
        content["config"] = self.config.to_dict() if self.config else None
        del content["error"]
        return content | {
            "parameters": sum(part.parameters for part in self.parts.values()),
            "runs": self.error is None,
            "reason": str(self.error) if self.error else None,
        }


def info(model: str, context: int | None, as_json: bool) -> None:
    """Print what is known of a model; at the end raises the ConfigError or CheckpointError that stands in its way."""
    made = report(describe(model), context)
    if as_json:
        import json

        print(json.dumps(made.to_dict(), indent=1))
    else:
        from agent.info_view import show

        show(made)
    if made.error:
        raise made.error


def report(described: Description, context: int | None = None, memories: list[Memory] | None = None,
           backend: str | None = None) -> Report:  # fmt: skip
    """The report on a checkpoint; memories and backend: this machine's unless given.

    context: tokens to plan for, the model's own limit by default.
    """
    backend = backend or _backend()
    memories = memories or machine(backend)
    config, error = _read(described)
    parts = _parts(described.specs, config.quantization if config else None)
    base = Report(
        described.source, _title(described, config), config, parts, described.nbytes, backend, memories, error
    )
    if config is None:
        return base
    limit = config.text.max_position_embeddings
    context = context or limit
    cache = _cache(config, described.specs)
    weights = described.nbytes
    if config.quantization and backend == "torch":
        # PyTorch has no kernels for MLX's packed form: it is expanded when it is loaded.
        weights = sum(part.parameters for part in parts.values()) * DTYPE_BYTES[cache.dtype]
    tokens = sorted({context, *(usual for usual in USUAL_CONTEXTS if usual <= limit)})
    contexts = tuple(_memory(count, weights, cache.bytes_per_token, memories[0]) for count in tokens)
    base = replace(base, cache=cache, context=context, contexts=contexts)
    beyond = f" The model was made for {limit:,} tokens at most." if context > limit else ""
    return replace(base, verdict=_verdict(base) + beyond)


def _backend() -> str | None:
    try:
        return choose()
    except BackendError:
        return None


def _read(described: Description) -> tuple[ModelConfig | None, IvError | None]:
    """The config, and what keeps the checkpoint from running."""
    shapes = {name: spec.shape for name, spec in described.specs.items()}
    config = None
    try:
        config = ModelConfig.from_dict(described.config, shapes=shapes, source=f"{described.source}/config.json")
        check_specs(described.specs, config, described.source)
    except IvError as error:
        return config, error
    return config, None


def _title(described: Description, config: ModelConfig | None) -> str:
    if config is None:
        return f"model_type {described.config.get('model_type')!r}, which does not run here"
    geometry = config.text.geometry
    attention = f"M2LA {geometry.layout} layout" if geometry.kind == "m2la" else "grouped-query attention"
    if config.model_type == "internvideo3":
        return f"InternVideo3 (Qwen3-VL body, {attention})"
    return f"Qwen3-VL ({attention})"


def _parts(specs: Mapping[str, TensorSpec], quantization: QuantizationConfig | None) -> dict[str, Part]:
    tensors: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in specs:
        tensors[next(part for part, prefix in PARTS.items() if name.startswith(prefix))].append(name)
    parts = {}
    for part, names in tensors.items():
        dtypes: dict[str, int] = {}
        for name in names:
            dtypes[specs[name].dtype] = dtypes.get(specs[name].dtype, 0) + specs[name].nbytes
        if names:
            parameters = sum(_parameters(name, specs, quantization) for name in names)
            parts[part] = Part(parameters, sum(dtypes.values()), dtypes)
    return parts


def _parameters(name: str, specs: Mapping[str, TensorSpec], quantization: QuantizationConfig | None) -> int:
    """Numbers in a tensor; a packed weight counts as the matrix it stands for, its scales and biases not at all."""
    module, _, kind = name.rpartition(".")
    scales = specs.get(f"{module}.scales")
    setting = quantization.of_module(module) if quantization and scales else None
    if scales is None or setting is None or kind not in ("weight", "scales", "biases"):
        return prod(specs[name].shape)
    return prod(scales.shape) * setting[1] if kind == "weight" else 0


def _cache(config: ModelConfig, specs: Mapping[str, TensorSpec]) -> CacheCost:
    dtype = stored_dtype(specs)  # what both backends compute in
    geometry, layers = config.text.geometry, config.text.num_hidden_layers
    numbers = tuple(geometry.cache_width(layer) for layer in range(layers))
    gqa = geometry.gqa_cache_width
    size = DTYPE_BYTES[dtype]
    return CacheCost(dtype, numbers, gqa, sum(numbers) * size, layers * gqa * size, sum(numbers) / (layers * gqa))


def _memory(tokens: int, weights: int, per_token: int, memory: Memory) -> ContextMemory:
    total = weights + tokens * per_token + DEFAULT_MEMORY_BUDGET
    fit: Fit = "fits"
    if total > memory.total:
        fit = "too large"
    elif memory.available is not None and total > memory.available:
        fit = "tight"
    return ContextMemory(tokens, weights, tokens * per_token, DEFAULT_MEMORY_BUDGET, total, fit)


def _verdict(made: Report) -> str:
    """One sentence on the context asked for, with a way out where it does not fit."""
    asked = next(row for row in made.contexts if row.tokens == made.context)
    memory = made.memories[0]
    takes = f"{asked.tokens:,} tokens take {human_bytes(asked.total)}"
    if asked.fit == "fits":
        return f"fits: {takes} of {human_bytes(memory.total)} ({memory.name})."
    if asked.fit == "tight":
        free = f"{human_bytes(memory.available or 0)} of {human_bytes(memory.total)}"
        return f"fits once other programs free memory: {takes}, and {free} ({memory.name}) are free now."
    ways = " or ".join(_ways_out(made, asked)) or "a machine with more memory"
    return f"does not fit: {takes}, and {memory.name} has {human_bytes(memory.total)}; try {ways}."


def _ways_out(made: Report, asked: ContextMemory) -> list[str]:
    memory, cache, config = made.memories[0], made.cache, made.config
    assert cache and config
    room = (memory.available or memory.total) - asked.working

    def longest(weights: int) -> int:
        return min(
            asked.tokens, config.text.max_position_embeddings, (room - weights) // cache.bytes_per_token // 1024 * 1024
        )

    ways = []
    if (tokens := longest(asked.weights)) > 0:
        ways.append(f"a context of {tokens:,}")
    vision = made.parts["vision"].nbytes if "vision" in made.parts else 0
    language = sum(part.parameters for name, part in made.parts.items() if name != "vision")
    tokens = longest(vision + int(language * FOUR_BIT))
    # PyTorch expands packed weights, so that they save nothing there.
    if tokens > 0 and not config.quantization and made.backend != "torch":
        ways.append("a 4-bit conversion" + (f" with a context of {tokens:,}" if tokens < asked.tokens else ""))
    return ways
