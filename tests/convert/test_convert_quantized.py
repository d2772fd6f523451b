"""`convert` into and out of MLX's packed form: what MLX's own library computes, and what both backends load."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.plan import Options, make_plan, summarize
from convert.run import convert
from convert.source import open_source
from ivcore.errors import ConfigError
from ivcore.inputs import ModelInputs

mx = pytest.importorskip("mlx.core")

KINDS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
SAFETENSORS = {kind: name for name, kind in KINDS.items()} | {mx.uint32: "U32"}
UP, O0 = "model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.0.self_attn.o_proj"
few = settings(max_examples=15)


def to_mx(stored: Any) -> Any:
    flat = np.frombuffer(stored.data, np.uint8)
    return mx.array(flat).view(KINDS[stored.dtype]).reshape(stored.shape)


def from_mx(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    return SAFETENSORS[array.dtype], tuple(array.shape), np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def packed_by_mx(stored: Any, module: str, bits: int, group_size: int) -> dict[str, Any]:
    parts = mx.quantize(to_mx(stored), group_size=group_size, bits=bits, stream=mx.cpu)
    return {f"{module}.{name}": from_mx(part) for name, part in zip(("weight", "scales", "biases"), parts, strict=True)}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def is_linear(name: str, stored: Any) -> bool:
    """What the issue wants packed by default: the matrices of the decoder, its embedding and head."""
    return name.endswith(".weight") and len(stored.shape) == 2 and not name.startswith("model.visual.")


def expected_of(tensors: Mapping[str, Any], bits: int, group_size: int) -> dict[str, Any]:
    """Every tensor of a float checkpoint quantised by the issue's rules, packed by MLX."""
    expected: dict[str, Any] = {}
    for name, stored in tensors.items():
        module = name.removesuffix(".weight")
        if is_linear(name, stored) and stored.shape[1] % group_size == 0:
            expected |= packed_by_mx(stored, module, 8 if module.endswith("kv_b_proj") else bits, group_size)
        else:
            expected[name] = stored
    return expected


def check_block(folder: Path, tensors: Mapping[str, Any], columns: Mapping[str, int]) -> None:
    """config.json says of every packed module what is stored, by mlx-lm's rule: its own entry, else the common one."""
    block = config_of(folder)["quantization"]
    assert config_of(folder)["quantization_config"] == block
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    assert packed and block.keys() - {"bits", "group_size", "mode"} <= packed
    for module in packed:
        entry = block.get(module, block)
        words, groups = tensors[f"{module}.weight"].shape[1], tensors[f"{module}.scales"].shape[1]
        assert words * 32 == columns[module] * entry["bits"] and groups * entry["group_size"] == columns[module], module


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, bool, dict[str, Any]]:
    """Layout, tied embeddings, fields of text_config."""
    attention = draw(st.sampled_from(["release", "norm", "gqa"]))
    fields: dict[str, Any] = {
        "hidden_size": draw(st.sampled_from([64, 96, 128])),
        "intermediate_size": draw(st.sampled_from([40, 64, 128])),
        "vocab_size": draw(st.integers(96, 99)),
    }
    if attention != "gqa":
        fields["kv_lora_rank"] = draw(st.sampled_from([64, 128]))
    if attention == "release":
        fields["q_lora_rank"] = draw(st.sampled_from([None, 64]))
    return attention, draw(st.booleans()), fields


@few
@given(case=configs(), bits=st.sampled_from([4, 8]), group_size=st.sampled_from([32, 64, 128]),
       dtype=st.sampled_from(["F32", "F16", "BF16"]), seed=st.integers(0, 99))  # fmt: skip
def test_packed_tensors_are_mlx_s_and_all_others_stay(
    checkpoints: Any, case: Any, bits: int, group_size: int, dtype: str, seed: int
) -> None:
    attention, tied, fields = case
    config = {**checkpoints.config(attention, **fields), "tie_word_embeddings": tied}
    tensors = checkpoints.random(config, dtype, seed)
    expected = expected_of(tensors, bits, group_size)
    with tempfile.TemporaryDirectory() as name:
        source, target = checkpoints.write(Path(name) / "in", config, tensors), Path(name) / "out"
        convert(source, target, Options(bits=bits, group_size=group_size, shard_bytes=20_000))
        assert checkpoints.read(target) == expected
        columns = {name.removesuffix(".weight"): stored.shape[-1] for name, stored in tensors.items()}
        if any(name.endswith(".scales") for name in expected):
            check_block(target, checkpoints.read(target), columns)
        else:
            assert "quantization" not in config_of(target)
        # And back: what MLX dequantises.
        convert(target, Path(name) / "back", Options(dtype="fp32"))
        found = checkpoints.read(Path(name) / "back")
        assert found.keys() == tensors.keys() and "quantization" not in config_of(Path(name) / "back")
        for name, stored in found.items():
            module = name.removesuffix(".weight")
            if f"{module}.scales" in expected:
                parts = mx.quantize(to_mx(tensors[name]), group_size=group_size,
                                    bits=8 if module.endswith("kv_b_proj") else bits, stream=mx.cpu)  # fmt: skip
                own = {"group_size": group_size, "bits": 8 if module.endswith("kv_b_proj") else bits}
                dense = mx.dequantize(*parts, **own, stream=mx.cpu)
            else:
                dense = to_mx(tensors[name])
            assert stored == from_mx(dense.astype(mx.float32)), name


def test_both_the_cast_and_the_packing_are_mlx_s_when_both_are_asked(tmp_path: Path, checkpoints: Any) -> None:
    source = checkpoints.make(tmp_path / "in")
    convert(source, tmp_path / "out", Options(bits=4, dtype="bf16"))
    cast = {
        name: checkpoints.store(checkpoints.values(stored), "BF16") for name, stored in checkpoints.read(source).items()
    }
    assert checkpoints.read(tmp_path / "out") == expected_of(cast, 4, 64)


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
@pytest.mark.parametrize("layers", [1, 3, 8, 17])
def test_a_recipe_gives_the_bits_that_mlx_lm_s_of_that_name_does(
    tmp_path: Path, checkpoints: Any, recipe: str, layers: int
) -> None:
    builder = pytest.importorskip("mlx_lm.convert").mixed_quant_predicate_builder
    nn = pytest.importorskip("mlx.nn")
    source = checkpoints.make(tmp_path / "in", "gqa", num_hidden_layers=layers, hidden_size=32, head_dim=8,
                              rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1]})  # fmt: skip
    convert(source, tmp_path / "out", Options(recipe=recipe, group_size=32))
    tensors = checkpoints.read(source)

    class Decoder(nn.Module):
        """A module whose names are as many dotted parts long as ours, which is all that the predicate looks at."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = [0] * layers

        def named_modules(self) -> list[Any]:
            return [(name.removesuffix(".weight"), None) for name in tensors]

    predicate = builder(recipe, Decoder(), 32)
    expected: dict[str, Any] = {}
    for name, stored in tensors.items():
        module = name.removesuffix(".weight")
        expected |= (
            packed_by_mx(stored, module, predicate(module, None)["bits"], 32)
            if is_linear(name, stored)
            else {name: stored}
        )
    assert checkpoints.read(tmp_path / "out") == expected
    columns = {name.removesuffix(".weight"): stored.shape[-1] for name, stored in tensors.items()}
    check_block(tmp_path / "out", checkpoints.read(tmp_path / "out"), columns)


@pytest.mark.parametrize(("attention", "latent"), [("release", "kv_a_proj_with_mqa"), ("norm", "kv_a_proj")])
def test_in_a_recipe_the_latent_is_as_sensitive_as_values_and_kv_b_proj_has_8_bits(
    tmp_path: Path, checkpoints: Any, attention: str, latent: str
) -> None:
    source = checkpoints.make(tmp_path / "in", attention, num_hidden_layers=8)
    convert(source, tmp_path / "out", Options(recipe="mixed_2_6", group_size=32))
    found = checkpoints.read(tmp_path / "out")

    def bits(layer: int, module: str) -> int:
        name = f"model.language_model.layers.{layer}.self_attn.{module}"
        return found[f"{name}.weight"].shape[1] // found[f"{name}.scales"].shape[1]

    assert [bits(layer, latent) for layer in range(8)] == [6, 2, 2, 6, 2, 2, 6, 6]
    assert {bits(layer, "kv_b_proj") for layer in range(8)} == {8}
    assert {bits(layer, "q_proj") for layer in range(8)} == {2}


def test_mlx_s_own_layers_take_every_packed_tensor(tmp_path: Path, checkpoints: Any) -> None:
    """`nn.quantize` with the predicate by which mlx-lm reads a quantization block makes layers of the stored shapes."""
    nn, utils = pytest.importorskip("mlx.nn"), pytest.importorskip("mlx.utils")
    source = checkpoints.make(tmp_path / "in", "norm")
    convert(source, tmp_path / "out", Options(recipe="mixed_3_6", keep=("layers.1.mlp",), dtype="fp16"))
    block, found = config_of(tmp_path / "out")["quantization"], checkpoints.read(tmp_path / "out")
    root = nn.Module()
    for name, stored in checkpoints.read(source).items():
        if is_linear(name, stored):
            *parents, last = name.removesuffix(".weight").split(".")
            module = root
            for parent in parents:
                module = module.setdefault(parent, nn.Module())
            rows, columns = stored.shape
            embedding = last == "embed_tokens"
            module[last] = nn.Embedding(rows, columns) if embedding else nn.Linear(columns, rows, bias=False)

    def predicate(path: str, module: Any) -> Any:
        if path in block:
            return block[path]
        return hasattr(module, "to_quantized") and f"{path}.scales" in found

    nn.quantize(root, block["group_size"], block["bits"], class_predicate=predicate)
    shapes = {name: tuple(array.shape) for name, array in utils.tree_flatten(root.parameters())}
    packed = {name for name in shapes if f"{name.rpartition('.')[0]}.scales" in shapes}
    assert len(packed) > 30
    for name in shapes:
        assert found[name].shape == shapes[name], name
        assert found[name].dtype == ("U32" if name in packed and name.endswith(".weight") else "F16"), name


def test_what_is_kept_stays_and_the_plan_says_why(tmp_path: Path, checkpoints: Any) -> None:
    source = checkpoints.make(tmp_path / "in", intermediate_size=72)
    options = Options(bits=4, group_size=32, keep=("lm_head", "layers.1", "*.q_*", "self_attn.kv_b_proj"))
    convert(source, tmp_path / "out", options)
    before, found = checkpoints.read(source), checkpoints.read(tmp_path / "out")
    layer = "model.language_model.layers."
    packed = {name.removesuffix(".scales") for name in found if name.endswith(".scales")}
    assert packed == {
        "model.language_model.embed_tokens", f"{layer}0.self_attn.kv_a_proj_with_mqa", f"{layer}0.self_attn.o_proj",
        f"{layer}0.mlp.gate_proj", f"{layer}0.mlp.up_proj",
    }  # fmt: skip
    assert all(found[name] == stored for name, stored in before.items() if name.removesuffix(".weight") not in packed)
    rows = summarize(make_plan(open_source(source), options))
    reasons = {row.kind: row.reason for row in rows if row.after == "fp32"}
    assert "--keep lm_head" in reasons["lm_head.weight"]
    assert "--keep self_attn.kv_b_proj" in {
        row.reason for row in rows if row.kind == "layers.self_attn.kv_b_proj.weight"
    }
    down = {row.reason for row in rows if row.kind == "layers.mlp.down_proj.weight"}
    assert any("72" in reason and "32" in reason for reason in down)
    assert "vision" in reasons["visual.merger.linear_fc1.weight"]


def test_every_pattern_must_name_a_module(tmp_path: Path, checkpoints: Any) -> None:
    source = checkpoints.make(tmp_path / "in")
    for pattern in ("q_pro", "", "layers.2", "lm_head.weight", "layers.0.q_proj", "MLP", "[", "visual."):
        with pytest.raises(ConfigError, match="--keep"):
            convert(source, tmp_path / "out", Options(bits=4, keep=("lm_head", pattern)))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# A packed folder as the source.


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_without_options_packed_tensors_are_copied_bit_for_bit(tmp_path: Path, checkpoints: Any, dtype: str) -> None:
    source = checkpoints.make(tmp_path / "in", dtype=dtype, shards=2)
    convert(source, tmp_path / "packed", Options(recipe="mixed_3_6", group_size=32))
    convert(tmp_path / "packed", tmp_path / "out", Options(shard_bytes=10_000))
    assert checkpoints.read(tmp_path / "out") == checkpoints.read(tmp_path / "packed")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "packed")


def test_packed_parts_may_lie_in_different_shards_and_in_any_order(tmp_path: Path, checkpoints: Any) -> None:
    source = checkpoints.make(tmp_path / "in")
    convert(source, tmp_path / "packed", Options(bits=4))
    tensors = checkpoints.read(tmp_path / "packed")
    backwards = dict(sorted(tensors.items(), reverse=True))
    apart = checkpoints.write(tmp_path / "apart", config_of(tmp_path / "packed"), backwards, shards=3)
    convert(apart, tmp_path / "out", Options(shard_bytes=10_000))
    assert checkpoints.read(tmp_path / "out") == tensors


@pytest.mark.parametrize(("options", "bits"), [(Options(bits=8), 8), (Options(bits=4, dtype="fp16"), 4)])
def test_bits_requantise_the_dequantised_values(tmp_path: Path, checkpoints: Any, options: Options, bits: int) -> None:
    source = checkpoints.make(tmp_path / "in", "gqa")
    convert(source, tmp_path / "packed", Options(bits=4, group_size=32))
    convert(tmp_path / "packed", tmp_path / "out", options)
    dense = {}
    for name, stored in checkpoints.read(source).items():
        if is_linear(name, stored):
            parts = mx.quantize(to_mx(stored), group_size=32, bits=4, stream=mx.cpu)
            stored = stored._replace(data=from_mx(mx.dequantize(*parts, group_size=32, bits=4, stream=mx.cpu))[2])
        dense[name] = checkpoints.store(checkpoints.values(stored), "F16") if options.dtype else stored
    assert checkpoints.read(tmp_path / "out") == expected_of(dense, bits, 64)


# Adapters. Whole numbers and powers of two make every sum exact, in any order and in any blocks.


def write_adapter(folder: Path, updates: Mapping[str, tuple[np.ndarray, np.ndarray]], **settings: Any) -> Path:
    from safetensors.numpy import save_file

    tensors = {}
    for module, (a, b) in updates.items():
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(updates.values()))[0].shape[0]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["o_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def whole(tmp_path: Path, checkpoints: Any) -> tuple[Path, Path, dict[str, Any]]:
    """A checkpoint of whole numbers, an adapter of them, and the tensors once it is merged."""
    random = np.random.default_rng(1)
    config = checkpoints.config(intermediate_size=128)
    tensors = {
        name: checkpoints.store(random.integers(-8, 8, stored.shape).astype(np.float32))
        for name, stored in checkpoints.random(config).items()
    }
    source = checkpoints.write(tmp_path / "in", config, tensors, shards=2)
    updates, merged = {}, dict(tensors)
    for module in (O0, UP, "lm_head"):
        rows, columns = tensors[f"{module}.weight"].shape
        a = random.integers(-3, 3, (4, columns)).astype(np.float32)
        b = random.integers(-3, 3, (rows, 4)).astype(np.float32)
        updates[module] = (a, b)
        merged[f"{module}.weight"] = checkpoints.store(checkpoints.values(tensors[f"{module}.weight"]) + 2 * (b @ a))
    return source, write_adapter(tmp_path / "lora", updates), merged


def test_an_adapter_is_merged_into_float_weights_block_by_block(
    tmp_path: Path, checkpoints: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, adapter, merged = whole
    monkeypatch.setattr("convert.stream.BLOCK_BYTES", 1000)
    convert(source, tmp_path / "out", Options(adapter=adapter))
    assert checkpoints.read(tmp_path / "out") == merged
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["adapter"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in (tmp_path / "out/conversion.json").read_text()


def test_an_adapter_is_merged_before_quantising(tmp_path: Path, checkpoints: Any, whole: Any) -> None:
    source, adapter, merged = whole
    convert(source, tmp_path / "out", Options(adapter=adapter, bits=4, group_size=32))
    assert checkpoints.read(tmp_path / "out") == expected_of(merged, 4, 32)


def test_an_adapter_is_merged_into_packed_weights_and_only_its_modules_change(
    tmp_path: Path, checkpoints: Any, whole: Any
) -> None:
    source, adapter, _ = whole
    convert(source, tmp_path / "packed", Options(bits=8))
    convert(tmp_path / "packed", tmp_path / "out", Options(adapter=adapter))
    before, found = checkpoints.read(tmp_path / "packed"), checkpoints.read(tmp_path / "out")
    convert(tmp_path / "packed", tmp_path / "dense", Options(dtype="fp32"))
    dense = checkpoints.read(tmp_path / "dense")
    from safetensors.numpy import load_file

    factors = load_file(adapter / "adapter_model.safetensors")
    expected = dict(before)
    for module in (O0, UP, "lm_head"):
        a, b = (factors[f"base_model.model.{module}.lora_{which}.weight"] for which in "AB")
        gained = checkpoints.store(checkpoints.values(dense[f"{module}.weight"]) + 2 * (b @ a))
        expected |= packed_by_mx(gained, module, 8, 64)
    assert found == expected
    assert config_of(tmp_path / "out") == config_of(tmp_path / "packed")


# Both backends.


def prompt_of(arrays: Mapping[str, np.ndarray]) -> ModelInputs:
    """A video, an image and text, as a reference checkpoint was given them."""
    pixels = np.concatenate([arrays["pixel_values_videos"], arrays["pixel_values"]])
    grid = np.concatenate([arrays["video_grid_thw"], arrays["image_grid_thw"]]).astype(np.int32)
    return ModelInputs(arrays["input_ids"].astype(np.int32), pixels, grid)


@pytest.mark.parametrize("name", ["iv3-micro", "qwen3vl-micro"])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(dtype="bf16"),
        Options(bits=8, shard_bytes=10**6),
        Options(bits=4, group_size=32, dtype="fp32"),
        Options(recipe="mixed_4_6"),
    ],
    ids=["copy", "bf16", "8 bits", "4 bits", "mixed"],
)
def test_both_backends_load_what_was_written_and_agree(
    tmp_path: Path, micro: Path, name: str, options: Options
) -> None:
    convert(micro.with_name(name), tmp_path, options)
    with np.load(micro.with_name(name) / "expected.npz") as arrays:
        expected, prompt = arrays["logits"], prompt_of(arrays)
    mlx, torch = (
        pytest.importorskip(backend).load(tmp_path, dtype="float32").logits(prompt) for backend in ("ivmlx", "ivtorch")
    )
    np.testing.assert_allclose(mlx, torch, rtol=0, atol=1e-3)
    error = np.abs(mlx - expected).max()
    assert error < 1e-4 if options == Options() else 1e-4 < error < np.abs(expected).max()


@pytest.mark.parametrize(
    "case", ["tied", "tied, with a head all the same", "a query of low rank", "norm", "128 columns"]
)
def test_both_backends_load_every_layout_packed(tmp_path: Path, checkpoints: Any, case: str) -> None:
    fields = {"q_lora_rank": 64} if "low rank" in case else {"hidden_size": 128} if "128" in case else {}
    config = checkpoints.config("norm" if case == "norm" else "release", **fields)
    tensors = checkpoints.random(config)
    config["tie_word_embeddings"] = "tied" in case
    if case == "tied":
        del tensors["lm_head.weight"]
    elif "tied" in case:
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    source = checkpoints.write(tmp_path / "in", config, tensors)
    convert(source, tmp_path / "out", Options(bits=4, group_size=128 if "128" in case else 64))
    inputs = ModelInputs(np.arange(20, dtype=np.int32), None, None)
    logits = [pytest.importorskip(backend).load(tmp_path / "out").logits(inputs) for backend in ("ivmlx", "ivtorch")]
    assert np.isfinite(logits[0]).all()
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-3)
