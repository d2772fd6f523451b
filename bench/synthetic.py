"""Random checkpoints for benchmarks: the real layout and loader, weights that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.shards import TensorSpec, write_checkpoint

MEDIUM = {
    "model_type": "internvideo3",
    "text_config": {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 65536,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 6,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_heads": 8,
        "out_hidden_size": 1024,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [1, 3, 5],
    },
    "image_token_id": 8000,
    "video_token_id": 8001,
}
"""About 100 million parameters with the release's proportions: latent 7/8 and rotary key 1/8 of the cache row."""

ATTENTION = {
    "m2la": {"kv_lora_rank": 448, "attention_bias": True},
    "gqa": {},
}


def medium_config(attention: str) -> dict[str, Any]:
    """config.json of the 100M model with `gqa` or `m2la` attention."""
    model_type = "internvideo3" if attention == "m2la" else "qwen3_vl"
    return MEDIUM | {"model_type": model_type, "text_config": MEDIUM["text_config"] | ATTENTION[attention]}  # type: ignore[operator]


def write_random(path: Path, config: dict[str, Any], seed: int = 0) -> int:
    """Write a float32 checkpoint with weights of a sane scale; returns the number of parameters."""
    specs = {name: TensorSpec(shape, "F32") for name, shape in manifest(ModelConfig.from_dict(config)).items()}
    random = np.random.default_rng(seed)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in specs.items():
            if "norm" in name and name.endswith("weight"):
                yield name, np.ones(spec.shape, np.float32)
            else:
                fan_in = int(np.prod(spec.shape[1:])) or 1
                scale = 0.02 if "embed" in name else fan_in**-0.5
                yield name, scale * random.standard_normal(spec.shape, dtype=np.float32)

    write_checkpoint(path, config, specs, tensors())
    return sum(int(np.prod(spec.shape)) for spec in specs.values())
