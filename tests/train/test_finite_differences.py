"""Each loss and its gradient against the whole model and the formulas of docs/training.md in NumPy float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcore.config import ModelConfig
from ivcore.training import Batch, LoraSettings

Weights = dict[str, np.ndarray]
STEP = 1e-5
RELATIVE_TOLERANCE = 1e-4  # of what a gradient in float32 says of a direction, to the size of the tensor's gradient
TENSORS = 12  # looked at in each case, drawn from all
LORA = LoraSettings(rank=2, alpha=3, rank_stabilized=True, targets=("*",))
VIDEO, IMAGE, OPEN = 36, 37, 38


def two_layers(attention: str) -> dict[str, Any]:
    """config.json's content of a model of two layers with a vision tower of two."""
    text = {
        "vocab_size": 40, "hidden_size": 20, "intermediate_size": 14, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "rope_theta": 100.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 1]},
    }  # fmt: skip
    if attention == "gqa":
        text |= {"attention": "gqa", "attention_bias": True}
    else:
        text |= {"attention": "m2la", "attention_layout": attention, "kv_lora_rank": 7, "qk_latent_layernorm": True}
    if attention == "release":
        text |= {"qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 8, "attention_bias": True}
        text |= {"q_lora_rank": 9, "rope_interleave": True}
    if attention == "norm":
        text["qk_rope_num_heads"] = 2
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 10, "num_heads": 2, "patch_size": 2, "out_hidden_size": 20,
        "spatial_merge_size": 2, "num_position_embeddings": 9, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return {
        "model_type": "internvideo3", "text_config": text, "vision_config": vision,
        "image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": attention == "norm",
    }  # fmt: skip


def rows_of(tools: Any) -> list[Any]:
    """A row of text, one with two frames of 4 x 4 patches and an image of 2 x 4, and one of a single frame."""
    random = np.random.default_rng(2)

    def patches(count: int) -> np.ndarray:
        return random.standard_normal((count, 24)).astype(np.float32)

    media = [3, OPEN, *[VIDEO] * 4, 5, OPEN, *[VIDEO] * 4, 6, *[IMAGE] * 2, 7, 8, 9]
    return [
        tools.Row(np.arange(6, dtype=np.int32)),
        tools.Row(np.array(media, np.int32), patches(40), np.array([[2, 4, 4], [1, 2, 4]], np.int32)),
        tools.Row(np.array([1, *[VIDEO] * 4, 2, 2], np.int32), patches(16), np.array([[1, 4, 4]], np.int32)),
    ]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def written_out(kind: str, loss: Any, batch: Batch, scores: np.ndarray, start: np.ndarray) -> float:
    """The formula of a loss, place by place.

    scores: log-probabilities (K, vocab). start: those at which it is differentiated.
    """
    total = 0.0
    for row, place in enumerate(batch.places):
        target = batch.targets[place]
        chosen, now = scores[row, target], start[row, target]
        if kind == "next token":
            each = -chosen
        elif kind.startswith("policy"):
            ratio, advantage = np.exp(chosen - loss.old_logprobs[place]), loss.advantages[place]
            each = -min(ratio * advantage, min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high) * advantage)
            if "reference" in kind:
                ahead = loss.reference_logprobs[place] - chosen
                each += loss.kl_weight * (np.exp(ahead) - ahead - 1)
        elif kind == "distill on samples":
            each = (now - loss.teacher_logprobs[place]) * np.exp(chosen - now)
        else:
            student, teacher = scores[row], loss.teacher_logprobs[row].astype(np.float64)
            reverse = sum(np.exp(s) * (s - t) for s, t in zip(student, teacher, strict=True))
            forward = sum(np.exp(t) * (t - s) for s, t in zip(student, teacher, strict=True))
            each = (1 - loss.forward_share) * reverse + loss.forward_share * forward
        total += float(batch.weights[place]) * each
    return total


def merged(weights: Weights, state: Weights) -> Weights:
    """The model's weights with a LoRA's update in them, float64."""
    out = {name: array.astype(np.float64) for name, array in weights.items()}
    for name, a in state.items():
        if name.endswith(".lora_A.weight"):
            b = state[name.replace("lora_A", "lora_B")]
            weight = name.removesuffix(".lora_A.weight") + ".weight"
            out[weight] = out[weight] + 3 / np.sqrt(2) * (b.astype(np.float64) @ a.astype(np.float64))
    return out


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("attention", ["gqa", "release", "norm"])
def test_gradients_are_the_differences_of_the_restated_model(
    attention: str, trained: str, kind: str, backend: str, tools: Any, write_random: Any, tmp_path: Path
) -> None:
    raw, rows = two_layers(attention), rows_of(tools)
    weights = write_random(tmp_path, raw, seed=4)
    batch = tools.pack(ModelConfig.from_dict(raw), rows, seed=1)
    lab = tools.Lab(tmp_path, batch)
    loss = lab.loss(kind)
    trainer = lab.trainer(backend, LORA if trained == "lora" else None)
    state = trainer.state()
    value = trainer.accumulate(batch, loss)["loss"]
    gradients = trainer.gradients()

    run = tools.neighbour("parity", "restatement").run
    begun = {name.removeprefix("weight."): array for name, array in state.items() if name.startswith("weight.")}
    at = {name: array.astype(np.float64) for name, array in (begun if trained == "lora" else weights).items()}

    def scores(moved: Weights) -> np.ndarray:
        """Log-probabilities (K, vocab) at the places with a weight, each row read by itself."""
        used = merged(weights, moved) if trained == "lora" else moved
        logits = [run(raw, used, row.token_ids, row.pixels, row.grid_thw).logits for row in rows]
        return log_softmax(np.concatenate(logits)[batch.places])

    start = scores(at)
    assert value == pytest.approx(written_out(kind, loss, batch, start, start), rel=1e-5)
    random = np.random.default_rng([*f"{attention} {trained} {kind}".encode()])
    least = 1e-2 * max(np.linalg.norm(each) for each in gradients.values())
    names = sorted(gradients)
    for name in [names[index] for index in random.permutation(len(names))[:TENSORS]]:
        direction = random.standard_normal(at[name].shape)
        ends = (scores(at | {name: at[name] + length * direction}) for length in (STEP, -STEP))
        above, below = (written_out(kind, loss, batch, end, start) for end in ends)
        found = float((gradients[name] * direction).sum())
        limit = RELATIVE_TOLERANCE * max(float(np.linalg.norm(gradients[name])), least)
        assert abs(found - (above - below) / (2 * STEP)) < limit, name
