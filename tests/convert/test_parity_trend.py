"""What arithmetic explains of an error, against MLX's own quantisation, and when a point leaves the trend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.parity.points import Point, points
from convert.parity.run import Run
from convert.parity.trend import Form, Judged, explain, judge, quantisation_error
from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.shards import TensorSpec

LAYERS = 12


def make_run(
    backend: Any = "mlx",
    dtype: str = "float32",
    stored: str = "F32",
    bits: dict[int, int] | None = None,
    scales: str = "F32",
    **text: Any,
) -> Run:
    """A run of a model of 12 layers that is never loaded; bits: of a layer's down_proj."""
    fields = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention": "gqa", "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}, **text,
    }  # fmt: skip
    vision = {
        "depth": 6, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [1, 3], "out_hidden_size": 64,
    }  # fmt: skip
    raw = {
        "model_type": "qwen3_vl", "text_config": fields, "vision_config": vision, "image_token_id": 62,
        "video_token_id": 63,
    }  # fmt: skip
    specs = {name: TensorSpec(shape, stored) for name, shape in manifest(ModelConfig.from_dict(raw)).items()}
    for layer, width in (bits or {}).items():
        module = f"model.language_model.layers.{layer}.mlp.down_proj"
        specs[f"{module}.weight"] = TensorSpec((64, 64 * width // 32), "U32")
        specs[f"{module}.scales"] = specs[f"{module}.biases"] = TensorSpec((64, 1), scales)
        block = raw.setdefault("quantization", {"bits": 4, "group_size": 64})
        block[module] = {"bits": width, "group_size": 64}  # type: ignore[index]
    return Run("m", Path("m"), backend, dtype, ModelConfig.from_dict(raw), specs)


ALL = {point.name: point for point in points(make_run().config)}


def judged(own: dict[str, float], rest: float, norms: dict[str, float] | None = None) -> list[Judged]:
    return [Judged(point, own.get(name, rest), (norms or {}).get(name, 1.0)) for name, point in ALL.items()]


def suspect(own: dict[str, float], rest: float, reference: Run, run: Run, norms: Any = None) -> str | None:
    place, limits = judge(judged(own, rest, norms), reference, run)
    assert len(limits) == len(ALL)
    return None if place is None else [*ALL][place]


def test_points_come_in_causal_order_and_share_all_tensors_among_them() -> None:
    names = [*ALL]
    assert names[:4] == ["visual.patch_embed", "visual.blocks.0", "visual.blocks.1", "visual.deepstack_merger_list.0"]
    assert names[-3:] == [f"layers.{LAYERS - 1}", "norm", "logits"]
    assert names.index("visual.merger") + 1 == names.index("embeddings")
    for tensor in make_run().specs:
        assert sum(tensor.startswith(point.modules) for point in ALL.values()) == 1, tensor


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_explained_quantisation_error_is_mlx_s_own_on_normal_weights_and_somewhat_above(
    bits: int, group_size: int
) -> None:
    mx = pytest.importorskip("mlx.core")
    weights = np.random.default_rng(bits).standard_normal((256, 512), dtype=np.float32)
    packed = mx.quantize(mx.array(weights), group_size=group_size, bits=bits)
    dense = np.array(mx.dequantize(*packed, group_size=group_size, bits=bits))
    measured = np.linalg.norm(dense - weights) / np.linalg.norm(weights)
    assert measured < quantisation_error(Form("float32", (bits, group_size))) < 2.5 * measured


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_same_arithmetic_explains_nothing_and_any_difference_is_named(dtype: str) -> None:
    a, b = make_run(dtype=dtype), make_run(dtype=dtype)
    assert all(explain(point, a, b).together == 0.0 for point in ALL.values())
    assert suspect({}, 0.0, a, b) is None
    for name in ALL:
        assert suspect({name: 1e-30}, 0.0, a, b) == name


def test_rounding_is_that_of_the_coarser_format() -> None:
    layer = ALL["layers.3"]
    explained = {
        (x, y): explain(layer, make_run(dtype=x), make_run("torch", dtype=y)).rounding
        for x in ("float32", "bfloat16", "float16")
        for y in ("float32", "bfloat16", "float16")
    }
    epsilons = {name: float(np.finfo(kind).eps) for name, kind in (("float32", "f4"), ("float16", "f2"))}
    assert epsilons["float32"] < explained["float32", "float32"] < epsilons["float16"]
    assert explained["float16", "float16"] == explained["float32", "float16"] == epsilons["float16"]
    assert all(value == 2.0**-7 for pair, value in explained.items() if "bfloat16" in pair)


def test_what_is_only_looked_up_is_equal_on_both_backends_unless_it_is_cast() -> None:
    embeddings = ALL["embeddings"]
    assert explain(embeddings, make_run("mlx"), make_run("torch")).together == 0.0
    assert explain(embeddings, make_run(), make_run(dtype="float16")).rounding > 0
    assert explain(embeddings, make_run(), make_run(stored="F16")).rounding == 2.0**-10


def test_a_folder_stored_in_fewer_bits_explains_their_rounding_in_float32_too() -> None:
    a, b = make_run(stored="F32"), make_run(stored="BF16")
    assert {explain(point, a, b).together for point in ALL.values()} == {2.0**-7}
    assert explain(ALL["layers.0"], make_run(stored="BF16"), make_run(stored="BF16")).together == 0.0


def test_only_points_whose_packing_differs_may_err_as_quantisation_does() -> None:
    a, b = make_run(), make_run(bits={3: 4, 5: 8})
    explained = {name: explain(point, a, b).quantisation for name, point in ALL.items()}
    assert explained["layers.3"] > 10 * explained["layers.5"] > 0
    assert all(value == 0 for name, value in explained.items() if name not in ("layers.3", "layers.5"))
    assert explain(ALL["layers.3"], make_run(bits={3: 8}), b).quantisation == explained["layers.3"]


def test_the_same_packing_differs_between_backends_by_the_rounding_of_its_scales() -> None:
    a, b = (make_run(backend, bits={3: 4}, scales="BF16") for backend in ("mlx", "torch"))
    assert explain(ALL["layers.3"], a, b).quantisation == 0.0
    assert explain(ALL["layers.3"], a, b).rounding == 2.0**-7
    assert explain(ALL["layers.4"], a, b).rounding < 1e-5
    assert explain(ALL["layers.3"], a, make_run("mlx", bits={3: 4}, scales="BF16")).together == 0.0


@pytest.mark.parametrize("name", ALL)
def test_in_float32_one_part_in_ten_thousand_is_named_at_any_point_and_rounding_at_none(name: str) -> None:
    a, b = make_run("mlx"), make_run("torch")
    rounding = {"embeddings": 0.0}
    # Own errors of 1e-7 to 2e-6 were measured, by width and library.
    for level in (1e-7, 2e-6):
        assert suspect(rounding, level, a, b) is None
        assert suspect(rounding | {name: 1e-4}, level, a, b) == name


def test_the_first_point_is_named_in_causal_order() -> None:
    a, b = make_run("mlx"), make_run("torch")
    own = {"embeddings": 0.0, "layers.7": 1e-3, "visual.merger": 1e-3, "layers.2": 0.5}
    assert suspect(own, 1e-7, a, b) == "visual.merger"


def test_numbers_that_are_not_finite_are_named() -> None:
    a, b = make_run(dtype="bfloat16"), make_run("torch", dtype="bfloat16")
    assert suspect({"embeddings": 0.0, "layers.9": math.nan, "layers.10": math.nan}, 1e-3, a, b) == "layers.9"
    assert suspect({"embeddings": 0.0, "layers.9": math.inf}, 1e-3, a, b) == "layers.9"


def test_quantised_layers_are_held_against_those_before_them_whatever_their_bits() -> None:
    bits = {layer: 8 if layer < 6 else 4 for layer in range(LAYERS)}
    a, b = make_run(), make_run(bits=bits)
    own = {f"layers.{layer}": (0.01 if width == 8 else 0.16) / (1 + layer / 4) for layer, width in bits.items()}
    assert suspect(own, 0.0, a, b) is None
    # The fourfold error of a 4-bit layer is explained by 4 bits, but not by 8.
    assert suspect(own | {"layers.4": 0.1}, 0.0, a, b) == "layers.4"
    assert suspect(own | {"layers.9": 0.9}, 0.0, a, b) == "layers.9"


def test_a_quantised_layer_after_float_ones_is_not_judged_by_their_rounding() -> None:
    a, b = make_run("torch"), make_run("mlx", bits={8: 4})
    own = {"embeddings": 0.0, "layers.8": 0.1}
    assert suspect(own, 1e-7, a, b) is None
    assert suspect(own | {"layers.9": 1e-3}, 1e-7, a, b) == "layers.9"


def test_a_stream_that_shrinks_keeps_the_rounding_of_what_it_was() -> None:
    a, b = make_run("mlx"), make_run("torch")
    norms = {f"layers.{layer}": 1e4 for layer in range(5, 11)} | {"layers.11": 10.0}
    own = {"embeddings": 0.0, "layers.11": 3e-4}
    assert suspect(own, 3e-7, a, b, norms) is None
    assert suspect(own, 3e-7, a, b) == "layers.11"
    assert suspect(own | {"layers.11": 0.3}, 3e-7, a, b, norms) == "layers.11"


def test_layers_with_another_attention_are_judged_by_each_other_alone() -> None:
    latent = {"attention": "m2la", "attention_layout": "norm", "kv_lora_rank": 24}
    a, b = make_run(), make_run(**latent)
    layers = {f"layers.{layer}": 0.05 + 0.01 * layer for layer in range(LAYERS)}
    own = dict.fromkeys((name for name in ALL if name not in layers), 0.0) | layers
    assert suspect(own, 0.0, a, b) is None
    assert suspect(own | {"layers.8": 0.9}, 0.0, a, b) == "layers.8"
    assert suspect(own | {"visual.blocks.2": 0.01}, 0.0, a, b) == "visual.blocks.2"
    # Nothing is known about the first of them.
    assert suspect(own | {"layers.0": 0.9}, 0.0, a, b) is None


def test_points_are_hashable_and_know_their_tower() -> None:
    assert {point.tower for point in ALL.values()} == {"vision", "decoder"}
    assert isinstance(ALL["norm"], Point) and len(set(ALL.values())) == len(ALL)
