"""The tensor manifest of a config, and the strict check of a checkpoint against it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from ivcore.config import ModelConfig, QuantizationConfig
from ivcore.errors import CheckpointError
from ivcore.geometry import LAYER_PREFIX
from ivcore.shards import FLOATS, TensorSpec


def manifest(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a config implies, quantised modules in their packed form."""
    shapes = {f"model.visual.{name}": shape for name, shape in _vision_shapes(config).items()}
    text = config.text
    shapes["model.language_model.embed_tokens.weight"] = (text.vocab_size, text.hidden_size)
    for layer in range(text.num_hidden_layers):
        prefix = LAYER_PREFIX.format(layer=layer)
        for name, shape in text.geometry.tensor_shapes(layer).items():
            shapes[f"{prefix}self_attn.{name}"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (text.hidden_size,)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}mlp.{name}.weight"] = (text.intermediate_size, text.hidden_size)
        shapes[f"{prefix}mlp.down_proj.weight"] = (text.hidden_size, text.intermediate_size)
    shapes["model.language_model.norm.weight"] = (text.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (text.vocab_size, text.hidden_size)
    return shapes


def _vision_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    vision = config.vision
    hidden, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (hidden, *patch),
        "patch_embed.proj.bias": (hidden,),
        "pos_embed.weight": (vision.num_position_embeddings, hidden),
    }
    for block in range(vision.depth):
        prefix = f"blocks.{block}."
        shapes |= norm(f"{prefix}norm1", hidden) | norm(f"{prefix}norm2", hidden)
        shapes |= linear(f"{prefix}attn.qkv", 3 * hidden, hidden) | linear(f"{prefix}attn.proj", hidden, hidden)
        shapes |= linear(f"{prefix}mlp.linear_fc1", vision.intermediate_size, hidden)
        shapes |= linear(f"{prefix}mlp.linear_fc2", hidden, vision.intermediate_size)
    mergers = {"merger": hidden} | {
        f"deepstack_merger_list.{index}": merged for index in range(len(vision.deepstack_visual_indexes))
    }
    for name, norm_width in mergers.items():
        shapes |= norm(f"{name}.norm", norm_width)
        shapes |= linear(f"{name}.linear_fc1", merged, merged)
        shapes |= linear(f"{name}.linear_fc2", vision.out_hidden_size, merged)
    return shapes


def packed_manifest(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorSpec],
                    quantization: QuantizationConfig) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """`shapes` with every module that `found` holds in MLX's packed form replaced by weight, scales and biases."""
    packed = dict(shapes)
    for name in [name for name in found if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        setting, dense = quantization.of_module(module), shapes.get(f"{module}.weight")
        if setting is None or dense is None or len(dense) != 2:
            continue
        bits, group_size = setting
        packed[f"{module}.weight"] = (dense[0], dense[1] * bits // 32)
        packed[f"{module}.scales"] = packed[f"{module}.biases"] = (dense[0], dense[1] // group_size)
    return packed


def check_specs(
    specs: Mapping[str, TensorSpec], config: ModelConfig, where: str, floats: Collection[str] = FLOATS
) -> None:
    """Compare tensors with a config's manifest; one CheckpointError lists all that does not fit.

    floats: the dtypes that a tensor may have that is not packed.
    """
    expected = manifest(config)
    if config.quantization:
        expected = packed_manifest(expected, specs, config.quantization)
    # A tied checkpoint may carry the head all the same; it is then the embedding once more.
    problems = [f"missing {name} {list(expected[name])}" for name in expected.keys() - specs.keys()]
    for name, spec in specs.items():
        if name not in expected:
            if not (config.tie_word_embeddings and name.startswith("lm_head.")):
                problems.append(f"unexpected {name} {list(spec.shape)} {spec.dtype}")
        elif spec.shape != expected[name]:
            problems.append(f"{name} has shape {list(spec.shape)}, but the config says {list(expected[name])}")
        elif spec.dtype not in (("U32",) if _packed(name, specs, config) else floats):
            problems.append(f"{name} is {spec.dtype}, which is not supported")
    if problems:
        count = f"{len(problems)} tensors do" if len(problems) > 1 else "1 tensor does"
        raise CheckpointError(
            f"{where}: {count} not fit the config ({config.model_type}, {config.text.attention}): "
            + "; ".join(sorted(problems)) + "."
        )  # fmt: skip


def _packed(name: str, specs: Mapping[str, TensorSpec], config: ModelConfig) -> bool:
    module = name.removesuffix(".weight")
    return config.quantization is not None and name.endswith(".weight") and f"{module}.scales" in specs


def stored_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """The float dtype that most numbers of a checkpoint have: "F32", "BF16" or "F16"; a model computes in one."""
    counts = {dtype: sum(prod(spec.shape) for spec in specs.values() if spec.dtype == dtype) for dtype in FLOATS}
    return max(counts, key=lambda dtype: counts[dtype])
