"""The tensors of a converted layer, by their names below `self_attn.`, and the config that says so.

Both layouts take the same solution: the rotation of heads, and the joint latent cut at the layer's rank. With `[k; v]`
the keys of all heads after k_norm beside the values,

    kv_a_proj = [A; first R rotated heads]     kv_b_proj of head h = [B_k of h; B_v of its key head]

and a query reads rotated head j at frequency f with weight up[g(h), j, f]: `q_rope_scale` in the `norm` layout, rows
of q_proj in the `release` layout, where in the place of the norms there are affine maps and every projection starts
from the layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from convert.m2la.joint import Joint
from convert.m2la.moments import HeadMaps, Moments
from convert.m2la.rotation import Rotation
from convert.m2la.weights import LayerWeights
from ivcore.config import ModelConfig

Tensors = dict[str, np.ndarray]


def norm_tensors(weights: LayerWeights, rotation: Rotation, joint: Joint, rank: int) -> Tensors:
    """What the `norm` layout adds to the source's q_proj, k_proj, v_proj, o_proj and norms; float64."""
    scale = rotation.up[_group_of(weights), : joint.rope_heads]  # (H, R, d/2)
    return {
        "q_rope_scale": np.concatenate([scale, scale], axis=2),
        "kv_a_proj.weight": np.concatenate([joint.down[:rank], _rope_rows(weights, rotation, joint.rope_heads)]),
        "kv_b_proj.weight": _up(weights, joint, rank),
    }


def release_tensors(weights: LayerWeights, moments: Moments, rotation: Rotation, joint: Joint, rank: int) -> Tensors:
    """The `release` layout beside the source's o_proj; float64.

    A score there is divided by sqrt(dn + dr) instead of sqrt(d), which the queries make up for. RoPE's pairs are
    (2 f, 2 f + 1).
    """
    assert moments.query_maps is not None and moments.key_maps is not None
    q_weight, q_bias = _mapped(weights, "q_proj", moments.query_maps)  # (H, d, hidden), (H, d)
    q_weight, q_bias = (np.sqrt(2.0) * each for each in (q_weight, q_bias))
    turn = rotation.up[_group_of(weights), 0]  # (H, d/2)
    turn = np.concatenate([turn, turn], axis=1)
    order = interleaved(weights.head_dim)
    rope_weight, rope_bias = (q_weight * turn[:, :, None])[:, order], (q_bias * turn)[:, order]
    k_weight, k_bias = _mapped(weights, "k_proj", moments.key_maps)
    hidden = weights.q_proj.shape[1]
    joined = np.concatenate([k_weight.reshape(-1, hidden), weights.v_proj.astype(np.float64)])
    values_bias = weights.biases.get("v_proj", np.zeros(len(weights.v_proj)))
    bias = np.concatenate([k_bias.reshape(-1), values_bias.astype(np.float64)])
    rope = _rope_rows(weights, rotation, 1)[order]
    down = np.concatenate([joint.down[:rank], rope])
    return {
        "q_proj.weight": np.concatenate([q_weight, rope_weight], axis=1).reshape(-1, hidden),
        "q_proj.bias": np.concatenate([q_bias, rope_bias], axis=1).reshape(-1),
        "kv_a_proj_with_mqa.weight": down @ joined,
        "kv_a_proj_with_mqa.bias": down @ bias,
        "kv_b_proj.weight": _up(weights, joint, rank),
    }


def interleaved(head_dim: int) -> np.ndarray:
    """(d,): where the number at each place of an interleaved head stands in one of two halves."""
    return np.arange(head_dim).reshape(2, -1).T.reshape(-1)


def converted_config(
    source: ModelConfig, layout: str, ranks: Sequence[int], rope_heads: Sequence[int]
) -> dict[str, Any]:
    """config.json's content: the source's, with the attention's fields exchanged."""
    raw = source.to_dict()
    text = raw["text_config"]
    head_dim = source.text.head_dim
    kept = sorted(source.text.geometry.biases)
    biases = kept if layout == "norm" else ["q_proj", "kv_a_proj_with_mqa", *(["o_proj"] if "o_proj" in kept else [])]
    for field in ("kv_lora_rank", "kv_lora_rank_list", "attention_bias_modules", "q_lora_rank"):
        text.pop(field, None)
    text |= {
        "attention": "m2la",
        "attention_layout": layout,
        "attention_bias": bool(biases),
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": head_dim,
        "v_head_dim": head_dim,
        "qk_rope_num_heads": _one_or_list(rope_heads),
        "qk_latent_layernorm": False,
        "rope_interleave": layout == "release",
    }
    text["kv_lora_rank" if len(set(ranks)) == 1 else "kv_lora_rank_list"] = _one_or_list(ranks)
    if biases:
        text["attention_bias_modules"] = biases
    # The source's class would read these weights wrongly.
    raw.pop("architectures", None)
    text.pop("model_type", None)
    return raw | {"model_type": "internvideo3"}


def _one_or_list(numbers: Sequence[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def _group_of(weights: LayerWeights) -> np.ndarray:
    """(H,): the key head that each query head reads."""
    query_heads, heads = (len(matrix) // weights.head_dim for matrix in (weights.q_proj, weights.k_proj))
    return np.arange(query_heads) // (query_heads // heads)


def _rope_rows(weights: LayerWeights, rotation: Rotation, rope_heads: int) -> np.ndarray:
    """The first rotated heads from [k; v]: (R d, 2 G d)."""
    heads, head_dim = len(rotation.down), weights.head_dim
    rows = np.zeros((rope_heads, head_dim, 2, heads, head_dim))
    dims = np.arange(head_dim)
    rows[:, dims, 0, :, dims] = rotation.down[:rope_heads][:, :, dims % (head_dim // 2)].transpose(2, 0, 1)
    return rows.reshape(rope_heads * head_dim, -1)


def _up(weights: LayerWeights, joint: Joint, rank: int) -> np.ndarray:
    """kv_b_proj: (H (d + d), rank)."""
    group = _group_of(weights)
    both = np.concatenate([joint.up_keys[:, :, :rank], joint.up_values[group, :, :rank]], axis=1)
    return both.reshape(-1, rank)


def _mapped(weights: LayerWeights, module: str, maps: HeadMaps) -> tuple[np.ndarray, np.ndarray]:
    """A projection with its heads' maps behind it: (n, d, hidden), (n, d)."""
    matrix = getattr(weights, module).astype(np.float64)
    by_head = matrix.reshape(-1, weights.head_dim, matrix.shape[1])
    bias = weights.biases.get(module, np.zeros(len(matrix))).astype(np.float64).reshape(-1, weights.head_dim)
    return maps.weight @ by_head, (maps.weight @ bias[:, :, None])[:, :, 0] + maps.bias
