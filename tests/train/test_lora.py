"""Adapters: on packed weights, going on from a saved one, in every form of attention, and what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ivcore.adapter import Adapter
from ivcore.errors import CheckpointError, TrainingError
from ivcore.training import LoraSettings, NextToken, Policy, first_factor

LORA = LoraSettings(rank=4, alpha=6)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model: Any, tools: Any) -> np.ndarray:
    row = tools.media_row(5)
    found: np.ndarray = model.logits(tools.ModelInputs(row.token_ids, row.pixels, row.grid_thw))
    return found


def test_a_fresh_lora_changes_nothing_and_is_the_same_on_both_backends(lab: Any, tools: Any) -> None:
    starts = []
    for name in tools.BACKENDS:
        model = lab.model(name)
        before = logits(model, tools)
        trainer = tools.trainer_of(model, LORA, seed=3)
        np.testing.assert_array_equal(logits(model, tools), before)
        starts.append(trainer.state())
    assert starts[0].keys() == starts[1].keys()
    for name, array in starts[0].items():
        np.testing.assert_array_equal(array, starts[1][name], err_msg=name)
    decoder = [name for name in starts[0] if name.startswith("weight.") and name.endswith("lora_A.weight")]
    linears = 7 if lab.path.name == "qwen3vl-micro" else 4 + 3  # of a layer: attention and MLP
    assert len(decoder) == 5 * linears
    assert all(".language_model.layers." in name for name in decoder)


def test_the_first_factor_is_uniform_as_peft_s(tools: Any) -> None:
    torch = pytest.importorskip("torch")
    found = first_factor("model.language_model.layers.0.mlp.up_proj", 64, 300, seed=0)
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(64, 300), a=5**0.5).numpy()
    assert abs(found).max() == pytest.approx(abs(theirs).max(), rel=1e-3)
    assert found.std() == pytest.approx(theirs.std(), rel=0.02)
    assert abs(found.mean()) < 0.001
    others = [first_factor("model.language_model.layers.1.mlp.up_proj", 64, 300, 0), first_factor("x", 64, 300, 1)]
    assert all(abs(np.corrcoef(found.ravel(), other.ravel())[0, 1]) < 0.05 for other in others)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lora_on_packed_weights_is_that_on_the_dense_ones(lab: Any, bits: int, tools: Any, tmp_path: Path) -> None:
    packed, dense = tools.neighbour("parity", "test_loading").quantised_folder(lab, tmp_path, bits, 32)
    expected = tools.Lab(dense, lab.batch).trainer("torch", LORA)
    value = expected.accumulate(lab.batch, NextToken())["loss"]
    expected.save_adapter(tmp_path / "adapter")
    for name in tools.BACKENDS:
        trainer = tools.Lab(packed, lab.batch).trainer(name, LORA)
        assert trainer.accumulate(lab.batch, NextToken())["loss"] == pytest.approx(value, rel=1e-4)
        assert tools.furthest(trainer.gradients(), expected.gradients()) < 5e-4
        model = tools.Lab(packed, lab.batch).model(name)
        tools.load_adapter(model, tmp_path / "adapter")
        for model.form in ("expanded", "absorbed"):
            np.testing.assert_allclose(logits(model, tools), logits(expected.model, tools), rtol=0, atol=2e-4)
        with pytest.raises(TrainingError, match="train a LoRA on them"):
            tools.Lab(packed, lab.batch).trainer(name, None)


def test_expanded_and_absorbed_attention_agree_with_a_lora_on_every_projection(backend: str, tools: Any) -> None:
    trainer = tools.lab_of("iv3-micro").trainer(backend, replace(LORA, targets=("self_attn",)))
    model, before = trainer.model, logits(tools.lab_of("iv3-micro").model(backend), tools)
    found = {}
    for model.form in ("expanded", "absorbed"):
        found[model.form] = logits(model, tools)
    assert np.abs(found["expanded"] - before).max() > 0.05
    np.testing.assert_allclose(found["absorbed"], found["expanded"], rtol=0, atol=2e-4)
    places = np.arange(len(tools.media_row(5).token_ids))
    assert model.network.model.language_model.layers[0].self_attn.kv_b_proj.rank == 4, "the latent's too"
    # Training reads the same weights in its own way.
    config, row = tools.ModelConfig.from_dir(tools.REFERENCE / "iv3-micro"), tools.media_row(5)
    batch = tools.pack(config, [row])
    batch = replace(batch, weights=np.full(len(places), 1, np.float32))
    full = trainer.token_logprobs_full(batch).astype(np.float64)
    expected = found["expanded"] - np.log(np.exp(found["expanded"].astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(full, expected, rtol=0, atol=2e-4)


def test_dropout_leaves_out_its_share_of_the_inputs_and_keeps_their_mean(
    one_lab: Any, backend: str, tools: Any
) -> None:
    trainer = one_lab.trainer(backend, replace(LORA, dropout=0.25, targets=("layers.0.mlp.up_proj",)))
    layer = trainer.model.network.model.language_model.layers[0].mlp.up_proj
    ones = tools.array_of(backend, np.ones((300, 400, 128), np.float32))
    layer.mask_seed = 7
    masked, again = np.asarray(layer._masked(ones)), np.asarray(layer._masked(ones))
    np.testing.assert_array_equal(masked, again)
    np.testing.assert_allclose(np.unique(masked), [0, 1 / 0.75], rtol=1e-6)
    assert masked.mean() == pytest.approx(1, abs=2e-3)
    layer.mask_seed = 8
    assert not np.array_equal(np.asarray(layer._masked(ones)), masked)
    layer.mask_seed = None
    assert layer._masked(ones) is ones


def test_training_goes_on_from_a_loaded_adapter(one_lab: Any, backend: str, tools: Any, tmp_path: Path) -> None:
    first = one_lab.trainer(backend, LORA)
    first.save_adapter(tmp_path)
    model = one_lab.model(backend)
    tools.load_adapter(model, tmp_path)
    trainer = tools.trainer_of(model, LORA, seed=9)
    np.testing.assert_array_equal(trainer.logprobs(one_lab.batch), first.logprobs(one_lab.batch))
    np.testing.assert_array_equal(trainer.reference_logprobs(one_lab.batch), first.logprobs(one_lab.batch))
    for each in (first, trainer):
        each.accumulate(one_lab.batch, NextToken())
    for name, array in first.gradients().items():
        np.testing.assert_array_equal(array, trainer.gradients()[name], err_msg=name)
    with pytest.raises(TrainingError, match=r"rank 4 and scale 1.5 for .*, but the settings say rank 8 and scale 0.75"):
        tools.trainer_of(model, replace(LORA, rank=8))
    with pytest.raises(TrainingError, match=r"has one for .*down_proj, but the targets want none"):
        tools.trainer_of(model, replace(LORA, targets=("self_attn",)))
    with pytest.raises(TrainingError, match=r"has none for lm_head, but the targets want one"):
        tools.trainer_of(model, replace(LORA, targets=("language_model.layers.*", "lm_head")))
    with pytest.raises(TrainingError, match="merge it before training all weights"):
        tools.trainer_of(model, None)


def test_a_saved_adapter_is_read_back_exactly(one_lab: Any, backend: str, tmp_path: Path) -> None:
    trainer = one_lab.trainer(backend, replace(LORA, rank_stabilized=True, dropout=0.1))
    trainer.save_adapter(tmp_path)
    state, adapter = trainer.state(), Adapter.load(tmp_path)
    assert len(adapter.modules) == len(trainer.trainable) // 2
    for module in adapter.modules:
        a, b, scale = adapter.factors(module)
        np.testing.assert_array_equal(a, state[f"weight.{module}.lora_A.weight"])
        np.testing.assert_array_equal(b, state[f"weight.{module}.lora_B.weight"])
        assert scale == 3.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_another_adapter_takes_the_place_of_the_one_that_is_there(one_lab: Any, backend: str, tools: Any,
                                                                  tmp_path: Path) -> None:  # fmt: skip
    one_lab.trainer(backend, replace(LORA, rank=2)).save_adapter(tmp_path / "wide")
    narrow = one_lab.trainer(backend, replace(LORA, targets=("layers.1.self_attn",)))
    narrow.save_adapter(tmp_path / "narrow")
    model = one_lab.model(backend)
    for name in ("wide", "narrow"):
        tools.load_adapter(model, tmp_path / name)
    np.testing.assert_array_equal(logits(model, tools), logits(narrow.model, tools))


def test_ranks_and_scales_may_differ_by_module(one_lab: Any, tools: Any, tmp_path: Path) -> None:
    one_lab.trainer("torch", LORA).save_adapter(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name in tensors:
        if "down_proj" in name:
            tensors[name] = tensors[name][:2] if "lora_A" in name else np.ascontiguousarray(tensors[name][:, :2])
    save_file(tensors, tmp_path / WEIGHTS)
    settings = json.loads((tmp_path / CONFIG).read_text())
    settings |= {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 8}}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    found = []
    for name in tools.BACKENDS:
        model = one_lab.model(name)
        tools.load_adapter(model, tmp_path)
        layer = model.network.model.language_model.layers[0]
        assert (layer.mlp.down_proj.rank, layer.mlp.down_proj.scale, layer.mlp.up_proj.scale) == (2, 4, 1.5)
        found.append(logits(model, tools))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)


def test_an_adapter_of_another_model_or_rank_is_refused(one_lab: Any, backend: str, tools: Any, tmp_path: Path) -> None:
    one_lab.trainer("torch", LORA).save_adapter(tmp_path)
    other = tools.lab_of("qwen3vl-micro").model(backend)
    before = logits(other, tools)
    with pytest.raises(CheckpointError, match=r"was made for another model; in this one .*kv_b_proj"):
        tools.load_adapter(other, tmp_path)
    np.testing.assert_array_equal(logits(other, tools), before)
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(settings | {"r": 5}))
    with pytest.raises(CheckpointError, match=r"has rank 4, but adapter_config\.json says 5"):
        tools.load_adapter(one_lab.model(backend), tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        tools.load_adapter(one_lab.model(backend), tmp_path)


def test_a_full_disk_leaves_the_adapter_that_was_there(
    one_lab: Any, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = one_lab.trainer(backend, LORA)
    trainer.save_adapter(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trainer.accumulate(one_lab.batch, NextToken())
    trainer.apply(1e-2, None)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ivcore.adapter.os.fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written \\(No space left on device\\); it is unchanged"):
        trainer.save_adapter(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_what_is_trained_is_saved_in_its_form(one_lab: Any, backend: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no adapter to save"):
        one_lab.trainer(backend, None).save_adapter(tmp_path)
    with pytest.raises(TrainingError, match="merge it with iv3 convert"):
        next(one_lab.trainer(backend, LORA).tensors())


def test_a_vision_lora_learns_only_where_there_are_pixels(one_lab: Any, backend: str, tools: Any) -> None:
    config = tools.ModelConfig.from_dir(one_lab.path)
    text = tools.pack(config, [tools.Row(np.arange(12, dtype=np.int32))])
    trainer = one_lab.trainer(backend, replace(LORA, targets=("visual.blocks.*",)))
    zeros = np.zeros(12, np.float32)
    trainer.accumulate(text, Policy(zeros, zeros + 1, 0.2, 0.2))
    assert not any(array.any() for array in trainer.gradients().values())
    trainer.accumulate(one_lab.batch, NextToken())
    assert all(array.any() for array in trainer.gradients().values())
