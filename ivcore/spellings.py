"""The spellings of config.json that mean one thing, made one; and the values that cannot be honoured, refused."""

from __future__ import annotations

from typing import Any

from ivcore.errors import ConfigError

MODEL_TYPES = ("internvideo3", "qwen3_vl")
VISION_ROPE_THETA = 10_000.0  # Qwen2-VL's vision tower (arXiv 2409.12191); config.json rarely says it
ROPE_FIELDS = frozenset({"rope_theta", "mrope_section", "rope_type", "mrope_interleaved"})


def normalise(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Check what must be refused, and turn the known spellings of one thing into one."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{source}: model_type is {model_type!r}; this package runs {' and '.join(MODEL_TYPES)} checkpoints."
        )
    fields = dict(raw)
    for name in ("text_config", "vision_config"):
        if not isinstance(raw.get(name), dict):
            raise ConfigError(f"{source}: {name} is missing or not an object.")
        fields[name] = dict(raw[name])
    text = fields["text_config"]
    _refuse_unsupported(text, source)
    text["rope_scaling"] = _rope(text, source)
    _check_vision_rope(fields["vision_config"].pop("rope_parameters", None), source)
    if "tie_word_embeddings" in text:
        fields.setdefault("tie_word_embeddings", text["tie_word_embeddings"])
        del text["tie_word_embeddings"]
    fields["quantization"] = _quantization(fields, source)
    return fields


def _refuse_unsupported(text: dict[str, Any], source: str) -> None:
    for key in [key for key in text if "expert" in key or key.startswith("moe")]:
        if value := text.pop(key):
            raise ConfigError(f"{source}: text_config.{key} is {value!r}, but mixture-of-experts is not supported.")
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        raise ConfigError(
            f"{source}: text_config.sliding_window is {text['sliding_window']}, but a sliding window is not supported."
        )
    layer_types = text.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(f"{source}: text_config.layer_types may only hold 'full_attention'.")
    if text.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{source}: text_config.partial_rotary_factor must be 1.")
    for key in ("sliding_window", "use_sliding_window", "layer_types", "partial_rotary_factor"):
        text.pop(key, None)


def _rope(text: dict[str, Any], source: str) -> dict[str, Any]:
    spelling = "rope_parameters" if text.get("rope_parameters") is not None else "rope_scaling"
    given = text.get(spelling)
    if not isinstance(given, dict):
        raise ConfigError(f"{source}: text_config.{spelling} is missing or not an object.")
    rope = dict(given)
    for kind in (rope.pop("type", None), rope.pop("rope_type", None)):
        # Qwen2-VL wrote "mrope" for what is today "default" with an mrope_section.
        if kind not in (None, "default", "mrope"):
            raise ConfigError(f"{source}: text_config.{spelling}.rope_type is {kind!r}; only 'default' is supported.")
    rope.setdefault("rope_theta", text.get("rope_theta"))
    if rope["rope_theta"] is None:
        raise ConfigError(f"{source}: text_config.rope_theta is missing.")
    if rope.get("mrope_interleaved") is False:
        raise ConfigError(f"{source}: text_config.{spelling}.mrope_interleaved is false; only true is supported.")
    if extra := sorted(rope.keys() - ROPE_FIELDS):
        raise ConfigError(f"{source}: text_config.{spelling}.{extra[0]} is not supported with rope_type 'default'.")
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        text.pop(key, None)
    return rope


def _check_vision_rope(rope: Any, source: str) -> None:
    """Transformers 5 spells out what the vision tower's rotary embedding has always been."""
    theta = rope.get("rope_theta", VISION_ROPE_THETA) if isinstance(rope, dict) else rope
    if theta not in (None, VISION_ROPE_THETA):
        raise ConfigError(
            f"{source}: vision_config.rope_parameters.rope_theta is {theta!r}; only {VISION_ROPE_THETA:g} is supported."
        )


def _quantization(fields: dict[str, Any], source: str) -> dict[str, Any] | None:
    block = fields.pop("quantization", None)
    # mlx-lm writes the same block twice, under Hugging Face's name as well.
    hugging_face = fields.pop("quantization_config", None)
    if block is None and isinstance(hugging_face, dict):
        if "quant_method" in hugging_face:
            raise ConfigError(
                f"{source}: quantization_config.quant_method is {hugging_face['quant_method']!r}; only MLX's affine "
                "quantisation is supported."
            )
        block = hugging_face
    return block


def default_head_geometry(text: dict[str, Any]) -> None:
    """Hugging Face's defaults for what a Qwen3 config may leave out."""
    heads = text.get("num_attention_heads")
    if isinstance(heads, int) and heads > 0:
        if text.get("num_key_value_heads") is None:
            text["num_key_value_heads"] = heads
        if text.get("head_dim") is None and isinstance(text.get("hidden_size"), int):
            text["head_dim"] = text["hidden_size"] // heads
    if text.get("attention") is None:
        latent = text.get("kv_lora_rank") is not None or text.get("kv_lora_rank_list") is not None
        text["attention"] = "m2la" if latent else "gqa"
