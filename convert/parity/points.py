"""The places of a network whose activations are compared, in causal order, and the modules that make each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ivcore.config import ModelConfig
from ivcore.geometry import LAYER_PREFIX

Stack = Literal["patches", "vision blocks", "mergers", "embeddings", "decoder layers", "norm", "head"]


@dataclass(frozen=True)
class Point:
    """name: as `Model.logits` gives it to its observer. stack: places that do the same work are of one stack.

    modules: prefixes of the tensors between the points before it and this one. width: numbers in a row.
    """

    name: str
    stack: Stack
    modules: tuple[str, ...]
    width: int

    @property
    def tower(self) -> Literal["vision", "decoder"]:
        return "vision" if self.name.startswith("visual.") else "decoder"


def points(config: ModelConfig) -> list[Point]:
    """Every point of a model, in the order in which one depends on those before it."""
    vision, text = config.vision, config.text
    language = "model.language_model."
    patches = ("model.visual.patch_embed.", "model.visual.pos_embed.")
    found = [Point("visual.patch_embed", "patches", patches, vision.hidden_size)]
    for block in range(vision.depth):
        name = f"visual.blocks.{block}"
        found.append(Point(name, "vision blocks", (f"model.{name}.",), vision.hidden_size))
        if block in vision.deepstack_visual_indexes:
            name = f"visual.deepstack_merger_list.{vision.deepstack_visual_indexes.index(block)}"
            found.append(Point(name, "mergers", (f"model.{name}.",), vision.out_hidden_size))
    found.append(Point("visual.merger", "mergers", ("model.visual.merger.",), vision.out_hidden_size))
    embeddings = (f"{language}embed_tokens.",)
    found.append(Point("embeddings", "embeddings", embeddings, text.hidden_size))
    for layer in range(text.num_hidden_layers):
        prefix = LAYER_PREFIX.format(layer=layer)
        found.append(Point(f"layers.{layer}", "decoder layers", (prefix,), text.hidden_size))
    found.append(Point("norm", "norm", (f"{language}norm.",), text.hidden_size))
    head = embeddings if config.tie_word_embeddings else ("lm_head.",)
    found.append(Point("logits", "head", head, text.vocab_size))
    return found
