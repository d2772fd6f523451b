"""The source, a slice at a time: its own layers in small checkpoints, run by the backend as any model is.

Notable:
- The first slice is the vision tower, the embedding and as many decoder layers as have DeepStack features; every other
  slice is one layer. No more than a slice is in memory, so the largest source that can be calibrated on a machine is
  far larger than the largest it can run.
- A later slice gets a stub of a tower and of an embedding, and an observer puts the hidden states in their place: the
  layers are the backend's own code, and nothing of the model is written twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from convert.parity.run import release
from convert.source import Source
from ivcore.backend import BackendName, Model, choose, load
from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.geometry import LAYER_PREFIX
from ivcore.inputs import ModelInputs
from ivcore.shards import TensorSpec, write_checkpoint

_STUB_TOWER = {
    "depth": 1, "hidden_size": 4, "intermediate_size": 4, "num_heads": 1, "patch_size": 1, "temporal_patch_size": 1,
    "spatial_merge_size": 1, "num_position_embeddings": 1, "deepstack_visual_indexes": [],
}  # fmt: skip
_NO_POSITIONS = np.zeros(0, np.int64)


class Slices:
    """A source's layers on a backend, in float32."""

    def __init__(self, source: Source, backend: BackendName) -> None:
        self.source = source
        self.backend = choose(backend)
        self.front_layers = max(1, len(source.config.vision.deepstack_visual_indexes))

    def front(self, inputs: Sequence[ModelInputs]) -> Iterator[list[np.ndarray]]:
        """Of every prompt the input of layers 0 to `front_layers`, float32 (S, hidden) each, DeepStack added."""
        with self._loaded(self._front_config(), range(self.front_layers), whole=True) as model:
            for prompt in inputs:
                yield _observed(model, prompt, self.source.config)

    def layer(self, layer: int, hidden: Iterator[np.ndarray], positions: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """What layer `layer` makes of its input in every prompt: (S, hidden) of (S, hidden) and positions (3, S)."""
        with self._loaded(self._layer_config(), range(layer, layer + 1), whole=False) as model:
            for rows, where in zip(hidden, positions, strict=True):
                yield _through(model, rows, where)

    def _front_config(self) -> dict[str, Any]:
        raw = self.source.config.to_dict()
        raw["text_config"]["num_hidden_layers"] = self.front_layers
        return raw

    def _layer_config(self) -> dict[str, Any]:
        raw = self.source.config.to_dict()
        raw["text_config"] |= {"num_hidden_layers": 1, "vocab_size": 1}
        raw["vision_config"] = {**_STUB_TOWER, "out_hidden_size": raw["text_config"]["hidden_size"]}
        return raw | {"tie_word_embeddings": True, "image_token_id": 1, "video_token_id": 2}

    @contextmanager
    def _loaded(self, raw: dict[str, Any], layers: range, whole: bool) -> Iterator[Model]:
        """A model of these layers; of all else the source's tensors where it is `whole`, or stubs."""
        checkpoint = self.source.checkpoint
        specs: dict[str, TensorSpec] = {}
        origins: dict[str, str] = {}
        own = {LAYER_PREFIX.format(layer=place): LAYER_PREFIX.format(layer=layer) for place, layer in enumerate(layers)}
        for name, shape in manifest(ModelConfig.from_dict(raw)).items():
            prefix = next((prefix for prefix in own if name.startswith(prefix)), None)
            if prefix or whole:
                origins[name] = own[prefix] + name.removeprefix(prefix) if prefix else name
            specs[name] = checkpoint.specs[origins[name]] if name in origins else TensorSpec(shape, "F32")
        tensors = (
            (name, checkpoint.read(origins[name]) if name in origins else np.ones(spec.shape, np.float32))
            for name, spec in specs.items()
        )
        with tempfile.TemporaryDirectory(prefix="iv3-m2la-") as folder:
            write_checkpoint(folder, raw, specs, tensors)
            model = load(folder, self.backend, "float32")
            try:
                yield model
            finally:
                del model
                release(self.backend)


def _observed(model: Model, prompt: ModelInputs, config: ModelConfig) -> list[np.ndarray]:
    found: dict[str, list[np.ndarray]] = {}

    def observe(name: str, rows: np.ndarray) -> None:
        if name == "embeddings" or name.startswith(("layers.", "visual.deepstack_merger_list.")):
            found.setdefault(name, []).append(rows.copy())

    model.logits(prompt, observe, _NO_POSITIONS)
    visual = np.isin(prompt.token_ids, (config.image_token_id, config.video_token_id))
    states = [np.concatenate(found["embeddings"])]
    for layer in range(model.config.text.num_hidden_layers):
        state = np.concatenate(found[f"layers.{layer}"])
        if features := found.get(f"visual.deepstack_merger_list.{layer}"):
            state[visual] += np.concatenate(features)
        states.append(state)
    return states


def _through(model: Model, hidden: np.ndarray, positions: np.ndarray) -> np.ndarray:
    out: list[np.ndarray] = []
    start = 0

    def observe(name: str, rows: np.ndarray) -> np.ndarray | None:
        nonlocal start
        if name == "embeddings":
            start += len(rows)
            return hidden[start - len(rows) : start]
        if name == "layers.0":
            out.append(rows.copy())
        return None

    tokens = np.zeros(len(hidden), np.int32)
    model.logits(ModelInputs(tokens, None, None, positions), observe, _NO_POSITIONS)
    return np.concatenate(out)
