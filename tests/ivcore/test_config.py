"""config.json: both spellings, what tensors fill in, what contradicts them, and what is refused by name."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ivcore.config
from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.errors import ConfigError
from ivcore.shards import Checkpoint

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
NAMES = ["iv3-micro", "qwen3vl-micro"]
Raw = dict[str, Any]
Change = Callable[[Raw], Any]


def raw_config(name: str = "iv3-micro") -> Raw:
    return json.loads((REFERENCE / name / "config.json").read_text())


def shapes_of(name: str = "iv3-micro") -> dict[str, tuple[int, ...]]:
    return Checkpoint(REFERENCE / name).shapes()


def text(**fields: Any) -> Change:
    return lambda raw: raw["text_config"].update(fields)


def vision(**fields: Any) -> Change:
    return lambda raw: raw["vision_config"].update(fields)


def rope(**fields: Any) -> Change:
    return lambda raw: raw["text_config"]["rope_scaling"].update(fields)


def top(**fields: Any) -> Change:
    return lambda raw: raw.update(fields)


def drop(section: str | None, field: str) -> Change:
    return lambda raw: (raw[section] if section else raw).pop(field)


def changed(change: Change, name: str = "iv3-micro") -> Raw:
    raw = raw_config(name)
    change(raw)
    return raw


def message(raw: Raw, **how: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw, source="folder/config.json", **how)
    words = str(caught.value)
    assert words.startswith("folder/config.json")
    assert "\n" not in words and words.endswith(".")
    return words


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_the_round_trip(name: str) -> None:
    config = ModelConfig.from_dir(REFERENCE / name)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.text.geometry == config.text.geometry


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_keeps_every_field_of_the_original(name: str) -> None:
    raw, back = raw_config(name), ModelConfig.from_dict(raw_config(name)).to_dict()
    for section in (None, "vision_config", "text_config"):
        before, after = (raw, back) if section is None else (raw[section], back[section])
        for field, value in before.items():
            # One of the two places is enough for what both of them say; what is null may be left out.
            if (
                field in ("text_config", "vision_config")
                or value is None
                or (section and field == "tie_word_embeddings")
            ):
                continue
            if field == "rope_scaling":
                assert {**after[field], **value} == after[field]
            else:
                assert after[field] == value, field


def test_the_reference_is_what_its_description_says() -> None:
    config = ModelConfig.from_dir(REFERENCE / "iv3-micro")
    assert (config.text.attention, config.text.attention_layout) == ("m2la", "release")
    geometry = config.text.geometry
    assert geometry.latent_ranks == (56,) * 5
    assert (geometry.num_heads, geometry.nope_dim, geometry.rope_dim, geometry.v_dim) == (4, 32, 32, 32)
    assert geometry.biases == {"q_proj", "kv_a_proj_with_mqa"}
    assert geometry.cache_width(0) == 56 + 32
    assert geometry.softmax_scale == pytest.approx(1 / 8)
    assert ModelConfig.from_dir(REFERENCE / "qwen3vl-micro").text.attention == "gqa"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("theta_inside", [True, False])
def test_both_spellings_of_the_rope_settings_mean_the_same(name: str, theta_inside: bool) -> None:
    raw = raw_config(name)
    settings = {**raw["text_config"].pop("rope_scaling"), "rope_theta": raw["text_config"].pop("rope_theta")}
    if not theta_inside:
        raw["text_config"]["rope_theta"] = settings.pop("rope_theta")
    raw["text_config"]["rope_parameters"] = settings
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(raw_config(name))


@pytest.mark.parametrize(
    "change",
    [
        rope(type="default"),
        rope(rope_type="mrope"),
        lambda raw: raw["text_config"]["rope_scaling"].pop("mrope_interleaved"),
        text(sliding_window=4096, use_sliding_window=False),
        text(sliding_window=None, layer_types=["full_attention"] * 5),
        text(rope_theta=5_000_000),
    ],
)
def test_harmless_spellings_change_nothing(change: Change) -> None:
    assert ModelConfig.from_dict(changed(change)) == ModelConfig.from_dict(raw_config())


def test_a_dense_model_may_say_that_it_has_no_experts() -> None:
    assert (
        ModelConfig.from_dict(changed(text(num_experts=0))).text.geometry
        == ModelConfig.from_dict(raw_config()).text.geometry
    )


SILENT = [
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_bias", "qk_latent_layernorm",
    "q_lora_rank", "rope_interleave",
]  # fmt: skip


@pytest.mark.parametrize("silent", [[field] for field in SILENT] + [SILENT], ids=lambda fields: "+".join(fields))
def test_what_the_config_does_not_say_is_read_from_the_shapes(silent: list[str]) -> None:
    raw = raw_config()
    for field in silent:
        del raw["text_config"][field]
    config = ModelConfig.from_dict(raw, shapes=shapes_of())
    said = ModelConfig.from_dir(REFERENCE / "iv3-micro")
    assert config.text.geometry == said.text.geometry
    assert manifest(config) == shapes_of()


ODD: Raw = {
    "kv_lora_rank_list": [50, 40, 30, 20, 10],
    "kv_lora_rank": None,
    "qk_nope_head_dim": 11,
    "qk_rope_head_dim": 32,
    "v_head_dim": 13,
    "q_lora_rank": 17,
    "qk_latent_layernorm": True,
    "attention_bias_modules": ["kv_a_proj_with_mqa", "o_proj", "q_b_proj"],
}


@pytest.mark.parametrize(
    "silent", [[field] for field in ODD] + [[*ODD, "attention_bias"]], ids=lambda fields: "+".join(fields)
)
def test_a_silent_config_finds_odd_dimensions_ranks_biases_and_compression(silent: list[str]) -> None:
    raw = changed(text(**ODD))
    said = ModelConfig.from_dict(raw)
    shapes = manifest(said)
    for field in silent:
        del raw["text_config"][field]
    found = ModelConfig.from_dict(raw, shapes=shapes)
    assert found.text.geometry == said.text.geometry
    assert manifest(found) == shapes


@pytest.mark.parametrize(
    "silent",
    [
        ["attention_layout"],
        ["qk_rope_num_heads"],
        ["attention_layout", "qk_rope_num_heads", "kv_lora_rank", "attention", "attention_bias"],
    ],
    ids="+".join,
)
def test_the_norm_layout_and_its_rope_keys_are_read_from_the_shapes(silent: list[str]) -> None:
    raw = changed(
        text(attention="m2la", attention_layout="norm", qk_rope_num_heads=[1, 2, 1, 2, 1], rope_interleave=False)
    )
    said = ModelConfig.from_dict(raw)
    shapes = manifest(said)
    assert shapes["model.language_model.layers.1.self_attn.kv_a_proj.weight"] == (56 + 2 * 32, 2 * 2 * 32)
    for field in silent:
        del raw["text_config"][field]
    assert ModelConfig.from_dict(raw, shapes=shapes).text.geometry == said.text.geometry


def test_without_a_head_in_the_tensors_a_silent_config_is_tied() -> None:
    raw, shapes = raw_config(), shapes_of()
    del raw["tie_word_embeddings"], raw["text_config"]["tie_word_embeddings"]
    assert not ModelConfig.from_dict(raw, shapes=shapes).tie_word_embeddings
    del shapes["lm_head.weight"]
    assert ModelConfig.from_dict(raw, shapes=shapes).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "field", "said", "found"),
    [
        (text(kv_lora_rank=64), "kv_lora_rank", "64", "56"),
        (text(kv_lora_rank_list=[56, 56, 56, 56, 57]), "kv_lora_rank_list", "[56, 56, 56, 56, 57]", "56"),
        (text(qk_nope_head_dim=16), "qk_nope_head_dim", "16", "32"),
        (text(qk_rope_head_dim=64), "qk_rope_head_dim", "64", "32"),
        (text(v_head_dim=48), "v_head_dim", "48", "32"),
        (text(q_lora_rank=24), "q_lora_rank", "24", "q_a_proj.weight is absent"),
        (text(attention_bias=False), "attention_bias", "False", "kv_a_proj_with_mqa, q_proj"),
        (text(qk_latent_layernorm=True), "qk_latent_layernorm", "True", "kv_a_layernorm.weight is absent"),
        (text(attention_layout="norm"), "attention_layout", "'norm'", "'release'"),
        (text(attention="gqa"), "attention", "'gqa'", "'m2la'"),
    ],
)
def test_a_contradiction_shows_both_sides(change: Change, field: str, said: str, found: str) -> None:
    words = message(changed(change), shapes=shapes_of())
    assert f"text_config.{field} is {said}, but the tensors say" in words
    assert found in words


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (top(model_type="llama"), ["model_type", "'llama'", "internvideo3", "qwen3_vl"]),
        (drop(None, "model_type"), ["model_type"]),
        (top(text_config=3), ["text_config"]),
        (drop(None, "vision_config"), ["vision_config"]),
        (rope(rope_type="yarn", factor=4.0), ["rope_type", "'yarn'"]),
        (rope(type="linear"), ["rope_type", "'linear'"]),
        (rope(factor=2.0), ["rope_scaling.factor"]),
        (rope(mrope_interleaved=False), ["mrope_interleaved"]),
        (rope(mrope_section=[8, 8, 8]), ["mrope_section", "[8, 8, 8]"]),
        (rope(mrope_section=[1, 9, 6]), ["mrope_section", "[1, 9, 6]"]),
        (rope(mrope_section=[6, 10]), ["mrope_section"]),
        (rope(mrope_section="6"), ["mrope_section"]),
        (rope(rope_type=["default"]), ["rope_type"]),
        (lambda raw: raw["text_config"]["rope_scaling"].pop("mrope_section"), ["mrope_section", "missing"]),
        (drop("text_config", "rope_scaling"), ["rope_scaling", "missing"]),
        (drop("text_config", "rope_theta"), ["rope_theta", "missing"]),
        (text(rope_theta="5e6"), ["rope_theta"]),
        (text(rope_theta=-1.0), ["rope_theta"]),
        (text(num_experts=8), ["num_experts", "mixture-of-experts"]),
        (text(moe_intermediate_size=768), ["moe_intermediate_size", "mixture-of-experts"]),
        (text(sliding_window=4096), ["sliding_window", "4096"]),
        (text(sliding_window=4096, use_sliding_window=True), ["sliding_window"]),
        (text(layer_types=["full_attention", "linear_attention"]), ["layer_types"]),
        (text(layer_types=5), ["layer_types"]),
        (text(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
        (text(hidden_act="gelu"), ["hidden_act", "gelu"]),
        (vision(hidden_act="silu"), ["vision_config.hidden_act"]),
        (vision(in_channels=1), ["in_channels"]),
        (vision(num_position_embeddings=65), ["num_position_embeddings"]),
        (vision(num_heads=3), ["num_heads"]),
        (vision(deepstack_visual_indexes=[1, 4]), ["deepstack_visual_indexes"]),
        (vision(out_hidden_size=96), ["out_hidden_size", "96", "128"]),
        (vision(depth="4"), ["vision_config.depth", '"4"']),
        (vision(rope_parameters={"rope_type": "axial", "rope_theta": 500.0}), ["vision_config", "rope_theta"]),
        (drop("vision_config", "depth"), ["vision_config.depth", "missing"]),
        (drop("text_config", "num_hidden_layers"), ["num_hidden_layers", "missing"]),
        (drop("text_config", "vocab_size"), ["vocab_size", "missing"]),
        (drop(None, "image_token_id"), ["image_token_id", "missing"]),
        (text(num_hidden_layers=0), ["num_hidden_layers", "0"]),
        (text(num_hidden_layers=5.5), ["num_hidden_layers", "5.5"]),
        (text(hidden_size=None), ["hidden_size", "null"]),
        (text(hidden_size=True), ["hidden_size", "true"]),
        (text(rms_norm_eps="1e-6"), ["rms_norm_eps"]),
        (text(num_key_value_heads=3), ["num_key_value_heads"]),
        (text(kv_lora_rank=0), ["kv_lora_rank"]),
        (text(kv_lora_rank_list=[56, 56]), ["kv_lora_rank", "2 entries for 5 layers"]),
        (text(kv_lora_rank_list=["a"] * 5), ["kv_lora_rank_list"]),
        (text(qk_nope_head_dim=-32), ["qk_nope_head_dim"]),
        (text(q_lora_rank=0), ["q_lora_rank"]),
        (text(qk_rope_num_heads=2), ["qk_rope_num_heads"]),
        (text(attention_layout="norm", q_lora_rank=8), ["q_lora_rank"]),
        (text(attention_layout="norm", v_head_dim=16), ["v_head_dim"]),
        (text(attention_bias="yes"), ["attention_bias"]),
        (top(quantization={"bits": 7, "group_size": 64}), ["quantization.bits"]),
        (top(quantization={"bits": 4}), ["quantization.group_size", "missing"]),
        (top(quantization={"bits": 4, "group_size": 64, "mode": "mxfp4"}), ["quantization.mode"]),
        (top(quantization="4bit"), ["quantization"]),
        (top(quantization_config={"quant_method": "fp8"}), ["quant_method", "'fp8'"]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(change: Change, names: list[str]) -> None:
    words = message(changed(change))
    for name in names:
        assert name in words


@pytest.mark.parametrize("value", [None, "x", 3.5, -1, [], {}, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_field_of_any_wrong_type_never_escapes_as_another_exception(name: str, value: Any) -> None:
    original, shapes = raw_config(name), shapes_of(name)
    places = [(section, field) for section in ("text_config", "vision_config") for field in original[section]]
    places += [(None, field) for field in original]
    places += [("rope_scaling", field) for field in original["text_config"]["rope_scaling"]]
    for section, field in places:
        raw = copy.deepcopy(original)
        inner = raw["text_config"]["rope_scaling"] if section == "rope_scaling" else raw[section] if section else raw
        inner[field] = value
        for known in (None, shapes):
            try:
                ModelConfig.from_dict(raw, shapes=known, source="the file")
            except ConfigError as error:
                assert str(error).startswith("the file: ") and "\n" not in str(error)
            except Exception as error:
                pytest.fail(f"{section}.{field} = {value!r}: {type(error).__name__}: {error}")


def test_unknown_fields_are_kept_and_mentioned_once(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(ivcore.config, "_mentioned", set())
    raw = changed(text(flash_mla_kernel="v2"))
    raw |= {"release_date": "2026-06"}
    with caplog.at_level(logging.WARNING):
        config = ModelConfig.from_dict(raw, source="folder/config.json")
        ModelConfig.from_dict(raw, source="folder/config.json")
    [record] = caplog.records
    assert "text_config.flash_mla_kernel" in record.getMessage() and "release_date" in record.getMessage()
    assert "folder/config.json" in record.getMessage()
    back = config.to_dict()
    assert back["release_date"] == "2026-06"
    assert back["text_config"]["flash_mla_kernel"] == "v2"


def test_a_known_config_mentions_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(ivcore.config, "_mentioned", set())
    for name in NAMES:
        ModelConfig.from_dir(REFERENCE / name)
    assert not caplog.records


def test_a_folder_without_a_readable_config_is_one_sentence(tmp_path: Path) -> None:
    for content, words in (
        (None, "no config.json"),
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ("\xff", "JSON"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=words) as caught:
            ModelConfig.from_dir(tmp_path)
        assert "config.json" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="nowhere"):
        ModelConfig.from_dir(tmp_path / "nowhere")


def test_per_module_entries_of_the_quantization_block_override_it() -> None:
    block = {"bits": 4, "group_size": 64, "a.b": {"bits": 8}, "a.c": False, "a.d": {"bits": 2, "group_size": 32}}
    quantization = ModelConfig.from_dict(changed(top(quantization=block))).quantization
    assert quantization is not None
    assert [quantization.of_module(name) for name in ("x", "a.b", "a.c", "a.d")] == [(4, 64), (8, 64), None, (2, 32)]


def test_absorbed_is_chosen_where_it_costs_less() -> None:
    """Counting the multiplications of both forms, per key and head, for S query tokens: design's two formulas."""
    release = text(
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, qk_nope_head_dim=128, qk_rope_head_dim=128,
        v_head_dim=128, kv_lora_rank=896,
    )  # fmt: skip
    raw = changed(release)
    raw["text_config"]["rope_scaling"]["mrope_section"] = [24, 20, 20]
    threshold = ModelConfig.from_dict(raw).text.geometry.absorbed_below(0)
    tokens = np.arange(1, 1000)
    absorbed = tokens * (2 * 896 + 128)
    expanded = 896 * (128 + 128) + tokens * (128 + 128 + 128)
    cheaper = int(tokens[absorbed < expanded].max())
    assert abs(threshold - cheaper) <= 1
    assert 145 < threshold < 155
