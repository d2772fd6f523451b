"""Fault injection: one tensor changed by 1 %, and the parity report names the point that it belongs to."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.parity import run as run_module
from convert.parity.compare import compare, make_prompt
from convert.parity.findings import own_errors
from convert.parity.plan import plan_runs
from convert.parity.points import points
from convert.parity.record import Recording
from convert.parity.run import Prompt, Run, record, run_forced
from convert.parity.trend import judge
from ivcore.backend import load
from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.inputs import ModelInputs
from ivcore.shards import Checkpoint, TensorSpec, write_checkpoint

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
MICROS = ("iv3-micro", "qwen3vl-micro")
PAIRS = (("mlx", "mlx"), ("torch", "torch"), ("mlx", "torch"), ("torch", "mlx"))
Fault = Callable[[np.ndarray], np.ndarray]

VISION = (
    "patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed.weight", "merger.norm.weight",
    "merger.linear_fc1.weight", "merger.linear_fc2.weight",
    *(f"deepstack_merger_list.{j}.{name}.weight" for j in (0, 1, 2) for name in ("norm", "linear_fc1")),
    *(f"blocks.{i}.{name}.weight" for i in (0, 2, 3)
      for name in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2", "norm1", "norm2")),
)  # fmt: skip
ATTENTION = {
    "iv3-micro": ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "qwen3vl-micro": ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
}
LAYER = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")

ONE_OF_EACH_KIND = (
    "model.visual.patch_embed.proj.weight", "model.visual.pos_embed.weight", "model.visual.blocks.2.attn.qkv.weight",
    "model.visual.deepstack_merger_list.1.linear_fc1.weight", "model.visual.merger.linear_fc2.weight",
    "model.language_model.embed_tokens.weight", "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.language_model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    "model.language_model.layers.2.self_attn.kv_b_proj.weight",
    "model.language_model.layers.3.self_attn.o_proj.weight", "model.language_model.layers.4.mlp.gate_proj.weight",
    "model.language_model.layers.2.input_layernorm.weight", "model.language_model.norm.weight", "lm_head.weight",
)  # fmt: skip


def faulty_tensors(name: str) -> list[str]:
    """A tensor of each kind of place, at first, middle and last layers."""
    text = "model.language_model."
    parts = [*(f"self_attn.{part}" for part in ATTENTION[name]), *LAYER]
    layers = [f"{text}layers.{layer}.{part}.weight" for layer in (0, 2, 4) for part in parts]
    visual = [f"model.visual.{part}" for part in VISION]
    return [*visual, f"{text}embed_tokens.weight", *layers, f"{text}norm.weight", "lm_head.weight"]


def home(tensor: str) -> str:
    """The point that a tensor belongs to."""
    if tensor.startswith(("model.visual.patch_embed.", "model.visual.pos_embed.")):
        return "visual.patch_embed"
    if numbered := re.search(r"(visual\.blocks|visual\.deepstack_merger_list|layers)\.\d+", tensor):
        return numbered[0]
    parts = {"visual.merger": "visual.merger", "embed_tokens": "embeddings", "language_model.norm": "norm"}
    return next((point for part, point in parts.items() if part in tensor), "logits")


def scaled(values: np.ndarray, size: float = 0.01) -> np.ndarray:
    return (values * np.float32(1 + size)).astype(np.float32)


def noisy(values: np.ndarray, size: float = 0.01) -> np.ndarray:
    """With noise of `size` times the tensor's root mean square."""
    noise = np.random.default_rng(0).standard_normal(values.shape, dtype=np.float32)
    return (values + noise * np.float32(size * np.sqrt(np.square(values).mean()))).astype(np.float32)


def cancels(tensor: str, fault: Fault) -> bool:
    """Qwen3's q/k norm divides a factor on the projection before it out again: nothing is left to be found."""
    return fault is scaled and bool(re.search(r"self_attn\.[qk]_proj", tensor))


@cache
def reference_inputs(name: str) -> ModelInputs:
    with np.load(REFERENCE / name / "expected.npz") as arrays:
        pixels = np.concatenate([arrays["pixel_values_videos"], arrays["pixel_values"]])
        grids = np.concatenate([arrays["video_grid_thw"], arrays["image_grid_thw"]])
        return ModelInputs(arrays["input_ids"].astype(np.int32), pixels, grids.astype(np.int32))


@dataclass
class Bench:
    """A clean reference on disk, and a model to be spoilt in memory, which equals a spoilt folder and costs less."""

    reference: Run
    run: Run
    prompt: Prompt
    recording: Recording
    model: Any

    @classmethod
    def make(cls, folder: Path, inputs: ModelInputs, pair: tuple[str, str], dtype: str, scratch: Path) -> Bench:
        for backend in pair:
            pytest.importorskip(backend)
        both = plan_runs(folder, folder, sorted(set(pair)), [dtype])
        reference = next(run for run in both if run.backend == pair[0])
        run = next(run for run in both if run.backend == pair[1])
        prompt, recording = make_prompt(inputs, reference.config), Recording(scratch)
        record(load(folder, reference.backend, dtype), prompt, recording, lambda rows: None)
        return cls(reference, run, prompt, recording, load(folder, run.backend, dtype))

    def suspect(self, tensor: str | None = None, fault: Fault = noisy) -> str | None:
        if tensor is None:
            return self._judge()
        clean = np.array(Checkpoint(self.run.folder).read(tensor))
        self._put(tensor, fault(clean))
        try:
            return self._judge()
        finally:
            self._put(tensor, clean)

    def _judge(self) -> str | None:
        reached = [point for point in points(self.run.config) if self.prompt.visual.any() or point.tower == "decoder"]
        forced = run_forced(self.model, self.prompt, self.recording, lambda rows: None)
        place, _ = judge(own_errors(reached, forced), self.reference, self.run)
        return None if place is None else reached[place].name

    def _put(self, tensor: str, values: np.ndarray) -> None:
        if self.run.backend == "torch":
            import torch

            self.model.network.load_state_dict({tensor: torch.from_numpy(values)}, strict=False)
        else:
            import mlx.core as mx

            array = mx.array(values).astype(getattr(mx, self.run.dtype))
            self.model.network.load_weights([(tensor, array)], strict=False)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting all of Python's garbage takes ten times as long as running a micro model."""
    monkeypatch.setattr(run_module, "release", lambda backend: None)


@pytest.fixture(params=[(name, pair) for name in MICROS for pair in PAIRS], ids=lambda p: f"{p[0]}-{'-'.join(p[1])}")
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    name, pair = request.param
    return Bench.make(REFERENCE / name, reference_inputs(name), pair, "float32", tmp_path)


def test_one_percent_on_one_tensor_is_located_at_its_point_and_no_fault_nowhere(bench: Bench) -> None:
    name = bench.run.folder.name
    assert bench.suspect() is None
    faults = [(t, fault) for t in faulty_tensors(name) for fault in (scaled, noisy)]
    faults = [(t, fault) for t, fault in faults if name == "iv3-micro" or not cancels(t, fault)]
    assert len(faults) > 100
    found = {(tensor, fault.__name__): bench.suspect(tensor, fault) for tensor, fault in faults}
    assert found == {(tensor, fault.__name__): home(tensor) for tensor, fault in faults}
    assert bench.suspect() is None


@pytest.mark.parametrize(
    ("pair", "dtype"),
    [*((pair, "bfloat16") for pair in PAIRS[:3]), (("torch", "mlx"), "float16")],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_in_half_precision_a_fault_is_located_where_it_rises_above_rounding(
    pair: tuple[str, str], dtype: str, tmp_path: Path
) -> None:
    bench = Bench.make(REFERENCE / "iv3-micro", reference_inputs("iv3-micro"), pair, dtype, tmp_path)
    assert bench.suspect() is None
    for tensor in ONE_OF_EACH_KIND:
        # One backend computes the same twice, so any difference shows; two round differently, by about a percent.
        expected = {home(tensor)} if pair[0] == pair[1] else {home(tensor), None}
        assert bench.suspect(tensor) in expected
        assert bench.suspect(tensor, lambda values: noisy(values, 0.3)) == home(tensor)


ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2]}
OTHER_SHAPES: dict[str, dict[str, Any]] = {
    "m2la-norm-two-rotary-keys": {
        "attention": "m2la", "attention_layout": "norm", "kv_lora_rank_list": [9, 12, 17, 8], "qk_rope_num_heads": 2,
        "attention_bias": True,
    },
    "m2la-compressed-query-latent-norm": {
        "attention": "m2la", "kv_lora_rank": 13, "q_lora_rank": 11, "qk_nope_head_dim": 10, "qk_rope_head_dim": 16,
        "v_head_dim": 6, "qk_latent_layernorm": True,
    },
    "gqa-one-group": {"attention": "gqa", "num_key_value_heads": 1},
}  # fmt: skip


@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_every_matrix_of_a_random_checkpoint_is_located(shape: str, tmp_path: Path) -> None:
    text = {
        "vocab_size": 60, "hidden_size": 36, "intermediate_size": 30, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e4, "rope_scaling": ROPE, **OTHER_SHAPES[shape],
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "patch_size": 3, "out_hidden_size": 36,
        "num_position_embeddings": 9, "deepstack_visual_indexes": [0, 2],
    }  # fmt: skip
    raw = {
        "model_type": "internvideo3", "text_config": text, "vision_config": vision, "image_token_id": 58,
        "video_token_id": 59, "tie_word_embeddings": shape.startswith("gqa"),
    }  # fmt: skip
    random = np.random.default_rng(5)
    shapes = manifest(ModelConfig.from_dict(raw))
    weights = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, values in weights.items():
        values /= np.sqrt(np.prod(values.shape[1:]), dtype=np.float32) if "embed_tokens" not in name else 1
    folder = tmp_path / "model"
    write_checkpoint(folder, raw, {name: TensorSpec(v.shape, "F32") for name, v in weights.items()}, weights.items())
    tokens = np.array([*range(5, 12), *[58] * 6, *range(20, 31)], np.int32)
    inputs = ModelInputs(tokens, random.standard_normal((24, 54), dtype=np.float32), np.array([[1, 4, 6]], np.int32))
    (tmp_path / "scratch").mkdir()
    bench = Bench.make(folder, inputs, ("mlx", "torch"), "float32", tmp_path / "scratch")
    assert bench.suspect() is None
    matrices = [name for name, values in weights.items() if values.ndim > 1]
    assert {name: bench.suspect(name) for name in matrices} == {name: home(name) for name in matrices}


@pytest.fixture(scope="module")
def spoil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Mapping[str, Fault]], Path]]:
    """Function (name of a reference checkpoint, tensor -> fault) that writes a folder with these faults, in shards."""

    def write(name: str, faults: Mapping[str, Fault]) -> Path:
        source, folder = REFERENCE / name, tmp_path_factory.mktemp("spoilt") / name
        checkpoint, config = Checkpoint(source), json.loads((source / "config.json").read_text())
        tensors = ((t, faults.get(t, lambda values: values)(np.array(checkpoint.read(t)))) for t in checkpoint.specs)
        write_checkpoint(folder, config, checkpoint.specs, tensors, shard_bytes=2**20)
        for file in source.glob("*.json"):
            if file.name != "config.json":
                shutil.copy(file, folder)
        return folder

    yield write


@pytest.mark.parametrize("tensor", ONE_OF_EACH_KIND)
def test_a_folder_with_a_fault_is_told_from_the_clean_one_on_each_backend_and_across(
    tensor: str, spoil: Callable[..., Path]
) -> None:
    pytest.importorskip("mlx")
    pytest.importorskip("torch")
    spoilt = spoil("iv3-micro", {tensor: scaled})
    inputs = reference_inputs("iv3-micro")
    report = compare(REFERENCE / "iv3-micro", spoilt, backends=["mlx", "torch"], inputs=inputs, tokens=0)
    clean_torch, *spoilt_runs = report.comparisons
    assert clean_torch.suspect is None
    assert [(c.run.backend, c.suspect and c.suspect.point) for c in spoilt_runs] == [
        ("mlx", home(tensor)),
        ("torch", home(tensor)),
    ]
    on_mlx = {point.point: point for point in spoilt_runs[0].points}
    # The fault is the only difference there is: what comes before it and what everything else does is equal.
    assert all(point.own == 0.0 for name, point in on_mlx.items() if name != home(tensor))
    assert on_mlx[home(tensor)].own > 0 and on_mlx["logits"].relative_l2 > 0


def test_the_first_of_two_faults_is_the_suspect(spoil: Callable[..., Path]) -> None:
    first, second = "model.visual.blocks.1.mlp.linear_fc1.weight", "model.language_model.layers.1.mlp.up_proj.weight"
    spoilt = spoil("qwen3vl-micro", {first: noisy, second: noisy})
    inputs = reference_inputs("qwen3vl-micro")
    (comparison,) = compare(REFERENCE / "qwen3vl-micro", spoilt, inputs=inputs, tokens=0).comparisons
    assert comparison.suspect is not None and comparison.suspect.point == "visual.blocks.1"
    assert {point.point for point in comparison.points if point.own > 0} == {"visual.blocks.1", "layers.1"}
