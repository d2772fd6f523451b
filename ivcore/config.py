"""The one config schema: Hugging Face config.json of model_type `internvideo3` or `qwen3_vl`, read strictly.

Notable:
- The field names are config.json's own, so an error names the very field to look at.
- The two spellings of the rope settings (`rope_scaling` with `rope_theta` beside it, `rope_parameters`) become one.
- What the config does not say about its attention is read from the tensors' shapes (`ivcore.geometry`).
- A value that cannot be honoured is an error; a field that is not known is kept, ignored and mentioned once.
"""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ivcore.errors import ConfigError
from ivcore.files import read_json
from ivcore.geometry import AttentionGeometry, Shapes, fill_from_shapes
from ivcore.shards import Checkpoint
from ivcore.spellings import default_head_geometry, normalise

log = logging.getLogger(__name__)

# Fields that say nothing about what the network computes at inference.
_HARMLESS = frozenset(
    ("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "model_type",
     "attention_dropout", "initializer_range", "use_cache", "attn_implementation", "_attn_implementation",
     "output_attentions", "output_hidden_states", "use_return_dict", "return_dict", "max_window_layers",
     "pad_token_id", "bos_token_id", "eos_token_id", "vision_token_id")
)  # fmt: skip
_mentioned: set[str] = set()


class Section(BaseModel):
    """A part of config.json: known fields are checked strictly, unknown ones are kept as they came."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, ignored_types=(cached_property,))

    def unknown_fields(self) -> list[str]:
        return sorted(key for key in self.model_extra or {} if key not in _HARMLESS)


class RopeConfig(BaseModel):
    """Interleaved M-RoPE: `theta`, and how many rotary frequencies belong to time, height and width."""

    model_config = ConfigDict(frozen=True, strict=True)
    rope_theta: float = Field(gt=0, allow_inf_nan=False)
    mrope_section: tuple[int, int, int]
    rope_type: Literal["default"] = "default"
    mrope_interleaved: Literal[True] = True


class VisionConfig(Section):
    """The vision tower (Qwen3-VL): patches of `patch_size`, DeepStack features from the blocks listed."""

    depth: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    patch_size: int = Field(16, gt=0)
    temporal_patch_size: int = Field(2, gt=0)
    spatial_merge_size: int = Field(2, gt=0)
    in_channels: Literal[3] = 3
    out_hidden_size: int = Field(gt=0)
    num_position_embeddings: int = Field(gt=0)
    deepstack_visual_indexes: tuple[int, ...] = ()
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_grid_side(self) -> int:
        """The learned position embeddings form a square of this side."""
        return round(self.num_position_embeddings**0.5)

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch, (channel, time, height, width)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError("hidden_size must be num_heads times a multiple of 4")
        if self.position_grid_side**2 != self.num_position_embeddings:
            raise ValueError("num_position_embeddings must be a square number")
        blocks = self.deepstack_visual_indexes
        if sorted(set(blocks)) != list(blocks) or any(not 0 <= block < self.depth for block in blocks):
            raise ValueError(f"deepstack_visual_indexes must name blocks below depth {self.depth} in ascending order")
        return self


class TextConfig(Section):
    """The decoder: Qwen3 with grouped-query attention, or with M2LA (fields of the second half)."""

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    max_position_embeddings: int = Field(262_144, gt=0)
    hidden_act: Literal["silu"] = "silu"
    rope_scaling: RopeConfig

    attention: Literal["gqa", "m2la"]
    attention_layout: Literal["release", "norm"] = "release"
    attention_bias: bool = False
    attention_bias_modules: tuple[str, ...] | None = None
    kv_lora_rank: int | None = Field(None, gt=0)
    kv_lora_rank_list: tuple[int, ...] | None = None
    q_lora_rank: int | None = Field(None, gt=0)
    qk_nope_head_dim: int | None = Field(None, gt=0)
    qk_rope_head_dim: int | None = Field(None, gt=0)
    v_head_dim: int | None = Field(None, gt=0)
    qk_rope_num_heads: int | tuple[int, ...] = 1
    qk_latent_layernorm: bool = False
    rope_interleave: bool | None = None

    @cached_property
    def geometry(self) -> AttentionGeometry:
        """The attention's dimensions, one entry a layer where they may differ by layer."""
        return AttentionGeometry.from_fields(self.model_dump())

    @model_validator(mode="after")
    def _fits(self) -> Self:
        geometry = self.geometry
        frequencies = geometry.rope_dim // 2
        _, height, width = section = self.rope_scaling.mrope_section
        # Interleaving deals the frequencies out as T H W T H W ...; what H and W do not take stays with T.
        if sum(section) != frequencies or min(section) < 0 or 3 * height > frequencies + 1 or 3 * width > frequencies:
            raise ValueError(
                f"rope_scaling.mrope_section {list(section)} cannot be interleaved over the {frequencies} rotary "
                f"frequencies of a {geometry.rope_dim}-wide head"
            )
        return self


class QuantizationConfig(BaseModel):
    """MLX's block: affine groups along the last axis; a module's own entry overrides, `false` leaves it in float."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    bits: Literal[2, 3, 4, 5, 6, 8]
    group_size: Literal[32, 64, 128]
    mode: Literal["affine"] = "affine"

    @model_validator(mode="after")
    def _entries_hold(self) -> Self:
        for module, entry in (self.model_extra or {}).items():
            if isinstance(entry, dict):
                given = {"bits": self.bits, "group_size": self.group_size} | entry
                try:
                    QuantizationConfig.model_validate({key: given[key] for key in ("bits", "group_size")})
                except ValidationError:
                    raise ValueError(f"{module} must have bits of 2 to 8 and a group_size of 32, 64 or 128") from None
            elif not isinstance(entry, bool | str):
                raise ValueError(f"{module} must be an object or false, not {entry!r}")
        return self

    def of_module(self, name: str) -> tuple[int, int] | None:
        """(bits, group_size) of a module, None where the block says that it stays in float."""
        own = (self.model_extra or {}).get(name)
        if own is False:
            return None
        if isinstance(own, dict):
            return own.get("bits", self.bits), own.get("group_size", self.group_size)
        return self.bits, self.group_size


class ModelConfig(Section):
    """A whole checkpoint's config; `from_dir` and `from_dict` read it, `to_dict` writes it back."""

    model_type: Literal["internvideo3", "qwen3_vl"]
    text_config: TextConfig
    vision_config: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    tie_word_embeddings: bool = False
    quantization: QuantizationConfig | None = None

    @model_validator(mode="after")
    def _placeholders_differ(self) -> Self:
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"image_token_id and video_token_id are both {self.image_token_id}")
        return self

    @property
    def text(self) -> TextConfig:
        return self.text_config

    @property
    def vision(self) -> VisionConfig:
        return self.vision_config

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Read `path`/config.json; the shapes in its safetensors headers fill in what it does not say.

        Raises ConfigError (the config) or CheckpointError (headers that cannot be read).
        """
        file = Path(path) / "config.json"
        shapes = Checkpoint(path).shapes() if Checkpoint.present(path) else None
        return cls.from_dict(read_json(file), shapes=shapes, source=str(file))

    @classmethod
    def from_dict(
        cls, raw: dict[str, Any], *, shapes: Shapes | None = None, source: str = "config.json"
    ) -> ModelConfig:
        """The config that a config.json's content means; `shapes`: tensor name -> shape, where weights are at hand."""
        fields = normalise(raw, source)
        if shapes:
            fill_from_shapes(fields, shapes, source)
        default_head_geometry(fields["text_config"])
        try:
            config = cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            raise ConfigError(f"{source}: {_first_sentence(error)}.") from None
        if config.vision.out_hidden_size != config.text.hidden_size:
            raise ConfigError(
                f"{source}: vision_config.out_hidden_size is {config.vision.out_hidden_size} but "
                f"text_config.hidden_size is {config.text.hidden_size}; they must be equal."
            )
        if len(config.vision.deepstack_visual_indexes) > config.text.num_hidden_layers:
            raise ConfigError(
                f"{source}: vision_config.deepstack_visual_indexes names more blocks than the decoder has layers."
            )
        _mention_unknown(config, source)
        return config

    def to_dict(self) -> dict[str, Any]:
        """config.json's content, in the spelling that Hugging Face Transformers reads too."""
        fields = self.model_dump(mode="json", exclude_none=True)
        rope = fields["text_config"]["rope_scaling"]
        fields["text_config"]["rope_theta"] = rope.pop("rope_theta")
        return fields


def _first_sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "config.json"
    if first["type"] == "missing":
        return f"{where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return (
        f"{where}: {message[0].lower()}{message[1:]}, got {json.dumps(first['input'])[:80]}"
        if (first["type"] != "value_error")
        else f"{where}: {message}"
    )


def _mention_unknown(config: ModelConfig, source: str) -> None:
    unknown = [*config.unknown_fields()]
    unknown += [f"text_config.{key}" for key in config.text.unknown_fields()]
    unknown += [f"vision_config.{key}" for key in config.vision.unknown_fields()]
    new = [key for key in unknown if key not in _mentioned]
    _mentioned.update(new)
    if new:
        log.warning("%s: not known here and ignored: %s", source, ", ".join(new))
