"""What training hands to a backend: batches that fit, settings, and the adapter's file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcore.adapter import Adapter, write_adapter
from ivcore.config import ModelConfig
from ivcore.errors import CheckpointError, PromptError, TrainingError
from ivcore.patterns import matches
from ivcore.training import (
    Batch,
    Distill,
    LoraSettings,
    OptimizerSettings,
    head_block,
    joined_grids,
    parameter_groups,
)

MICRO = Path(__file__).resolve().parents[1] / "data" / "reference" / "iv3-micro"
LINEARS = [
    "model.language_model.layers.0.mlp.up_proj",
    "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.10.mlp.up_proj",
    "model.language_model.layers.10.self_attn.q_proj",
    "model.visual.blocks.0.attn.qkv",
    "lm_head",
]


def batch() -> Batch:
    """A row of text and one with an image of 2 x 4 patches, which makes 2 tokens."""
    token_ids = np.array([1, 2, 3, 502, 505, 505, 503], np.int32)
    targets, weights = np.array([2, 0, 502, 0, 0, 503, 0], np.int32), np.array([1, 0, 1, 0, 0, 0.5, 0], np.float32)
    return Batch(
        token_ids, np.zeros((3, 7), np.int32), np.array([3, 4], np.int32), np.zeros((8, 1536), np.float32),
        np.array([[1, 2, 4]], np.int32), targets, weights,
    )  # fmt: skip


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dir(MICRO)


def test_a_batch_that_fits_is_accepted(config: ModelConfig) -> None:
    batch().check(config)
    assert batch().places.tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": np.zeros(6, np.int32)}, r"7 tokens has targets of shape \(6,\) instead of \(7,\)"),
        ({"weights": np.ones(8, np.float32)}, r"has weights of shape \(8,\)"),
        ({"position_ids": np.zeros((7, 3), np.int32)}, r"has position_ids of shape \(7, 3\) instead of \(3, 7\)"),
        ({"lengths": np.array([3, 5], np.int32)}, r"7 tokens has rows of \[3, 5\] tokens"),
        ({"lengths": np.array([7, 0], np.int32)}, r"has rows of \[7, 0\]"),
        ({"weights": np.full(7, -1, np.float32)}, "a weight that is negative"),
        ({"weights": np.full(7, np.nan, np.float32)}, "a weight that is negative or not a number"),
        ({"pixels": None, "grid_thw": None}, "2 visual placeholders, but its pixels make 0 tokens"),
        ({"pixels": np.zeros((16, 1536)), "grid_thw": np.array([[2, 2, 4]])}, "but its pixels make 4 tokens"),
    ],
)
def test_a_batch_that_does_not_fit_says_where(config: ModelConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        replace(batch(), **change).check(config)


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": np.array([1, 2, 3, 502, 505, 505, 512], np.int32)},
        {"targets": np.array([2, 0, -1, 0, 0, 0, 0], np.int32)},
        {"pixels": np.zeros((8, 1535), np.float32)},
    ],
)
def test_ids_and_pixels_are_looked_at_as_those_of_a_prompt(config: ModelConfig, change: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        replace(batch(), **change).check(config)


@pytest.mark.parametrize("parents", [[-1, 1], [0, -1], [-2, -1], [-1], [-1, -1, 0]])
def test_a_row_that_goes_on_from_none_before_it_is_refused(config: ModelConfig, parents: list[int]) -> None:
    with pytest.raises(TrainingError, match=r"parents of shape|rows that go on from"):
        replace(batch(), parents=np.array(parents, np.int32)).check(config)


def test_a_row_may_go_on_from_an_earlier_one_but_not_from_one_that_does_so_itself(config: ModelConfig) -> None:
    three = replace(batch(), lengths=np.array([2, 1, 4], np.int32))
    replace(three, parents=np.array([-1, 0, 0], np.int32)).check(config)
    with pytest.raises(TrainingError, match=r"rows that go on from \[-1, 0, 1\]"):
        replace(three, parents=np.array([-1, 0, 1], np.int32)).check(config)


def test_neighbours_of_one_frame_size_are_joined() -> None:
    grids = np.array([[2, 4, 6], [1, 4, 6], [3, 6, 4], [1, 4, 6]], np.int32)
    assert joined_grids(grids).tolist() == [[3, 4, 6], [3, 6, 4], [1, 4, 6]]


def test_logits_fit_in_half_of_the_budget() -> None:
    # float32 logits, their log-softmax and two gradients of 1,000 places of 2,000 tokens are 32 MB.
    assert head_block(2_000, 64_000_000) == 1_000
    assert head_block(152_000, 1) == 1


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("lm_head", ["lm_head"]),
        ("layers.1", []),
        ("layers.10", LINEARS[2:4]),
        ("language_model.layers.*", LINEARS[:4]),
        ("*_proj", LINEARS[:4]),
        ("q_proj", [LINEARS[1], LINEARS[3]]),
        ("visual", [LINEARS[4]]),
        ("*", LINEARS),
    ],
)
def test_a_pattern_names_a_run_of_dotted_parts(pattern: str, named: list[str]) -> None:
    assert [name for name in LINEARS if matches(name, pattern)] == named


def test_targets_are_the_decoder_unless_said_otherwise() -> None:
    assert LoraSettings().pick(LINEARS) == LINEARS[:4]
    assert LoraSettings(targets=("lm_head", "layers.0")).pick(LINEARS) == [*LINEARS[:2], "lm_head"]
    with pytest.raises(TrainingError, match="The target k_proj names no linear layer"):
        LoraSettings(targets=("q_proj", "k_proj")).pick(LINEARS)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_lora_settings_have_a_range(settings: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=f"LoRA's {next(iter(settings))} is"):
        LoraSettings(**settings)


def test_a_forward_share_needs_the_whole_vocabulary() -> None:
    for teacher, share in ((np.zeros(7, np.float32), 0.5), (np.zeros((3, 9), np.float32), 1.5)):
        with pytest.raises(TrainingError, match="forward_share is"):
            Distill(teacher, share)
    with pytest.raises(TrainingError, match="teacher scored 4 places, but the batch trains on 3"):
        Distill(np.zeros((4, 9), np.float32)).rows(batch().places)


def test_parameters_are_grouped_by_rate_and_decay() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "model.visual.blocks.0.norm1.weight": (8,),
        "model.visual.patch_embed.proj.weight": (8, 3, 2, 2, 2),
        "model.language_model.layers.0.self_attn.q_rope_scale": (4, 1, 6),
        "model.language_model.layers.0.mlp.up_proj.weight": (6, 6),
        "model.language_model.layers.0.self_attn.q_proj.bias": (6,),
        "lm_head.weight": (9, 6),
    }
    names = list(shapes)
    settings = OptimizerSettings(
        weight_decay=0.1, multipliers=(("patch_embed", 0.5), ("visual", 0.1), ("lm_head", 0.0))
    )
    found = {(group.multiplier, group.weight_decay): list(group.names) for group in parameter_groups(shapes, settings)}
    assert found == {
        (0.1, 0.0): names[:1],
        (0.5, 0.1): names[1:2],
        (1.0, 0.0): [names[2], names[4]],
        (1.0, 0.1): [names[3]],
    }
    with pytest.raises(TrainingError, match="multiplier vision names no parameter"):
        parameter_groups(shapes, OptimizerSettings(multipliers=(("vision", 0.1),)))


def test_a_written_adapter_is_in_peft_s_form(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    factors = {
        name: (random.standard_normal((3, 5)).astype(np.float32), random.standard_normal((7, 3)).astype(np.float32))
        for name in ("model.b.q_proj", "lm_head")
    }
    settings = LoraSettings(rank=3, alpha=6, dropout=0.25, rank_stabilized=True)
    write_adapter(tmp_path / "new", factors, settings)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.25, "bias": "none",
        "target_modules": ["lm_head", "model.b.q_proj"], "base_model_name_or_path": None,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    peft = pytest.importorskip("peft")
    assert peft.LoraConfig.from_pretrained(tmp_path / "new").target_modules == {"lm_head", "model.b.q_proj"}
    adapter = Adapter.load(tmp_path / "new")
    for name, (a, b) in factors.items():
        found = adapter.factors(name)
        np.testing.assert_array_equal(found[0], a)
        np.testing.assert_array_equal(found[1], b)
        np.testing.assert_allclose(adapter.delta(name, slice(None)), 6 / np.sqrt(3) * (b @ a), rtol=1e-5)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_adapter(tmp_path / "new" / "adapter_config.json", factors, settings)
