"""Random checkpoints and batches for benchmarks: the real layouts, weights and tokens that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.positions import position_ids
from ivcore.shards import TensorSpec, write_checkpoint
from ivcore.training import Batch

FRAME_SIDE = 64
TIMESTAMP_TOKENS = 5
ANSWER = 24

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

SMALL = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 1024,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "patch_size": 8,
        "out_hidden_size": 192,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 2],
    },
    "image_token_id": 1000,
    "video_token_id": 1001,
}
"""Grouped-query, of the shape that the toy world's model has: some 5 million parameters, frames of 64x64."""

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


def random_batch(config: ModelConfig, lengths: list[int], frames: int, seed: int = 0) -> Batch:
    """Rows of these many text tokens, each with a video of so many frames of 64x64 among them, or of 0 with none.

    The last 24 tokens of every row are trained on.
    """
    random = np.random.default_rng(seed)
    vision, video = config.vision, config.video_token_id
    side = FRAME_SIDE // vision.patch_size
    grid = np.array([[frames // vision.temporal_patch_size, side, side]], np.int32) if frames else None
    rows = []
    for length in lengths:
        start, rest = np.split(random.integers(0, 900, length), [length // 4])
        shown: list[np.ndarray] = []
        for _ in range(0 if grid is None else grid[0, 0]):
            shown += [
                random.integers(0, 900, TIMESTAMP_TOKENS),
                np.full((side // vision.spatial_merge_size) ** 2, video),
            ]
        rows.append(np.concatenate([start, *shown, rest]).astype(np.int32))
    placeholders = {"image_token_id": config.image_token_id, "video_token_id": video}
    positions = [position_ids(row, grid, **placeholders, merge_size=vision.spatial_merge_size) for row in rows]
    token_ids = np.concatenate(rows)
    targets, weights = np.zeros(len(token_ids), np.int32), np.zeros(len(token_ids), np.float32)
    for end in np.cumsum([len(row) for row in rows]):
        places = slice(end - ANSWER - 1, end - 1)  # each predicts the token after it
        targets[places], weights[places] = token_ids[end - ANSWER : end], 1 / (ANSWER * len(rows))
    pixels = grids = None
    if grid is not None:
        grids = np.tile(grid, (len(rows), 1))
        pixels = random.uniform(-1, 1, (grids.prod(axis=1).sum(), vision.patch_dim)).astype(np.float32)
    lengths_of_rows = np.array([len(row) for row in rows], np.int32)
    return Batch(token_ids, np.concatenate(positions, axis=1), lengths_of_rows, pixels, grids, targets, weights)
