"""The whole model in plain NumPy float64, restated from the papers' formulas; slow, loops where a loop says it best.

Sources: M2LA in both layouts as this project's design states it, M-RoPE and DeepStack as in Qwen3-VL (arXiv 2511.21631,
Hugging Face `modeling_qwen3_vl`), the decoder as in Qwen3. Nothing here is shared with the code under test: it reads
config.json's content and the tensors, and takes ranks and the form of the attention from the tensors' names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
VISION_NORM_EPS = 1e-6
VISION_ROPE_THETA = 10_000.0
_erf = np.vectorize(math.erf)


@dataclass
class Weights:
    """Tensors under a prefix, as float64."""

    tensors: Mapping[str, Array]
    prefix: str = ""

    def __getitem__(self, name: str) -> Array:
        return self.tensors[self.prefix + name].astype(np.float64)

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def below(self, prefix: str) -> Weights:
        return Weights(self.tensors, self.prefix + prefix)

    def linear(self, name: str, x: Array) -> Array:
        y = x @ self[f"{name}.weight"].reshape(len(self[f"{name}.weight"]), -1).T
        return y + self[f"{name}.bias"] if f"{name}.bias" in self else y


@dataclass
class Activations:
    """What the model computes on a prompt, float64; `layers` are before DeepStack adds to them."""

    positions: Array
    tokens: Array
    deepstack: list[Array]
    embeddings: Array
    layers: list[Array] = field(default_factory=list)
    logits: Array = field(default_factory=lambda: np.zeros(0))


def run(raw: Mapping[str, Any], tensors: Mapping[str, Array], token_ids: Array, pixels: Array | None,
        grids: Array | None) -> Activations:  # fmt: skip
    """raw: config.json's content; token_ids (S,); pixels (P, patch_dim) and grids (N, 3), or None for text."""
    text, weights = raw["text_config"], Weights(tensors)
    merge = raw["vision_config"]["spatial_merge_size"]
    visual_ids = (raw["image_token_id"], raw["video_token_id"])
    grid_list = [] if grids is None else [tuple(int(size) for size in grid) for grid in grids]
    positions = mrope_positions(token_ids, grid_list, visual_ids, merge)
    tokens, deepstack = np.zeros((0, text["hidden_size"])), []
    if pixels is not None:
        tokens, deepstack = vision_tower(raw["vision_config"], weights.below("model.visual."), pixels, grid_list)

    decoder = weights.below("model.language_model.")
    x = decoder["embed_tokens.weight"][token_ids]
    places = [place for place, token in enumerate(token_ids) if token in visual_ids]
    x[places] = tokens
    found = Activations(positions, tokens, deepstack, x.copy())
    angles = mrope_angles(text, positions, rope_dim(text, decoder.below("layers.0.self_attn.")))
    for layer in range(text["num_hidden_layers"]):
        block = decoder.below(f"layers.{layer}.")
        eps = text["rms_norm_eps"]
        x = x + attention(text, block.below("self_attn."), rms_norm(x, block["input_layernorm.weight"], eps), angles)
        x = x + swiglu(block.below("mlp."), rms_norm(x, block["post_attention_layernorm.weight"], eps))
        found.layers.append(x.copy())
        if layer < len(deepstack):
            x[places] += deepstack[layer]
    head = weights["lm_head.weight"] if "lm_head.weight" in weights else decoder["embed_tokens.weight"]
    found.logits = rms_norm(x, decoder["norm.weight"], text["rms_norm_eps"]) @ head.T
    return found


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def layer_norm(weights: Weights, name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + VISION_NORM_EPS)
    return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def softmax(scores: Array) -> Array:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def swiglu(weights: Weights, x: Array) -> Array:
    gate = weights.linear("gate_proj", x)
    return weights.linear("down_proj", gate / (1 + np.exp(-gate)) * weights.linear("up_proj", x))


def mrope_positions(token_ids: Array, grids: list[tuple[int, ...]], visual_ids: tuple[int, int], merge: int) -> Array:
    """(3, S): a walk over the tokens; every frame of every grid is met in order."""
    frames = [(h // merge, w // merge) for t, h, w in grids for _ in range(t)]
    columns: list[tuple[int, int, int]] = []
    at, token = 0, 0
    while token < len(token_ids):
        if token_ids[token] in visual_ids:
            h, w = frames.pop(0)
            columns += [(at, at + row, at + column) for row in range(h) for column in range(w)]
            token += h * w
            at += max(h, w)
        else:
            columns.append((at, at, at))
            token += 1
            at += 1
    return np.array(columns).T


def mrope_angles(text: Mapping[str, Any], positions: Array, width: int) -> Array:
    """(S, width / 2): frequency i turns with time, height or width, dealt T H W T H W; what is left over is time's."""
    rope = text.get("rope_parameters") or text["rope_scaling"]
    theta = rope.get("rope_theta", text.get("rope_theta"))
    angles = np.zeros((positions.shape[1], width // 2))
    for i in range(width // 2):
        axis = i % 3 if i < 3 * rope["mrope_section"][i % 3] else 0
        angles[:, i] = positions[axis] / theta ** (2 * i / width)
    return angles


def rotate(x: Array, angles: Array, interleaved: bool) -> Array:
    """Rotary embedding of x (S, d) as complex numbers; the order of the result is the halves'."""
    half = x.shape[-1] // 2
    pairs = x[:, 0::2] + 1j * x[:, 1::2] if interleaved else x[:, :half] + 1j * x[:, half:]
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def rope_dim(text: Mapping[str, Any], weights: Weights) -> int:
    return text["qk_rope_head_dim"] if "kv_a_proj_with_mqa.weight" in weights else text["head_dim"]


def attention(text: Mapping[str, Any], weights: Weights, x: Array, angles: Array) -> Array:
    """Causal self-attention of x (S, hidden), head by head; the tensors' names tell which one."""
    if "kv_a_proj_with_mqa.weight" in weights:
        heads = release_heads(text, weights, x, angles)
    elif "kv_a_proj.weight" in weights:
        heads = norm_heads(text, weights, x, angles)
    else:
        heads = gqa_heads(text, weights, x, angles)
    return weights.linear("o_proj", np.concatenate(heads, axis=-1))


def causal(queries: Array, keys: Array, values: Array, scale: float) -> Array:
    later = np.triu(np.ones((len(queries), len(keys)), dtype=bool), k=1)
    return softmax(np.where(later, -np.inf, queries @ keys.T * scale)) @ values


def gqa_heads(text: Mapping[str, Any], weights: Weights, x: Array, angles: Array) -> list[Array]:
    """Qwen3: norm on every head's query and key, rotary embedding on the whole head."""
    d, count, groups = text["head_dim"], text["num_attention_heads"], text["num_key_value_heads"]
    q, k, v = (weights.linear(name, x).reshape(len(x), -1, d) for name in ("q_proj", "k_proj", "v_proj"))
    q = rms_norm(q, weights["q_norm.weight"], text["rms_norm_eps"])
    k = rms_norm(k, weights["k_norm.weight"], text["rms_norm_eps"])
    heads = []
    for head in range(count):
        group = head * groups // count
        turned = rotate(q[:, head], angles, False), rotate(k[:, group], angles, False)
        heads.append(causal(*turned, v[:, group], d**-0.5))
    return heads


def release_heads(text: Mapping[str, Any], weights: Weights, x: Array, angles: Array) -> list[Array]:
    """Layout `release`: score = (q_n . k_n + q_r . k_r) / sqrt(dn + dr), one rotary key for all heads."""
    count, dn, dr, dv = (
        text[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    if "q_a_proj.weight" in weights:
        compressed = rms_norm(weights.linear("q_a_proj", x), weights["q_a_layernorm.weight"], text["rms_norm_eps"])
        q = weights.linear("q_b_proj", compressed)
    else:
        q = weights.linear("q_proj", x)
    q, interleaved = q.reshape(len(x), count, dn + dr), text.get("rope_interleave", True)
    rank = weights["kv_b_proj.weight"].shape[1]
    down = weights.linear("kv_a_proj_with_mqa", x)
    latent, k_r = down[:, :rank], rotate(down[:, rank:], angles, interleaved)
    if "kv_a_layernorm.weight" in weights:
        latent = rms_norm(latent, weights["kv_a_layernorm.weight"], text["rms_norm_eps"])
    up = weights.linear("kv_b_proj", latent).reshape(len(x), count, dn + dv)
    heads = []
    for head in range(count):
        queries = np.concatenate([q[:, head, :dn], rotate(q[:, head, dn:], angles, interleaved)], axis=-1)
        keys = np.concatenate([up[:, head, :dn], k_r], axis=-1)
        heads.append(causal(queries, keys, up[:, head, dn:], (dn + dr) ** -0.5))
    return heads


def norm_heads(text: Mapping[str, Any], weights: Weights, x: Array, angles: Array) -> list[Array]:
    """Layout `norm`: keys are normalised, then compressed; score = (q . k_n + sum over R of q_r . k_r) / sqrt(d)."""
    d, count, eps = text["head_dim"], text["num_attention_heads"], text["rms_norm_eps"]
    q = rms_norm(weights.linear("q_proj", x).reshape(len(x), count, d), weights["q_norm.weight"], eps)
    k = rms_norm(weights.linear("k_proj", x).reshape(len(x), -1, d), weights["k_norm.weight"], eps)
    joint = np.concatenate([k.reshape(len(x), -1), weights.linear("v_proj", x)], axis=-1)
    rank = weights["kv_b_proj.weight"].shape[1]
    down, scale = weights.linear("kv_a_proj", joint), weights["q_rope_scale"]  # scale: (H, R, d)
    latent, k_r = down[:, :rank], down[:, rank:].reshape(len(x), -1, d)
    if "kv_a_layernorm.weight" in weights:
        latent = rms_norm(latent, weights["kv_a_layernorm.weight"], eps)
    up = weights.linear("kv_b_proj", latent).reshape(len(x), count, 2 * d)
    heads = []
    for head in range(count):
        queries, keys = [q[:, head]], [up[:, head, :d]]
        for shared in range(scale.shape[1]):
            queries.append(rotate(q[:, head] * scale[head, shared], angles, False))
            keys.append(rotate(k_r[:, shared], angles, False))
        stacked = np.concatenate(queries, axis=-1), np.concatenate(keys, axis=-1)
        heads.append(causal(*stacked, up[:, head, d:], d**-0.5))
    return heads


def vision_tower(
    vision: Mapping[str, Any], weights: Weights, pixels: Array, grids: list[tuple[int, ...]]
) -> tuple[Array, list[Array]]:
    """Tokens (T, out_hidden) and one DeepStack feature of that shape for every block listed, frame by frame."""
    listed = list(vision["deepstack_visual_indexes"])
    tokens: list[Array] = []
    features: list[list[Array]] = [[] for _ in listed]
    row = 0
    for time, height, width in grids:
        places = merge_block_order(height, width, vision["spatial_merge_size"])
        for _ in range(time):
            patches = pixels[row : row + height * width].astype(np.float64)
            row += height * width
            x = weights.linear("patch_embed.proj", patches)
            x = x + position_embeddings(weights["pos_embed.weight"], places, height, width)
            for index in range(vision["depth"]):
                block = weights.below(f"blocks.{index}.")
                x = x + vision_attention(block, layer_norm(block, "norm1", x), places, vision["num_heads"])
                inner = block.linear("mlp.linear_fc1", layer_norm(block, "norm2", x))
                gelu = inner / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
                x = x + block.linear("mlp.linear_fc2", gelu)
                if index in listed:
                    place = listed.index(index)
                    merger = weights.below(f"deepstack_merger_list.{place}.")
                    merged = layer_norm(merger, "norm", merge_patches(x, vision))
                    features[place].append(merger_mlp(merger, merged))
            merger = weights.below("merger.")
            tokens.append(merger_mlp(merger, merge_patches(layer_norm(merger, "norm", x), vision)))
    return np.concatenate(tokens), [np.concatenate(feature) for feature in features]


def merge_block_order(height: int, width: int, merge: int) -> list[tuple[int, int]]:
    """(row, column) of a frame's patches: the merge x merge patches of one token stand together."""
    return [
        (top + down, left + across)
        for top in range(0, height, merge)
        for left in range(0, width, merge)
        for down in range(merge)
        for across in range(merge)
    ]


def position_embeddings(table: Array, places: list[tuple[int, int]], height: int, width: int) -> Array:
    """The square table stretched over the frame, corner on corner, bilinear between its entries."""
    side = math.isqrt(len(table))
    square = table.reshape(side, side, -1)
    out = []
    for row, column in places:
        y = row * (side - 1) / (height - 1) if height > 1 else 0.0
        x = column * (side - 1) / (width - 1) if width > 1 else 0.0
        top, left = min(int(y), max(side - 2, 0)), min(int(x), max(side - 2, 0))
        bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
        above = square[top, left] * (1 - (x - left)) + square[top, right] * (x - left)
        below = square[bottom, left] * (1 - (x - left)) + square[bottom, right] * (x - left)
        out.append(above * (1 - (y - top)) + below * (y - top))
    return np.array(out)


def vision_attention(block: Weights, x: Array, places: list[tuple[int, int]], count: int) -> Array:
    """Every patch sees every patch of its frame; the row turns one half of a head's pairs, the column the other."""
    d = x.shape[-1] // count
    frequencies = VISION_ROPE_THETA ** -(np.arange(d // 4) / (d // 4))
    angles = np.array([[*(row * frequencies), *(column * frequencies)] for row, column in places])
    q, k, v = block.linear("attn.qkv", x).reshape(len(x), 3, count, d).transpose(1, 2, 0, 3)
    heads = []
    for head in range(count):
        scores = rotate(q[head], angles, False) @ rotate(k[head], angles, False).T / math.sqrt(d)
        heads.append(softmax(scores) @ v[head])
    return block.linear("attn.proj", np.concatenate(heads, axis=-1))


def merge_patches(x: Array, vision: Mapping[str, Any]) -> Array:
    return x.reshape(len(x) // vision["spatial_merge_size"] ** 2, -1)


def merger_mlp(merger: Weights, x: Array) -> Array:
    inner = merger.linear("linear_fc1", x)
    return merger.linear("linear_fc2", inner / 2 * (1 + _erf(inner / math.sqrt(2))))
