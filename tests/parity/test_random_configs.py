"""Random small configs and weights: both backends against each other and against a plain restatement in float64."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivcore.inputs import ModelInputs

# Activations stay within some tens; float32 against float64 then differs by about 1e-5 of the largest.
RELATIVE_TOLERANCE = 1e-4
few = settings(max_examples=25, suppress_health_check=list(HealthCheck))
Raw = dict[str, Any]


@st.composite
def text_configs(draw: st.DrawFn, attention: str) -> Raw:
    """text_config of a decoder: `gqa`, `release` (M2LA), or `norm` (M2LA after q/k norm)."""
    groups = draw(st.sampled_from([1, 2]))
    heads = groups * draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 3))
    head_dim, rope_dim = 2 * draw(st.integers(2, 7)), 2 * draw(st.integers(1, 8))
    half = (rope_dim if attention == "release" else head_dim) // 2
    height, width = draw(st.integers(0, (half + 1) // 3)), draw(st.integers(0, half // 3))
    text: Raw = {
        "vocab_size": draw(st.integers(40, 70)),
        "hidden_size": draw(st.sampled_from([16, 20, 33])),
        "intermediate_size": draw(st.integers(5, 30)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "rope_theta": draw(st.sampled_from([50.0, 10_000.0, 5e6])),
        "rope_scaling": {"rope_type": "default", "mrope_section": [half - height - width, height, width]},
        "attention_bias": draw(st.booleans()),
        "attention": "gqa" if attention == "gqa" else "m2la",
    }
    if attention == "gqa":
        return text
    ranks = draw(st.lists(st.integers(2, 18), min_size=layers, max_size=layers))
    text |= {"attention_layout": attention, "qk_latent_layernorm": draw(st.booleans()), "kv_lora_rank_list": ranks}
    if draw(st.booleans()):
        text["kv_lora_rank"] = text.pop("kv_lora_rank_list")[0]
    if attention == "release":
        text |= {
            "qk_nope_head_dim": draw(st.integers(1, 11)),
            "qk_rope_head_dim": rope_dim,
            "v_head_dim": draw(st.integers(1, 11)),
            "q_lora_rank": draw(st.one_of(st.none(), st.integers(3, 12))),
            "rope_interleave": draw(st.booleans()),
        }
    else:
        counts = st.lists(st.integers(1, 2), min_size=layers, max_size=layers)
        text["qk_rope_num_heads"] = draw(st.one_of(st.integers(1, 2), counts))
    if text["attention_bias"] and draw(st.booleans()):
        down = "kv_a_proj_with_mqa" if attention == "release" else "kv_a_proj"
        query = "q_b_proj" if text.get("q_lora_rank") else "q_proj"
        text["attention_bias_modules"] = [down, query, "o_proj"]
    return text


@st.composite
def vision_configs(draw: st.DrawFn, text: Raw) -> Raw:
    heads, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    listed = st.lists(st.integers(0, depth - 1), unique=True, max_size=min(depth, text["num_hidden_layers"]))
    return {
        "depth": depth,
        "hidden_size": heads * draw(st.sampled_from([4, 8, 12])),
        "intermediate_size": draw(st.integers(5, 40)),
        "num_heads": heads,
        "patch_size": draw(st.sampled_from([2, 3])),
        "temporal_patch_size": draw(st.integers(1, 2)),
        "spatial_merge_size": draw(st.sampled_from([1, 2, 2, 3])),
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": draw(st.integers(1, 6)) ** 2,
        "deepstack_visual_indexes": sorted(draw(listed)),
    }


@st.composite
def cases(draw: st.DrawFn, attention: str) -> tuple[Raw, ModelInputs, int]:
    """config.json's content, a prompt of text, images and videos in any order and of odd sizes, and a seed."""
    text = draw(text_configs(attention))
    vision = draw(vision_configs(text))
    image, video = text["vocab_size"] - 1, text["vocab_size"] - 2
    raw = {
        "model_type": draw(st.sampled_from(["internvideo3", "qwen3_vl"])),
        "text_config": text,
        "vision_config": vision,
        "image_token_id": image,
        "video_token_id": video,
        "tie_word_embeddings": draw(st.booleans()),
    }
    seed, merge = draw(st.integers(0, 2**31)), vision["spatial_merge_size"]
    random = np.random.default_rng(seed)

    def some_text(least: int) -> list[int]:
        return random.integers(0, video, draw(st.integers(least, 6))).tolist()

    tokens, grids = some_text(0), []
    for kind in draw(st.lists(st.sampled_from([image, video]), max_size=3)):
        frames = 1 if kind == image else draw(st.integers(1, 3))
        rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        grids.append([frames, rows * merge, columns * merge])
        for _ in range(frames):
            tokens += [kind] * (rows * columns) + some_text(1)
    tokens += some_text(1)
    patch_dim = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    patches = sum(t * h * w for t, h, w in grids)
    pixels = random.standard_normal((patches, patch_dim)).astype(np.float32) if grids else None
    inputs = ModelInputs(np.array(tokens, np.int32), pixels, np.array(grids, np.int32) if grids else None)
    return raw, inputs, seed


def close(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert actual.shape == expected.shape, what
    tolerance = RELATIVE_TOLERANCE * max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=what)


def check(case: tuple[Raw, ModelInputs, int], libraries: dict[str, ModuleType], restatement: ModuleType,
          write_random: Any) -> None:  # fmt: skip
    raw, inputs, seed = case
    with tempfile.TemporaryDirectory() as folder:
        weights = write_random(Path(folder), raw, seed)
        expected = restatement.run(raw, weights, inputs.token_ids, inputs.pixels, inputs.grid_thw)
        found = {}
        for backend, library in libraries.items():
            model = library.load(folder)
            if inputs.pixels is not None:
                tokens, deepstack = model.encode_vision(inputs.pixels, inputs.grid_thw)
                close(tokens, expected.tokens, f"{backend} vision tokens")
                assert len(deepstack) == len(expected.deepstack)
                for index, feature in enumerate(expected.deepstack):
                    close(deepstack[index], feature, f"{backend} DeepStack {index}")
            seen: dict[str, np.ndarray] = {}
            found[backend] = model.logits(inputs, observe=seen.__setitem__)
            close(seen["embeddings"], expected.embeddings, f"{backend} embeddings")
            for index, activation in enumerate(expected.layers):
                close(seen[f"layers.{index}"], activation, f"{backend} layer {index}")
            close(found[backend], expected.logits, f"{backend} logits")
            check_invariants(model, inputs, expected.logits[-1], backend)
        close(found["mlx"], found["torch"], "mlx against torch")


def check_invariants(model: Any, inputs: ModelInputs, last: np.ndarray, backend: str) -> None:
    """However a prompt is cut up, and under any budget, the logits after it are the same."""
    for form in ("expanded", "absorbed"):
        for chunk, budget in ((1, 1), (3, 2**29), (7, 1), (None, 1)):
            model.form, model.memory_budget = form, budget
            cache = model.new_cache()
            close(model.prefill(inputs, cache, chunk=chunk), last, f"{backend} {form}, chunk {chunk}, budget {budget}")
            assert cache.length == len(inputs.token_ids)


@pytest.mark.parametrize("layout", ["release", "norm"])
def test_a_bias_on_kv_b_proj_counts_in_both_forms(
    layout: str, tmp_path: Path, libraries: dict[str, ModuleType], restatement: ModuleType, write_random: Any
) -> None:
    text = {
        "vocab_size": 30, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 100.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}, "attention": "m2la",
        "attention_layout": layout, "kv_lora_rank": 6, "attention_bias_modules": ["kv_b_proj"],
    }  # fmt: skip
    if layout == "release":
        text |= {"qk_nope_head_dim": 5, "qk_rope_head_dim": 8, "v_head_dim": 7}
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "patch_size": 2, "spatial_merge_size": 2,
        "out_hidden_size": 16, "num_position_embeddings": 4,
    }  # fmt: skip
    raw = {
        "model_type": "internvideo3", "text_config": text, "vision_config": vision,
        "image_token_id": 28, "video_token_id": 29,
    }  # fmt: skip
    weights = write_random(tmp_path, raw)
    assert "model.language_model.layers.0.self_attn.kv_b_proj.bias" in weights
    inputs = ModelInputs(np.arange(20, dtype=np.int32), None, None)
    expected = restatement.run(raw, weights, inputs.token_ids, None, None).logits
    for backend, library in libraries.items():
        model = library.load(tmp_path)
        for model.form in ("expanded", "absorbed"):
            close(model.logits(inputs), expected, f"{backend} {model.form}")


@few
@given(case=cases("gqa"))
def test_grouped_query_attention_is_qwen3_s(
    case: Any, libraries: dict[str, ModuleType], restatement: ModuleType, write_random: Any
) -> None:
    check(case, libraries, restatement, write_random)


@few
@given(case=cases("release"))
def test_the_release_layout_is_the_design_s_formula(
    case: Any, libraries: dict[str, ModuleType], restatement: ModuleType, write_random: Any
) -> None:
    check(case, libraries, restatement, write_random)


@few
@given(case=cases("norm"))
def test_the_norm_layout_is_the_design_s_formula(
    case: Any, libraries: dict[str, ModuleType], restatement: ModuleType, write_random: Any
) -> None:
    check(case, libraries, restatement, write_random)
