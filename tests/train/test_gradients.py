"""Losses and gradients: the same on both backends, packed or not, recomputed or kept, in any memory budget."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivcore.config import ModelConfig
from ivcore.training import Batch, LoraSettings, NextToken

RELATIVE_TOLERANCE = 1e-4
EVERYWHERE = LoraSettings(rank=2, alpha=3, targets=("*",))
few = settings(max_examples=4, suppress_health_check=list(HealthCheck))


def sibling(name: str) -> ModuleType:
    """A module of the parity tests; its strategies are needed before there are fixtures."""
    file = Path(__file__).resolve().parents[1] / "parity" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"train_{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


random_configs = sibling("test_random_configs")


def step(trainer: Any, batch: Batch, loss: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """What `accumulate` returns, and the gradient it leaves."""
    return trainer.accumulate(batch, loss), trainer.gradients()


def close(found: tuple[Any, Any], expected: tuple[Any, Any], tools: Any, tolerance: float = RELATIVE_TOLERANCE) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert found[0][name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
    assert tools.furthest(found[1], expected[1]) < tolerance


def part_of(batch: Batch, row: int, config: ModelConfig) -> tuple[Batch, slice]:
    """One row of a batch as a batch of its own, and its places."""
    stops = np.cumsum(batch.lengths)
    at = slice(int(stops[row] - batch.lengths[row]), int(stops[row]))
    visual = np.isin(batch.token_ids, (config.image_token_id, config.video_token_id))
    merged = config.vision.spatial_merge_size**2
    before, inside = int(visual[: at.start].sum()) * merged, int(visual[at].sum()) * merged
    pixels, grids = None, None
    if inside:
        ends = np.cumsum(batch.grid_thw.prod(axis=1))
        pixels = batch.pixels[before : before + inside]
        grids = batch.grid_thw[(ends > before) & (ends <= before + inside)]
    return Batch(
        batch.token_ids[at], batch.position_ids[:, at], batch.lengths[row : row + 1], pixels, grids,
        batch.targets[at], batch.weights[at],
    ), at  # fmt: skip


def test_the_backends_agree_on_every_loss_and_lora_gradient(lab: Any, kind: str, tools: Any) -> None:
    loss = lab.loss(kind)
    mlx, torch = (step(lab.trainer(name, EVERYWHERE), lab.batch, loss) for name in tools.BACKENDS)
    assert any(name.startswith("model.visual.") for name in torch[1])
    close(mlx, torch, tools)


def test_the_backends_agree_on_the_gradient_of_all_weights(lab: Any, kind: str, tools: Any) -> None:
    loss = lab.loss(kind)
    mlx, torch = (step(lab.trainer(name, None), lab.batch, loss) for name in tools.BACKENDS)
    assert {"model.visual.pos_embed.weight", "model.language_model.embed_tokens.weight"} < torch[1].keys()
    close(mlx, torch, tools)


@pytest.mark.parametrize("attention", ["gqa", "release", "norm"])
@few
@given(data=st.data())
def test_the_backends_agree_on_random_configs(attention: str, data: Any, tools: Any, write_random: Any) -> None:
    raw, inputs, seed = data.draw(random_configs.cases(attention))
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), raw, seed)
        random, config = np.random.default_rng(seed), ModelConfig.from_dict(raw)
        media = tools.Row(inputs.token_ids, inputs.pixels, inputs.grid_thw)
        text = tools.Row(random.integers(0, raw["video_token_id"], 9).astype(np.int32))
        batch = tools.pack(config, [text, media, media], seed)
        if not len(batch.places):
            return
        lab = tools.Lab(Path(folder), batch)
        for kind, lora in (("policy with a reference", EVERYWHERE), ("distill", None)):
            mlx, torch = (step(lab.trainer(name, lora), batch, lab.loss(kind)) for name in tools.BACKENDS)
            close(mlx, torch, tools)


def check_rows_alone(lab: Any, backend: str, lora: LoraSettings | None, tools: Any) -> None:
    loss, config = lab.loss("policy with a reference"), ModelConfig.from_dir(lab.path)
    packed = step(lab.trainer(backend, lora), lab.batch, loss)
    alone, sums = lab.trainer(backend, lora), dict.fromkeys(packed[0], 0.0)
    for row in range(len(lab.batch.lengths)):
        batch, at = part_of(lab.batch, row, config)
        arrays = {name: getattr(loss, name)[at] for name in ("old_logprobs", "advantages", "reference_logprobs")}
        for name, value in alone.accumulate(batch, replace(loss, **arrays)).items():
            sums[name] += value
    close((sums, alone.gradients()), packed, tools)


@pytest.mark.parametrize("lora", [EVERYWHERE, None], ids=["lora", "full"])
def test_packed_rows_equal_rows_alone(lab: Any, backend: str, lora: LoraSettings | None, tools: Any) -> None:
    check_rows_alone(lab, backend, lora, tools)


@pytest.mark.parametrize("checkpoint", ["iv3-micro", "qwen3vl-micro"])
def test_packed_rows_of_one_length_equal_rows_alone(checkpoint: str, backend: str, tools: Any) -> None:
    """They stand as they came, so nothing is gathered."""
    path, random = tools.lab_of(checkpoint).path, np.random.default_rng(3)
    rows = [tools.Row(random.integers(0, 200, 11).astype(np.int32)) for _ in range(3)]
    lab = tools.Lab(path, tools.pack(ModelConfig.from_dir(path), rows, 3))
    check_rows_alone(lab, backend, EVERYWHERE, tools)


def test_a_loss_is_linear_in_its_weights(backend: str, kind: str, tools: Any) -> None:
    lab = tools.lab_of("iv3-micro")
    # The teacher of a full distillation has a row for each place with a weight: all of them keep one.
    loss, random = lab.loss(kind), np.random.default_rng(5)
    shares = random.uniform(0.1, 0.9, len(lab.batch.weights)).astype(np.float32)
    whole = step(lab.trainer(backend), lab.batch, loss)
    parts = lab.trainer(backend)
    sums = dict.fromkeys(whole[0], 0.0)
    for share in (shares, 1 - shares):
        for name, value in parts.accumulate(replace(lab.batch, weights=lab.batch.weights * share), loss).items():
            sums[name] += value
    close((sums, parts.gradients()), whole, tools)


@pytest.mark.parametrize("lora", [replace(EVERYWHERE, dropout=0.4), None], ids=["lora with dropout", "full"])
def test_recomputing_activations_changes_no_gradient(lab: Any, backend: str, lora: Any, tools: Any) -> None:
    loss = lab.loss("distill with a forward share")
    kept, recomputed = (
        step(lab.trainer(backend, lora, checkpointing=recompute), lab.batch, loss) for recompute in (False, True)
    )
    close(recomputed, kept, tools, 1e-6)


@pytest.mark.parametrize("few_kinds", ["policy with a reference", "distill with a forward share"])
@pytest.mark.parametrize("lora", [EVERYWHERE, None], ids=["lora", "full"])
def test_a_small_memory_budget_changes_no_gradient(
    lab: Any, backend: str, lora: Any, few_kinds: str, tools: Any
) -> None:
    loss = lab.loss(few_kinds)
    roomy, tight = (lab.model(backend) for _ in range(2))
    tight.memory_budget = 200_000
    expected = step(lab.trainer(backend, lora, model=roomy), lab.batch, loss)
    close(step(lab.trainer(backend, lora, model=tight), lab.batch, loss), expected, tools)


def test_log_probabilities_are_those_of_the_prompts_logits(lab: Any, backend: str, tools: Any) -> None:
    config, trainer = ModelConfig.from_dir(lab.path), lab.trainer(backend)
    found, full = trainer.logprobs(lab.batch), trainer.token_logprobs_full(lab.batch)
    expected = np.zeros_like(found)
    rows = []
    for row in range(len(lab.batch.lengths)):
        batch, at = part_of(lab.batch, row, config)
        inputs = tools.ModelInputs(batch.token_ids, batch.pixels, batch.grid_thw)
        logits = trainer.model.logits(inputs).astype(np.float64)
        scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        places = batch.places
        expected[at][places] = scores[places, batch.targets[places]]
        rows.append(scores[places])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(full, np.concatenate(rows), rtol=0, atol=2e-4)


def test_a_batch_without_weights_counts_nothing(lab: Any, backend: str) -> None:
    trainer = lab.trainer(backend)
    batch = replace(lab.batch, weights=np.zeros_like(lab.batch.weights))
    assert trainer.accumulate(batch, NextToken()) == {"loss": 0.0}
    assert not any(array.any() for array in trainer.gradients().values())
    assert not trainer.logprobs(batch).any()
