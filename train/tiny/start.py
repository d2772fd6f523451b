"""The shape of iv3-tiny's base, a plain Qwen3-VL of 4.6M parameters, and the weights that its training begins with.

Notable:
- Frames of 64x64 in patches of 8: the shapes of the toy world cannot be told apart in patches of 16.
- The width and the depth are what lets its 8-bit copy, with latent attention, ship with the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.shards import TensorSpec, write_checkpoint
from ivcore.tokenizer import Tokenizer
from train.tiny.template import terse_template
from train.toyworld.script import SIZE
from train.toyworld.tokenizer import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, write_tokenizer

_HIDDEN, _LAYERS, _CONTEXT = 192, 6, 32768
_VISION_HIDDEN, _VISION_DEPTH, _DEEPSTACK = 128, 4, (1, 2)
_RESIDUAL = ("o_proj", "down_proj", "attn.proj", "mlp.linear_fc2")
_RESIDUAL_SCALE = 0.4  # of the layers that write into the residual stream, so that it grows slowly with depth
_EMBEDDING_STD, _POSITION_STD = 0.02, 0.3  # a position must be heard beside a patch of unit size


def write_start(folder: str | Path, seed: int = 0) -> Path:
    """Write an untrained checkpoint with its tokenizer and configs, float32; the same for the same seed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(terse_template(), encoding="utf-8")
    config = _config(Tokenizer.from_dir(folder), -(-ids // 64) * 64)
    shapes = manifest(ModelConfig.from_dict(config))
    write_checkpoint(
        folder, config, {name: TensorSpec(shape, "F32") for name, shape in shapes.items()}, _weights(shapes, seed)
    )
    return folder


def _config(tokenizer: Tokenizer, vocabulary: int) -> dict[str, Any]:
    special = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "tie_word_embeddings": True,
        **{name: tokenizer.token_id(token) for name, token in special.items()},
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": vocabulary,
            "hidden_size": _HIDDEN,
            "intermediate_size": 512,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": _CONTEXT,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": _VISION_DEPTH,
            "hidden_size": _VISION_HIDDEN,
            "intermediate_size": 384,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "out_hidden_size": _HIDDEN,
            "num_position_embeddings": (SIZE // PATCH_SIZE) ** 2,
            "deepstack_visual_indexes": list(_DEEPSTACK),
        },
    }


def _weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Normal with variance 1 / inputs; norms begin as the identity, biases with 0."""
    random = np.random.default_rng(seed)
    for name, shape in shapes.items():
        if name.endswith("bias"):
            yield name, np.zeros(shape, np.float32)
        elif "norm" in name:
            yield name, np.ones(shape, np.float32)
        else:
            yield name, (_std(name, shape) * random.standard_normal(shape)).astype(np.float32)


def _std(name: str, shape: tuple[int, ...]) -> float:
    if "embed_tokens" in name:
        return _EMBEDDING_STD
    if "pos_embed" in name:
        return _POSITION_STD
    residual = any(f"{part}.weight" in name for part in _RESIDUAL)
    return float(np.prod(shape[1:]) ** -0.5) * (_RESIDUAL_SCALE if residual else 1.0)
