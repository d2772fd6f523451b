"""The plan of a conversion to M2LA: everything that can be refused is refused here, before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import numpy as np

from convert.m2la.layouts import converted_config
from convert.m2la.options import Options
from convert.plan import DEFAULT_SHARD_BYTES
from convert.record import ends_of, versions
from convert.source import Source
from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.errors import ConfigError
from ivcore.geometry import LAYER_PREFIX
from ivcore.inputs import ModelInputs
from ivcore.positions import position_ids
from ivcore.shards import DTYPE_BYTES, TensorSpec

HELD_OUT_EVERY = 5
"""One prompt in so many is left out of the calibration and measured afterwards."""

_PIXEL_ROWS = 4096


@dataclass(frozen=True)
class Prompt:
    """positions: int32 (3, S); visual: bool (S,), where media stand."""

    inputs: ModelInputs
    positions: np.ndarray
    visual: np.ndarray

    @classmethod
    def of(cls, inputs: ModelInputs, config: ModelConfig) -> Prompt:
        """Raises PromptError where inputs do not fit the model."""
        inputs.check(config)
        positions = inputs.position_ids
        if positions is None:
            positions = position_ids(
                inputs.token_ids,
                inputs.grid_thw,
                image_token_id=config.image_token_id,
                video_token_id=config.video_token_id,
                merge_size=config.vision.spatial_merge_size,
            )
        visual = np.isin(inputs.token_ids, (config.image_token_id, config.video_token_id))
        return cls(inputs, positions, visual)


@dataclass(frozen=True)
class AttentionPlan:
    """width: numbers a token and layer in the cache, on average over layers."""

    source: Source
    options: Options
    backend: str
    calibration: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    width: int
    shard_bytes: int = DEFAULT_SHARD_BYTES

    @property
    def config(self) -> dict[str, Any]:
        """config.json's content where all layers are alike; the layers' own ranks are known when all are measured."""
        geometry = self.source.config.text.geometry
        rope_heads = self.options.rope_choices(geometry)[0]
        layers = self.source.config.text.num_hidden_layers
        rank = min(self.width, (2 * geometry.num_kv_heads) * geometry.head_dim) - rope_heads * geometry.head_dim
        return converted_config(self.source.config, self.options.layout, [rank] * layers, [rope_heads] * layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to be written where all layers are alike, and of the work kept until then."""
        text = self.source.config.text
        tokens = sum(len(prompt.visual) for prompt in self.calibration)
        layers = text.num_hidden_layers
        states = (2 + len(self.source.config.vision.deepstack_visual_indexes)) * tokens * text.hidden_size * 4
        moments = layers * 8 * (text.geometry.gqa_cache_width**2 + text.num_attention_heads * text.head_dim**2)
        return sum(spec.nbytes for spec in tensor_specs(self.source, self.config).values()) + states + moments

    @property
    def spends(self) -> bool:
        """Whether layers may differ in what they cache."""
        return self.options.method.per_layer and self.options.rank is None

    def cache_bytes(self) -> tuple[int, int]:
        """Bytes a token in the caches of all layers, before and after, in the dtype that the keys are stored in."""
        text, specs = self.source.config.text, self.source.checkpoint.specs
        each = DTYPE_BYTES[_dtype(specs[f"{LAYER_PREFIX.format(layer=0)}self_attn.k_proj.weight"].dtype)]
        return tuple(text.num_hidden_layers * width * each for width in (text.geometry.gqa_cache_width, self.width))  # type: ignore[return-value]

    def request(self) -> dict[str, Any]:
        """What is asked, as conversion.json holds it."""
        return {
            "source": self.source.label,
            "revision": self.source.revision,
            "options": {"attention": "m2la", **asdict(self.options), "backend": self.backend,
                        "shard_bytes": self.shard_bytes},
            "calibration": _describe(self.calibration),
            "held_out": _describe(self.held_out),
            "versions": versions(),
            "inputs": ends_of(self.source),
        }  # fmt: skip


def outline(source: Source, options: Options, backend: str = "torch") -> AttentionPlan:
    """A plan without prompts, which says what a conversion would write and cache; nothing can be converted with it."""
    check_source(source)
    width = options.cache_width(source.config.text.geometry)
    options.rope_choices(source.config.text.geometry)
    return AttentionPlan(source, options, backend, (), (), width)


def make_plan(
    source: Source,
    options: Options,
    calibration: Sequence[ModelInputs],
    held_out: Sequence[ModelInputs] | None,
    backend: str,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> AttentionPlan:
    """Raises ConfigError for a source or options that cannot be converted, PromptError for inputs that do not fit.

    held_out: what the result is measured on; None takes every fifth of `calibration`.
    """
    bare = outline(source, options, backend)
    prompts = [Prompt.of(inputs, source.config) for inputs in calibration]
    if held_out is None:
        if len(prompts) < 2:
            raise ConfigError(
                f"A conversion to M2LA needs at least 2 prompts, one to calibrate with and one to measure on, not "
                f"{len(prompts)}; give more --calibrate files or --samples."
            )
        kept = [prompts[place] for place in range(len(prompts)) if place % HELD_OUT_EVERY != 1]
        left = prompts[1::HELD_OUT_EVERY]
    else:
        kept, left = prompts, [Prompt.of(inputs, source.config) for inputs in held_out]
        if not kept or not left:
            raise ConfigError("A conversion to M2LA needs prompts to calibrate with and prompts to measure on.")
    return replace(bare, calibration=tuple(kept), held_out=tuple(left), shard_bytes=shard_bytes)


def check_source(source: Source) -> None:
    """Whether a source has grouped-query attention in float."""
    config = source.config
    if config.text.attention != "gqa":
        raise ConfigError(
            f"{source.path} has M2LA already (layout {config.text.attention_layout}); convert the Qwen3-VL checkpoint "
            "that it was made from."
        )
    if config.quantization is not None:
        raise ConfigError(
            f"{source.path} is quantised, and what is lost there cannot be weighed here; convert the checkpoint in "
            "float, or unpack this one first with iv3 convert --dtype bf16."
        )
    if config.text.geometry.rope_interleave:
        raise ConfigError(
            f"{source.path}: text_config.rope_interleave is true, but the rotation of heads is made for rotary pairs "
            "(f, f + d/2); only false is supported."
        )


def tensor_specs(source: Source, config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Every tensor of the converted checkpoint, in the order of the model; new ones in the dtype of k_proj."""
    stored = source.checkpoint.specs
    specs = {}
    for name, shape in manifest(ModelConfig.from_dict(dict(config), source="the converted config")).items():
        keys = f"{name.rpartition('self_attn.')[0]}self_attn.k_proj.weight"
        same = name in stored and stored[name].shape == shape
        specs[name] = TensorSpec(shape, _dtype(stored[name if same else keys].dtype))
    return specs


def _dtype(stored: str) -> str:
    return "F32" if stored == "F64" else stored


def _describe(prompts: Sequence[Prompt]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for prompt in prompts:
        inputs = prompt.inputs
        digest.update(inputs.token_ids.astype(np.int32).tobytes())
        digest.update(prompt.positions.astype(np.int32).tobytes())
        if inputs.pixels is not None and inputs.grid_thw is not None:
            digest.update(inputs.grid_thw.astype(np.int64).tobytes())
            for start in range(0, prod(inputs.pixels.shape[:1]), _PIXEL_ROWS):
                digest.update(np.asarray(inputs.pixels[start : start + _PIXEL_ROWS], np.float32).tobytes())
    visual = sum(int(prompt.visual.sum()) for prompt in prompts)
    total = sum(len(prompt.visual) for prompt in prompts)
    return {
        "prompts": len(prompts), "text_tokens": total - visual, "visual_tokens": visual, "sha256": digest.hexdigest(),
    }  # fmt: skip
