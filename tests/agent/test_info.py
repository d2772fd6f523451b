"""`iv3 info`: its numbers against hand algebra on the release's shapes, and what it prints."""

from __future__ import annotations

import io
import json
import subprocess
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import safe_open

from agent import machine as machine_module
from agent.info import Report, info, report
from agent.info_view import show
from agent.machine import Memory, machine
from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.errors import CheckpointError, ConfigError
from ivcore.hub import Description, describe
from ivcore.schedule import DEFAULT_MEMORY_BUDGET
from ivcore.shards import TensorSpec

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
GIB = 2**30
H200 = [Memory("NVIDIA H200", 140 * GIB, 139 * GIB), Memory("RAM", 126 * GIB, 100 * GIB)]
LAYERS, WIDTH, VOCABULARY = 36, 4096, 151_936


def release_config(**text: Any) -> dict[str, Any]:
    """config.json as the released 8B model's would be by its published shapes."""
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return {
        "model_type": "internvideo3",
        "image_token_id": 151_655,
        "video_token_id": 151_656,
        "text_config": {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 12_288, "num_hidden_layers": LAYERS,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144,
            "rope_theta": 5e6, "rope_scaling": rope, "attention_bias": True, "kv_lora_rank": 896, **text,
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": WIDTH,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
        },
    }  # fmt: skip


def description(raw: dict[str, Any], dtype: str = "BF16", stray: dict[str, TensorSpec] | None = None) -> Description:
    specs = {name: TensorSpec(shape, dtype) for name, shape in manifest(ModelConfig.from_dict(raw)).items()}
    specs |= stray or {}
    return Description("owner/name", raw, specs, sum(spec.nbytes for spec in specs.values()))


def packed(described: Description, bits: int = 4, group: int = 64) -> Description:
    """The same checkpoint with the decoder's and the embedding's matrices in MLX's packed form."""
    specs: dict[str, TensorSpec] = {}
    for name, spec in described.specs.items():
        if name.startswith("model.language_model.") and len(spec.shape) == 2:
            rows, columns = spec.shape
            module = name.removesuffix(".weight")
            specs[name] = TensorSpec((rows, columns * bits // 32), "U32")
            specs[f"{module}.scales"] = specs[f"{module}.biases"] = TensorSpec((rows, columns // group), "BF16")
        else:
            specs[name] = spec
    config = described.config | {"quantization": {"bits": bits, "group_size": group}}
    return Description(described.source, config, specs, sum(spec.nbytes for spec in specs.values()))


def text_of(made: Report, width: int = 80) -> str:
    stream = io.StringIO()
    show(made, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def test_the_release_caches_half_of_its_grouped_query_form() -> None:
    cache = report(description(release_config()), None, H200, "torch").cache
    assert cache is not None
    assert set(cache.numbers_by_layer) == {896 + 128}
    assert cache.gqa_numbers_by_layer == 2 * 8 * 128
    assert cache.bytes_per_token == LAYERS * 1024 * 2
    assert (cache.dtype, cache.ratio) == ("BF16", 0.5)


def test_ranks_and_rotary_keys_that_differ_by_layer_are_summed() -> None:
    ranks, keys = [640 + 16 * layer for layer in range(LAYERS)], [1, 2] * (LAYERS // 2)
    raw = release_config(
        kv_lora_rank=None,
        kv_lora_rank_list=ranks,
        qk_rope_num_heads=keys,
        attention_layout="norm",
        attention_bias=False,
    )
    made = report(description(raw, "F32"), 1000, H200, "torch")
    assert made.error is None
    assert made.cache is not None
    assert made.cache.bytes_per_token == 4 * (sum(ranks) + 128 * sum(keys))
    assert made.contexts[0].cache == 1000 * made.cache.bytes_per_token
    assert "rank 640 to 1,200 and 1 to 2 shared rotary keys by layer" in text_of(made)


def test_parameters_by_part_are_the_sums_of_the_shapes() -> None:
    parts = report(description(release_config()), None, H200, "torch").parts
    attention = (
        32 * 256 * WIDTH + 32 * 256  # q_proj and its bias
        + 1024 * WIDTH + 1024  # kv_a_proj_with_mqa and its bias
        + 32 * 256 * 896  # kv_b_proj
        + WIDTH * 32 * 128  # o_proj
    )  # fmt: skip
    layer = attention + 3 * WIDTH * 12_288 + 2 * WIDTH
    assert parts["decoder"].parameters == LAYERS * layer + WIDTH
    assert parts["embeddings"].parameters == parts["head"].parameters == VOCABULARY * WIDTH
    assert parts["head"].nbytes == VOCABULARY * WIDTH * 2
    assert parts["head"].dtypes == {"BF16": VOCABULARY * WIDTH * 2}
    assert "other" not in parts


@pytest.mark.parametrize("name", ["iv3-micro", "qwen3vl-micro"])
def test_a_folder_counts_what_its_file_holds(name: str) -> None:
    made = report(describe(REFERENCE / name), None, H200, "torch")
    with safe_open(REFERENCE / name / "model.safetensors", framework="np") as file:
        sizes = {key: file.get_tensor(key).size for key in file.keys()}  # noqa: SIM118
    assert sum(part.parameters for part in made.parts.values()) == sum(sizes.values())
    assert made.nbytes == 4 * sum(sizes.values())
    vision = sum(size for key, size in sizes.items() if key.startswith("model.visual."))
    assert made.parts["vision"].parameters == vision
    assert made.error is None


def test_packed_matrices_count_as_the_parameters_they_stand_for() -> None:
    dense = description(release_config())
    made = report(packed(dense), None, H200, "mlx")
    assert made.error is None
    plain = report(dense, None, H200, "mlx")
    assert {name: part.parameters for name, part in made.parts.items()} == {
        name: part.parameters for name, part in plain.parts.items()
    }
    assert made.parts["embeddings"].nbytes == VOCABULARY * WIDTH * 9 // 16  # 4 bits and two bfloat16 every 64
    assert made.cache is not None
    assert made.cache.dtype == "BF16"


def test_packed_weights_stay_packed_in_mlx_and_are_expanded_by_pytorch() -> None:
    dense = description(release_config())
    small = packed(dense)
    assert report(small, None, H200, "mlx").contexts[0].weights == small.nbytes
    assert report(small, None, H200, "torch").contexts[0].weights == dense.nbytes


def test_memory_is_weights_and_cache_and_the_working_budget() -> None:
    described = description(release_config())
    made = report(described, None, H200, "torch")
    assert [row.tokens for row in made.contexts] == [8_192, 32_768, 131_072, 262_144]
    for row in made.contexts:
        assert row.total == described.nbytes + row.tokens * LAYERS * 1024 * 2 + DEFAULT_MEMORY_BUDGET
        assert row.fit == "fits"
    assert [row.tokens for row in report(described, 50_000, H200, "torch").contexts] == [8_192, 32_768, 50_000, 131_072]


def test_usual_contexts_beyond_the_models_own_are_left_out() -> None:
    described = description(release_config(max_position_embeddings=16_384))
    made = report(described, None, H200, "torch")
    assert [row.tokens for row in made.contexts] == [8_192, 16_384]
    beyond = report(described, 2_000_000, [Memory("RAM", 100 * GIB, None)], "torch")
    assert beyond.verdict
    assert beyond.verdict.endswith("try a context of 16,384. The model was made for 16,384 tokens at most.")


def test_the_verdict_tells_free_memory_from_memory() -> None:
    described = description(release_config())
    weights = described.nbytes
    per_token = LAYERS * 1024 * 2
    need = weights + 65_536 * per_token + DEFAULT_MEMORY_BUDGET

    def verdict(total: int, free: int | None, backend: str = "mlx") -> str:
        made = report(described, 65_536, [Memory("RAM", total, free)], backend)
        assert made.verdict
        return made.verdict

    assert verdict(need, need).startswith("fits: 65,536 tokens take 22.7 GiB of 22.7 GiB (RAM)")
    assert verdict(need, None).startswith("fits: ")
    assert verdict(need, need - 1).startswith("fits once other programs free memory: ")
    assert verdict(need - 1, need - 1, "torch").endswith("try a context of 64,512.")
    assert verdict(need - 1, need - 1).endswith("try a context of 64,512 or a 4-bit conversion.")
    assert verdict(weights, weights, "torch").endswith("try a machine with more memory.")
    assert verdict(GIB, GIB).endswith("try a machine with more memory.")


def test_a_four_bit_conversion_is_offered_with_the_context_that_it_leaves_room_for() -> None:
    described = description(release_config())
    # 8.9 G language parameters at 4.5 bits, 1.07 GiB of vision tower, 0.5 GiB of working memory, 2,048 tokens to spare.
    language = sum(prod(spec.shape) for name, spec in described.specs.items() if not name.startswith("model.visual."))
    vision = sum(spec.nbytes for name, spec in described.specs.items() if name.startswith("model.visual."))
    total = language * 9 // 16 + vision + DEFAULT_MEMORY_BUDGET + 2_048 * LAYERS * 1024 * 2 + 1
    made = report(described, None, [Memory("RAM", total, None)], "mlx")
    assert made.verdict
    assert made.verdict.endswith("try a 4-bit conversion with a context of 2,048.")


def test_a_tensor_that_does_not_belong_is_named_and_the_rest_is_still_told() -> None:
    stray = {"model.language_model.layers.0.self_attn.xs.weight": TensorSpec((3, 4), "BF16"),
             "extra.thing": TensorSpec((5,), "F32")}  # fmt: skip
    made = report(description(release_config(), stray=stray), None, H200, "torch")
    assert isinstance(made.error, CheckpointError)
    assert "unexpected model.language_model.layers.0.self_attn.xs.weight [3, 4] BF16" in str(made.error)
    assert "unexpected extra.thing [5] F32" in str(made.error)
    assert made.parts["other"].parameters == 5
    assert made.cache is not None
    assert "the error at the end says why" in text_of(made)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method is 'fp8'"),
        ({"text_config": None}, "text_config is missing"),
    ],
)
def test_a_config_that_cannot_be_run_still_tells_its_weights(changes: dict[str, Any], says: str) -> None:
    described = description(release_config())
    made = report(replace(described, config=described.config | changes), None, H200, "torch")
    assert isinstance(made.error, ConfigError)
    assert says in str(made.error)
    assert made.parts["head"].parameters == VOCABULARY * WIDTH
    assert made.cache is None
    assert made.verdict is None
    assert "17.7 GiB" in text_of(made)
    assert json.loads(json.dumps(made.to_dict()))["runs"] is False


@pytest.mark.parametrize("as_json", [False, True])
def test_the_reason_is_raised_after_everything_is_printed(
    as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((REFERENCE / "iv3-micro" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "other"}))
    (tmp_path / "model.safetensors").symlink_to(REFERENCE / "iv3-micro" / "model.safetensors")
    with pytest.raises(ConfigError, match="model_type is 'other'"):
        info(str(tmp_path), None, as_json)
    printed = capsys.readouterr()
    assert printed.err == ""
    if as_json:
        assert json.loads(printed.out)["reason"].startswith(str(tmp_path / "config.json"))
    else:
        assert "6.2 MiB" in printed.out


def test_json_holds_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    info(str(REFERENCE / "iv3-micro"), 4096, True)
    told = json.loads(capsys.readouterr().out)
    assert told["runs"] is True
    assert told["reason"] is None
    assert told["config"]["text_config"]["kv_lora_rank"] == 56
    assert told["cache"]["numbers_by_layer"] == [56 + 32] * 5
    assert told["cache"]["bytes_per_token"] == 5 * 88 * 4
    assert told["context"] == 4096
    assert told["contexts"][0]["tokens"] == 4096
    assert told["parameters"] == told["nbytes"] // 4
    assert told["memories"][-1]["name"] == "RAM"


@pytest.mark.parametrize("name", ["iv3-micro", "qwen3vl-micro"])
def test_what_is_printed_fits_in_80_columns_and_is_plain_when_piped(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    info(str(REFERENCE / name), None, False)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    table = [line for line in printed.splitlines() if line != str(REFERENCE / name)]
    assert max(map(len, table)) <= 80
    assert printed.count("keys and values (GQA)") == 1
    assert ("latent and rotary key" in printed) == (name == "iv3-micro")


def test_the_release_in_words() -> None:
    words = text_of(report(description(release_config()), None, H200, "torch"))
    assert words.startswith("InternVideo3 (Qwen3-VL body, M2LA release layout)\nowner/name\n")
    for part in (
        "36 layers of width 4096, MLP 12288, vocabulary 151936",
        "latent (M2LA), 32 heads of 128 + 128 rotary, values of 128",
        "rank 896 and 1 shared rotary key",
        "kv_a_proj_with_mqa, q_proj",
        "interleaved M-RoPE, time/height/width 24/20/20, theta 5,000,000",
        "27 blocks of width 1152, 16 heads, MLP 4304",
        "blocks 8, 16, 24 added after decoder layers 0, 1, 2",
        "NVIDIA H200 140 GiB (139 GiB free); RAM 126 GiB (100 GiB free)",
        "Fits: 262,144 tokens take 36.2 GiB of 140 GiB (NVIDIA H200).",
    ):
        assert part in words
    assert max(map(len, words.splitlines())) <= 80


def test_a_gpu_comes_before_ram_unless_mlx_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, stdout="NVIDIA H200, 143771, 143180\nNVIDIA A2, 15356, 12\n")

    monkeypatch.setattr(machine_module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine_module.subprocess, "run", answer)
    gpu, ram = machine("torch")
    assert gpu == Memory("NVIDIA H200", 143_771 * 2**20, 143_180 * 2**20)
    assert ram.name == "RAM"
    assert ram.available is None or 0 < ram.available <= ram.total
    assert [memory.name for memory in machine("mlx")] == ["RAM"]


@pytest.mark.parametrize(
    "failure",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 5),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        "",
        "NVIDIA GB10, [N/A], [N/A]\n",
    ],
)
def test_without_a_readable_gpu_there_is_ram(failure: Exception | str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        if isinstance(failure, Exception):
            raise failure
        return subprocess.CompletedProcess([], 0, stdout=failure)

    monkeypatch.setattr(machine_module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine_module.subprocess, "run", answer)
    assert [memory.name for memory in machine(None)] == ["RAM"]
