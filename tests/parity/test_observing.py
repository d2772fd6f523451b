"""Observers of both networks: what they see, what they may put in its place, and logits of some positions alone."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from ivcore.errors import BackendError
from ivcore.inputs import ModelInputs
from ivcore.shards import Checkpoint


def record(model: Any, inputs: ModelInputs) -> dict[str, np.ndarray]:
    """All activations by name, in the order in which they were first seen, their portions joined."""
    parts: dict[str, list[np.ndarray]] = {}

    def observe(name: str, rows: np.ndarray) -> None:
        parts.setdefault(name, []).append(rows.copy())

    model.logits(inputs, observe)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def replace(model: Any, inputs: ModelInputs, **given: np.ndarray) -> dict[str, np.ndarray]:
    """Activations when those named (with __ for dots) are given; what is seen is what was there before."""
    wanted = {name.replace("__", "."): rows for name, rows in given.items()}
    parts: dict[str, list[np.ndarray]] = {}

    def observe(name: str, rows: np.ndarray) -> np.ndarray | None:
        start = sum(map(len, parts.setdefault(name, [])))
        parts[name].append(rows.copy())
        return wanted[name][start : start + len(rows)] if name in wanted else None

    returned = model.logits(inputs, observe)
    return {name: np.concatenate(rows) for name, rows in parts.items()} | {"returned": returned}


def weight(reference: Any, name: str) -> np.ndarray:
    return np.array(Checkpoint(reference.path).read(name)).astype(np.float64)


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_points_are_seen_in_causal_order_as_float32_rows(model: Any, reference: Any) -> None:
    seen = record(model, reference.inputs)
    blocks = [f"visual.blocks.{index}" for index in range(4)]
    for index in range(3):  # a merger follows its block
        blocks.insert(blocks.index(f"visual.blocks.{index + 1}") + 1, f"visual.deepstack_merger_list.{index}")
    layers = [f"layers.{index}" for index in range(5)]
    assert [*seen] == ["visual.patch_embed", *blocks, "visual.merger", "embeddings", *layers, "norm", "logits"]
    assert all(rows.dtype == np.float32 and rows.ndim == 2 for rows in seen.values())
    assert {name: rows.shape for name, rows in seen.items() if name in ("visual.blocks.1", "norm", "logits")} == {
        "visual.blocks.1": (96, 64),
        "norm": (58, 128),
        "logits": (58, 512),
    }


def test_what_is_seen_at_the_first_and_last_points_is_what_the_weights_make(model: Any, reference: Any) -> None:
    seen = record(model, reference.inputs)
    layer = seen["layers.4"].astype(np.float64)
    normed = layer / np.sqrt(np.square(layer).mean(axis=-1, keepdims=True) + 1e-6)
    close(seen["norm"], normed * weight(reference, "model.language_model.norm.weight"))
    close(seen["logits"], seen["norm"].astype(np.float64) @ weight(reference, "lm_head.weight").T)
    # Position embeddings depend on the grid alone: what two frames of one video have in common.
    kernel = weight(reference, "model.visual.patch_embed.proj.weight").reshape(64, -1)
    without = np.asarray(reference.inputs.pixels, np.float64) @ kernel.T
    position = seen["visual.patch_embed"] - without - weight(reference, "model.visual.patch_embed.proj.bias")
    assert np.abs(position).max() > 1e-2
    close(position[:24], position[24:48])


def test_an_observer_that_gives_back_what_it_saw_or_nothing_changes_nothing(model: Any, reference: Any) -> None:
    plain = model.logits(reference.inputs)
    np.testing.assert_array_equal(model.logits(reference.inputs, lambda name, rows: None), plain)
    np.testing.assert_array_equal(model.logits(reference.inputs, lambda name, rows: rows.copy()), plain)


@pytest.mark.parametrize("name", ["visual__merger", "layers__2", "norm", "logits"])
def test_a_replaced_activation_counts_for_all_that_follows_and_nothing_before(
    model: Any, reference: Any, name: str
) -> None:
    plain = record(model, reference.inputs)
    point = name.replace("__", ".")
    given = np.random.default_rng(0).standard_normal(plain[point].shape, dtype=np.float32)
    seen = replace(model, reference.inputs, **{name: given})
    order = [*plain]
    for before in order[: order.index(point) + 1]:
        np.testing.assert_array_equal(seen[before], plain[before])
    match point:
        case "visual.merger":
            visual = np.isin(reference.inputs.token_ids, (505, 506))
            np.testing.assert_array_equal(seen["embeddings"][visual], given)
            np.testing.assert_array_equal(seen["embeddings"][~visual], plain["embeddings"][~visual])
        case "norm":
            close(seen["logits"], given.astype(np.float64) @ weight(reference, "lm_head.weight").T)
        case "logits":
            np.testing.assert_array_equal(seen["returned"], given)
        case "layers.2":
            assert np.abs(seen["layers.3"] - plain["layers.3"]).max() > 0.1


def test_a_replaced_deepstack_feature_is_what_the_decoder_adds(model: Any, reference: Any) -> None:
    plain = record(model, reference.inputs)
    zeros = np.zeros_like(plain["visual.deepstack_merger_list.1"])
    ones = np.ones_like(zeros)
    first = replace(model, reference.inputs, visual__deepstack_merger_list__1=zeros)
    second = replace(model, reference.inputs, visual__deepstack_merger_list__1=ones)
    # Added after layer 1, so layer 1 as seen is the same, and layer 2 is not.
    np.testing.assert_array_equal(first["layers.1"], second["layers.1"])
    assert np.abs(first["layers.2"] - second["layers.2"]).max() > 0.1
    # The second, fed the first's next layer, goes on as the first does.
    forced = replace(
        model, reference.inputs, visual__deepstack_merger_list__1=ones, layers__2=first["layers.2"]
    )  # fmt: skip
    np.testing.assert_array_equal(forced["layers.3"], first["layers.3"])


def test_an_activation_that_is_given_in_finer_numbers_is_rounded_to_the_network_s(backend: Any, reference: Any) -> None:
    model = backend.load(reference.path, dtype="bfloat16")
    rows = np.full((58, 128), 1 + 2**-10, np.float32)
    coarse = replace(model, reference.inputs, layers__3=rows)
    same = replace(model, reference.inputs, layers__3=np.ones_like(rows))
    np.testing.assert_array_equal(coarse["layers.4"], same["layers.4"])


def test_logits_of_some_positions_are_those_rows_in_the_order_asked_for(model: Any, reference: Any) -> None:
    everything = model.logits(reference.inputs)
    for positions in ([57], [0, 5, 6, 30], [40, 3, 3, 57], []):
        seen: list[np.ndarray] = []
        rows = model.logits(
            reference.inputs, lambda name, a, seen=seen: seen.append(a) if name == "logits" else None,
            np.array(positions, int),
        )  # fmt: skip
        assert rows.shape == (len(positions), 512)
        close(rows, everything[positions], 1e-5)
        assert sum(map(len, seen)) == len(positions)


@pytest.mark.parametrize("positions", [[58], [-1], [3, 1000]])
def test_positions_outside_the_prompt_are_refused(model: Any, reference: Any, positions: list[int]) -> None:
    with pytest.raises(BackendError, match="positions must lie in the prompt, 0 to 57"):
        model.logits(reference.inputs, positions=np.array(positions))


def test_portions_of_frames_tokens_and_logits_join_to_the_whole(
    model: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record(model, reference.inputs)
    monkeypatch.setattr(sys.modules[type(model).__module__], "HEAD_ROWS", 5)
    model.memory_budget = 1
    sizes: dict[str, list[int]] = {}
    model.logits(reference.inputs, lambda name, rows: sizes.setdefault(name, []).append(len(rows)))
    assert sizes["visual.blocks.0"] == [24] * 4 and sizes["visual.merger"] == [6] * 4
    assert sizes["layers.0"] == sizes["norm"] == [16, 16, 16, 10]
    assert sizes["logits"] == [5, 5, 5, 1] * 3 + [5, 5]
    for name, rows in record(model, reference.inputs).items():
        close(rows, whole[name])
    positions = np.array([55, 2, 17, 18, 33])
    close(model.logits(reference.inputs, positions=positions), whole["logits"][positions])
