"""Small grouped-query checkpoints of any shape, and prompts with text and media for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.inputs import ModelInputs
from ivcore.shards import TensorSpec, write_checkpoint

IMAGE, VIDEO = 38, 39
LAYER = "model.language_model.layers.{}."
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """A decoder's shape; section: rotary frequencies of time, height and width."""

    kv_heads: int = 2
    group: int = 2
    section: tuple[int, int, int] = (2, 1, 1)
    layers: int = 2
    hidden: int = 24
    deepstack: tuple[int, ...] = (0,)
    bias: bool = False

    @property
    def head_dim(self) -> int:
        return 2 * sum(self.section)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def config(self) -> dict[str, Any]:
        """config.json's content."""
        text = {
            "vocab_size": 40, "hidden_size": self.hidden, "intermediate_size": 20, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "rms_norm_eps": 1e-6, "rope_theta": 30.0, "max_position_embeddings": 4096, "attention_bias": self.bias,
            "rope_scaling": {"rope_type": "default", "mrope_section": list(self.section), "mrope_interleaved": True},
        }  # fmt: skip
        vision = {
            "depth": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 2,
            "temporal_patch_size": 1, "spatial_merge_size": 1, "num_position_embeddings": 16,
            "deepstack_visual_indexes": list(self.deepstack), "out_hidden_size": self.hidden,
        }  # fmt: skip
        return {
            "model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": True,
            "image_token_id": IMAGE, "video_token_id": VIDEO,
        }  # fmt: skip


class Sources:
    """Writes source checkpoints."""

    Shape = Shape

    @staticmethod
    def random(shape: Shape, seed: int = 0) -> Tensors:
        """Weights under which activations stay near 1."""
        random = np.random.default_rng(seed)
        tensors = {}
        for name, size in manifest(ModelConfig.from_dict(shape.config())).items():
            values = random.standard_normal(size)
            if "norm" in name and name.endswith("weight"):
                values = 1 + values / 4
            elif "embed" not in name:
                values /= 3 if name.endswith("bias") else np.sqrt(np.prod(size[1:]))
            tensors[name] = values.astype(np.float32)
        return tensors

    @staticmethod
    def write(folder: Path, shape: Shape, tensors: Tensors, **config: Any) -> Path:
        """config: fields of config.json that differ."""
        specs = {name: TensorSpec(array.shape, "F32") for name, array in tensors.items()}
        write_checkpoint(folder, shape.config() | config, specs, tensors.items())
        (folder / "tokenizer_config.json").write_text("{}")
        return folder

    def make(self, folder: Path, shape: Shape | None = None, seed: int = 0) -> Path:
        shape = shape or Shape()
        return self.write(folder, shape, self.random(shape, seed))

    @staticmethod
    def aligned(shape: Shape, tensors: Tensors, seed: int = 0) -> Tensors:
        """The same with keys of all heads equal but for a sign a head and frequency: one direction holds them all."""
        random = np.random.default_rng(seed)
        changed = dict(tensors)
        for layer in range(shape.layers):
            prefix = f"{LAYER.format(layer)}self_attn.k_proj."
            signs = random.choice([-1.0, 1.0], (shape.kv_heads, shape.head_dim // 2))
            signs = np.concatenate([signs, signs], axis=1).astype(np.float32)
            for kind in ("weight", "bias") if shape.bias else ("weight",):
                first = tensors[prefix + kind].reshape(shape.kv_heads, shape.head_dim, -1)[0]
                changed[prefix + kind] = (signs[:, :, None] * first).reshape(tensors[prefix + kind].shape)
        return changed


def prompt(
    seed: int = 0, grids: tuple[tuple[int, int, int], ...] = ((2, 2, 3), (1, 3, 2)), text: int = 9
) -> ModelInputs:
    """Text, a video, text, an image, text: positions whose time, height and width are all different."""
    random = np.random.default_rng(seed)
    ids: list[int] = list(random.integers(0, 38, text))
    for number, (frames, height, width) in enumerate(grids):
        for _ in range(frames):
            ids += [VIDEO if number == 0 else IMAGE] * (height * width) + list(random.integers(0, 38, 3))
        ids += list(random.integers(0, 38, text))
    patches = sum(frames * height * width for frames, height, width in grids)
    pixels = random.standard_normal((patches, 12)).astype(np.float32)
    grid_thw = np.array(grids, np.int32)
    return ModelInputs(np.array(ids, np.int32), pixels if grids else None, grid_thw if grids else None)


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., ModelInputs]:
    """The function `prompt`."""
    return prompt


@pytest.fixture(scope="session")
def sources() -> Sources:
    return Sources()


@pytest.fixture(scope="session")
def prompts() -> list[ModelInputs]:
    """Five prompts; the second is the one that a conversion leaves out to measure on."""
    return [prompt(seed) for seed in range(4)] + [prompt(9, grids=(), text=30)]
