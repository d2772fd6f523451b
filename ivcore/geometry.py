"""The attention's dimensions: from config fields, from tensor shapes, and the tensors that they imply.

Three forms of self-attention, tensors named as in the released checkpoint:
- `gqa`: Qwen3's grouped-query attention, q/k norm, rotary embedding on the whole head.
- `m2la`, layout `release`: one latent and one shared rotary key a token (DeepSeek-V2, arXiv 2405.04434, section 2.1).
- `m2la`, layout `norm`: the original's q/k norm and projections stay; keys and values are compressed after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ivcore.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]

LAYER_PREFIX = "model.language_model.layers.{layer}."


@dataclass(frozen=True)
class AttentionGeometry:
    """Dimensions of every layer's attention; `latent_ranks` and `rope_heads` hold one entry a layer.

    For `gqa`, nope_dim is 0 and rope_dim and v_dim are head_dim.
    """

    kind: str
    layout: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    latent_ranks: tuple[int, ...]
    rope_heads: tuple[int, ...]
    q_rank: int | None
    latent_norm: bool
    biases: frozenset[str]
    rope_interleave: bool

    @classmethod
    def from_fields(cls, text: Mapping[str, Any]) -> AttentionGeometry:
        """From the fields of `TextConfig`; ValueError in one sentence where they contradict each other."""
        layers, head_dim = text["num_hidden_layers"], text["head_dim"]
        kind, layout = text["attention"], text["attention_layout"]
        if text["num_attention_heads"] % text["num_key_value_heads"]:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        nope_dim, rope_dim, v_dim = 0, head_dim, head_dim
        ranks: tuple[int, ...] = ()
        rope_heads: tuple[int, ...] = ()
        if kind == "m2la":
            ranks = _per_layer(text["kv_lora_rank_list"] or text["kv_lora_rank"], layers, "kv_lora_rank")
            rope_heads = _per_layer(text["qk_rope_num_heads"], layers, "qk_rope_num_heads")
            nope_dim = text["qk_nope_head_dim"] or head_dim
            rope_dim = text["qk_rope_head_dim"] or head_dim
            v_dim = text["v_head_dim"] or head_dim
            if layout == "release" and set(rope_heads) != {1}:
                raise ValueError("qk_rope_num_heads must be 1 in the release layout")
            if layout == "norm" and {nope_dim, rope_dim, v_dim} != {head_dim}:
                raise ValueError("in the norm layout qk_nope_head_dim, qk_rope_head_dim and v_head_dim are head_dim")
            if layout == "norm" and text["q_lora_rank"] is not None:
                raise ValueError("q_lora_rank is not supported in the norm layout")
        if rope_dim % 2:
            raise ValueError(f"a rotary head dim of {rope_dim} is odd")
        interleave = text["rope_interleave"]
        if interleave is None:
            interleave = kind == "m2la" and layout == "release"
        biases = text["attention_bias_modules"]
        if biases is None:
            biases = default_biases(kind, layout, text["q_lora_rank"]) if text["attention_bias"] else ()
        geometry = cls(
            kind=kind,
            layout=layout,
            hidden_size=text["hidden_size"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=head_dim,
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            v_dim=v_dim,
            latent_ranks=ranks,
            rope_heads=rope_heads,
            q_rank=text["q_lora_rank"] if kind == "m2la" else None,
            latent_norm=kind == "m2la" and text["qk_latent_layernorm"],
            biases=frozenset(biases),
            rope_interleave=interleave,
        )
        modules = {name.removesuffix(".weight") for name, shape in geometry.tensor_shapes(0).items() if len(shape) == 2}
        if unknown := sorted(geometry.biases - modules):
            raise ValueError(f"attention_bias_modules names {unknown[0]}, which this attention does not have")
        return geometry

    @property
    def softmax_scale(self) -> float:
        """1/sqrt of the width that a score sums over in the original: dn + dr for `release`, d otherwise."""
        release = self.kind == "m2la" and self.layout == "release"
        return (self.nope_dim + self.rope_dim if release else self.head_dim) ** -0.5

    def cache_width(self, layer: int) -> int:
        """Numbers that one token leaves in the cache of a layer."""
        if self.kind == "gqa":
            return self.gqa_cache_width
        return self.latent_ranks[layer] + self.rope_heads[layer] * self.rope_dim

    @property
    def gqa_cache_width(self) -> int:
        """What the grouped-query form would cache a token and layer: the keys and values of all KV heads."""
        return 2 * self.num_kv_heads * self.head_dim

    def absorbed_below(self, layer: int) -> int:
        """Number of query tokens under which absorbed attention costs fewer FLOP than expanded (design.md)."""
        rank, rope = self.latent_ranks[layer], self.rope_heads[layer] * self.rope_dim
        extra = (2 * rank + rope) - (self.nope_dim + rope + self.v_dim)
        return 1 << 30 if extra <= 0 else max(2, rank * (self.nope_dim + self.v_dim) // extra)

    def tensor_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's `self_attn` tensors, by their names below `self_attn.`."""
        hidden, heads, d = self.hidden_size, self.num_heads, self.head_dim
        linears: dict[str, tuple[int, int]] = {}
        other: dict[str, tuple[int, ...]] = {}
        if self.kind == "gqa" or self.layout == "norm":
            linears["q_proj"] = (heads * d, hidden)
            linears["k_proj"] = linears["v_proj"] = (self.num_kv_heads * d, hidden)
            other["q_norm.weight"] = other["k_norm.weight"] = (d,)
        elif self.q_rank is None:
            linears["q_proj"] = (heads * (self.nope_dim + self.rope_dim), hidden)
        else:
            linears["q_a_proj"] = (self.q_rank, hidden)
            other["q_a_layernorm.weight"] = (self.q_rank,)
            linears["q_b_proj"] = (heads * (self.nope_dim + self.rope_dim), self.q_rank)
        if self.kind == "m2la":
            rank, rope_heads = self.latent_ranks[layer], self.rope_heads[layer]
            if self.layout == "norm":
                other["q_rope_scale"] = (heads, rope_heads, d)
                linears["kv_a_proj"] = (self.cache_width(layer), 2 * self.num_kv_heads * d)
            else:
                linears["kv_a_proj_with_mqa"] = (self.cache_width(layer), hidden)
            if self.latent_norm:
                other["kv_a_layernorm.weight"] = (rank,)
            linears["kv_b_proj"] = (heads * (self.nope_dim + self.v_dim), rank)
        linears["o_proj"] = (hidden, heads * self.v_dim)
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{name}.bias": (linears[name][0],) for name in self.biases if name in linears}
        return shapes | other


def default_biases(kind: str, layout: str, q_rank: int | None) -> tuple[str, ...]:
    """The projections that `attention_bias: true` gives a bias: Qwen3's own, or those of the release."""
    if kind == "m2la" and layout == "release":
        return ("q_proj" if q_rank is None else "q_a_proj", "kv_a_proj_with_mqa")
    return ("q_proj", "k_proj", "v_proj", "o_proj")


def fill_from_shapes(fields: dict[str, Any], shapes: Shapes, source: str) -> None:
    """Put into `fields["text_config"]` what the tensors say of the attention and the config does not.

    Raises ConfigError, showing both, where the config says something else.
    """
    text = fields["text_config"]
    packed = next((name for name in shapes if name.endswith(".scales")), None)
    if packed and not isinstance(fields.get("quantization"), dict):
        raise ConfigError(f"{source} has no quantization block, but the weights hold {packed}; download it again.")
    implied = _implied_by_shapes(text, shapes, fields.get("quantization"))
    if "lm_head.weight" not in shapes:
        fields.setdefault("tie_word_embeddings", True)
    for key, (value, evidence) in implied.items():
        said = text.get(key)
        if key == "kv_lora_rank_list" and said is None and text.get("kv_lora_rank") is not None:
            key, said = "kv_lora_rank", text["kv_lora_rank"]
        if said is None:
            text[key] = value
        elif not _same(said, value):
            raise ConfigError(
                f"{source}: text_config.{key} is {_brief(said)}, but the tensors say {_brief(value)} ({evidence}); "
                "config and weights are not of one checkpoint."
            )


def _implied_by_shapes(
    text: Mapping[str, Any], shapes: Shapes, quantization: Mapping[str, Any] | None
) -> dict[str, tuple[Any, str]]:
    """Config key -> (value, the tensor that shows it)."""
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    if not isinstance(layers, int) or not isinstance(heads, int) or layers < 1 or heads < 1:
        return {}
    prefix = [LAYER_PREFIX.format(layer=layer) + "self_attn." for layer in range(layers)]

    def shape(layer: int, module: str) -> tuple[int, ...] | None:
        name = f"{prefix[layer]}{module}"
        packed, scales = shapes.get(f"{name}.weight"), shapes.get(f"{name}.scales")
        if packed and scales and quantization and len(scales) == 2:
            own = quantization.get(name)
            group = own["group_size"] if isinstance(own, dict) and "group_size" in own else quantization["group_size"]
            return (packed[0], scales[1] * group)
        return packed if packed and len(packed) == 2 else None

    release, norm = shape(0, "kv_a_proj_with_mqa"), shape(0, "kv_a_proj")
    if not release and not norm:
        if not shape(0, "k_proj"):
            return {}
        bias = f"{prefix[0]}q_proj.bias"
        said = (bias in shapes, f"{bias} is {'there' if bias in shapes else 'absent'}")
        return {"attention": ("gqa", f"{prefix[0]}k_proj.weight is there"), "attention_bias": said}
    layout, down_name = ("release", "kv_a_proj_with_mqa") if release else ("norm", "kv_a_proj")
    implied: dict[str, tuple[Any, str]] = {
        "attention": ("m2la", f"{prefix[0]}{down_name}.weight is there"),
        "attention_layout": (layout, f"{prefix[0]}{down_name}.weight is there"),
    }
    down = [shape(layer, down_name) for layer in range(layers)]
    up = [shape(layer, "kv_b_proj") for layer in range(layers)]
    if any(matrix is None for matrix in (*down, *up)):
        return implied  # the strict check of the manifest names what is missing
    ranks = [matrix[1] for matrix in up if matrix]
    implied["kv_lora_rank_list"] = (ranks, f"{prefix[0]}kv_b_proj.weight has shape {list(up[0] or ())}")
    rotary = [matrix[0] - rank for matrix, rank in zip(down, ranks, strict=True) if matrix]
    out, norms = shape(0, "o_proj"), f"{prefix[0]}kv_a_layernorm.weight"
    implied["qk_latent_layernorm"] = (norms in shapes, f"{norms} is {'there' if norms in shapes else 'absent'}")
    if layout == "norm":
        if isinstance(head_dim := text.get("head_dim"), int) and all(width % head_dim == 0 for width in rotary):
            counts = [width // head_dim for width in rotary]
            implied["qk_rope_num_heads"] = (
                counts,
                f"{prefix[0]}kv_a_proj.weight has {down[0][0] if down[0] else 0} rows",
            )
    else:
        evidence = f"{prefix[0]}{down_name}.weight has shape {list(down[0] or ())}"
        implied["qk_rope_head_dim"] = (rotary[0], evidence)
        if out and up[0]:
            v_dim = out[1] // heads
            implied["v_head_dim"] = (v_dim, f"{prefix[0]}o_proj.weight has shape {list(out)}")
            evidence = f"{prefix[0]}kv_b_proj.weight has shape {list(up[0])}"
            implied["qk_nope_head_dim"] = (up[0][0] // heads - v_dim, evidence)
        if query_down := shape(0, "q_a_proj"):
            implied["q_lora_rank"] = (query_down[0], f"{prefix[0]}q_a_proj.weight has shape {list(query_down)}")
        elif text.get("q_lora_rank") is not None and shape(0, "q_proj"):
            implied["q_lora_rank"] = (None, f"{prefix[0]}q_a_proj.weight is absent")
    found = {name.removeprefix(prefix[0]).removesuffix(".bias") for name in shapes
             if name.startswith(prefix[0]) and name.endswith(".bias")}  # fmt: skip
    evidence = f"biases in {prefix[0]}: {', '.join(sorted(found)) or 'none'}"
    implied["attention_bias"] = (bool(found), evidence)
    if found and found != set(default_biases("m2la", layout, text.get("q_lora_rank"))):
        implied["attention_bias_modules"] = (sorted(found), evidence)
    return implied


def _same(said: Any, value: Any) -> bool:
    """A number stands for one entry a layer; the order of module names means nothing."""
    if isinstance(said, int) and isinstance(value, list):
        return all(entry == said for entry in value)
    if isinstance(said, (list, tuple)) and isinstance(value, list):
        return sorted(said) == value if value and isinstance(value[0], str) else list(said) == value
    return bool(said == value)


def _brief(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], int):
        return str(value[0]) if len(set(value)) == 1 else str(value)
    return repr(value)


def _per_layer(value: Any, layers: int, name: str) -> tuple[int, ...]:
    if value is None:
        raise ValueError(f"{name} is missing")
    entries = (value,) * layers if isinstance(value, int) else tuple(value)
    if len(entries) != layers:
        raise ValueError(f"{name} has {len(entries)} entries for {layers} layers")
    if min(entries) < 1:
        raise ValueError(f"{name} must be at least 1 in every layer")
    return entries
