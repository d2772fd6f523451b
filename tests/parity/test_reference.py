"""Both backends against what Hugging Face's Qwen3-VL, with the released attention, gives on two micro checkpoints."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcore.inputs import ModelInputs

TOLERANCE, BETWEEN_BACKENDS = 1e-4, 5e-5
IMAGE, VIDEO, OPEN, CLOSE = 505, 506, 502, 503


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def observed(model: Any, inputs: ModelInputs) -> dict[str, np.ndarray]:
    """Every activation that `logits` shows, and the logits; the portions of one name joined."""
    parts: dict[str, list[np.ndarray]] = {}
    logits = model.logits(inputs, observe=lambda name, array: parts.setdefault(name, []).append(array))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()} | {"logits": logits}


def prefilled(model: Any, inputs: ModelInputs, chunk: int | None = None) -> np.ndarray:
    return model.prefill(inputs, model.new_cache(), chunk=chunk)


def first(inputs: ModelInputs, n: int, positions: np.ndarray) -> ModelInputs:
    """The first n tokens, which may end inside a frame, at the positions they have in the whole."""
    return replace(inputs, token_ids=inputs.token_ids[:n], position_ids=positions[:, :n].astype(np.int32))


def text_prompt(*token_ids: int) -> ModelInputs:
    return ModelInputs(np.array(token_ids, np.int32), None, None)


def picture_prompt(seed: int) -> ModelInputs:
    """Text, an image of 4 x 2 patches, text."""
    tokens = np.array([31, OPEN, IMAGE, IMAGE, CLOSE, 77, 12], np.int32)
    pixels = np.random.default_rng(seed).standard_normal((8, 1536), dtype=np.float32)
    return ModelInputs(tokens, pixels, np.array([[1, 4, 2]], np.int32))


def test_vision_embeddings_and_every_deepstack_feature_match(model: Any, reference: Any) -> None:
    expected = reference.expected
    embeds, deepstack = model.encode_vision(expected["pixel_values_videos"], expected["video_grid_thw"])
    assert embeds.dtype == deepstack.dtype == np.float32
    assert deepstack.shape == (3, *embeds.shape)
    close(embeds, expected["video_embeds"])
    for index, feature in enumerate(deepstack):
        close(feature, expected[f"video_deepstack_{index}"])


def test_every_decoder_layer_and_all_logits_match(model: Any, reference: Any) -> None:
    seen = observed(model, reference.inputs)
    for layer in range(5):
        close(seen[f"layers.{layer}"], reference.expected[f"hidden_{layer}"])
    close(seen["logits"], reference.expected["logits"])


def test_observed_names_are_those_of_the_docstring(model: Any, reference: Any) -> None:
    blocks = [f"visual.blocks.{index}" for index in range(4)]
    mergers = [f"visual.deepstack_merger_list.{index}" for index in range(3)]
    layers = [f"layers.{index}" for index in range(5)]
    seen = observed(model, reference.inputs)
    rest = {"visual.patch_embed", "visual.merger", "embeddings", "norm", "logits"}
    assert seen.keys() == {*blocks, *mergers, *layers, *rest}
    visual = np.isin(reference.inputs.token_ids, (IMAGE, VIDEO))
    np.testing.assert_array_equal(seen["embeddings"][visual], seen["visual.merger"])
    close(seen["visual.merger"][:18], reference.expected["video_embeds"])


def test_greedy_ids_and_their_logits_match(model: Any, reference: Any) -> None:
    expected = reference.expected
    assert list(model.generate(reference.inputs, max_tokens=12)) == expected["greedy_ids"].tolist()
    cache = model.new_cache()
    logits = model.prefill(reference.inputs, cache)
    for token_id, row in zip(expected["greedy_ids"].tolist(), expected["greedy_logits"], strict=True):
        close(logits, row)
        logits = model.decode(token_id, cache)


@pytest.mark.skipif(
    sys.platform == "linux" and "libopenblas" not in Path("/proc/self/maps").read_text(),
    reason="without OpenBLAS, MLX on Linux sums one number after the other, and that alone is off by 6e-5",
)
def test_the_two_backends_agree_on_every_activation(both: dict[str, Any], reference: Any) -> None:
    mlx, torch = (observed(both[name], reference.inputs) for name in ("mlx", "torch"))
    assert mlx.keys() == torch.keys()
    for name, activation in mlx.items():
        np.testing.assert_allclose(activation, torch[name], rtol=0, atol=BETWEEN_BACKENDS, err_msg=name)
    video = reference.expected["pixel_values_videos"], reference.expected["video_grid_thw"]
    for ours, theirs in zip(*(both[name].encode_vision(*video) for name in ("mlx", "torch")), strict=True):
        close(ours, theirs, BETWEEN_BACKENDS)


def test_the_two_backends_agree_on_every_greedy_step(both: dict[str, Any], reference: Any) -> None:
    caches = {name: model.new_cache() for name, model in both.items()}
    rows = {name: model.prefill(reference.inputs, caches[name]) for name, model in both.items()}
    for token_id in reference.expected["greedy_ids"].tolist():
        close(rows["mlx"], rows["torch"], BETWEEN_BACKENDS)
        rows = {name: model.decode(token_id, caches[name]) for name, model in both.items()}


@pytest.mark.parametrize("budget", [1, 60_000, 512 * 2**20])
@pytest.mark.parametrize("form", ["expanded", "absorbed", "auto"])
def test_every_chunking_form_and_budget_equals_one_shot(model: Any, reference: Any, form: str, budget: int) -> None:
    model.form, model.memory_budget = form, budget
    for chunk in (1, 7, 16, None):
        close(prefilled(model, reference.inputs, chunk), reference.expected["logits"][-1])
    # All rows at once: with a budget of 1 the keys of 58 tokens are walked in blocks of 16.
    close(model.logits(reference.inputs), reference.expected["logits"])


def test_expanded_and_absorbed_agree_on_every_position(model: Any, reference: Any) -> None:
    model.form = "expanded"
    expanded = observed(model, reference.inputs)
    model.form = "absorbed"
    for name, activation in observed(model, reference.inputs).items():
        np.testing.assert_allclose(activation, expanded[name], rtol=0, atol=TOLERANCE, err_msg=name)


def test_small_vision_groups_equal_one(model: Any, reference: Any) -> None:
    groups: list[int] = []
    whole = model.encode_vision(reference.inputs.pixels, reference.inputs.grid_thw)
    model.memory_budget = 1
    small = model.encode_vision(
        reference.inputs.pixels,
        reference.inputs.grid_thw,
        lambda name, array: groups.append(len(array)) if name == "visual.merger" else None,
    )
    assert groups == [6, 6, 6, 6], "one temporal patch at a time"
    for ours, theirs in zip(small, whole, strict=True):
        close(ours, theirs)


def test_given_positions_equal_computed_ones(model: Any, reference: Any) -> None:
    given = replace(reference.inputs, position_ids=reference.expected["position_ids"].astype(np.int32))
    np.testing.assert_array_equal(model.logits(given), model.logits(reference.inputs))
    moved = replace(given, position_ids=given.position_ids * [[1], [2], [1]])
    assert np.abs(model.logits(moved) - reference.expected["logits"]).max() > 1e-2


def test_the_cache_counts_its_tokens_bytes_and_positions(model: Any, reference: Any) -> None:
    cache = model.new_cache()
    assert (cache.length, cache.nbytes, cache.next_position) == (0, 0, 0)
    model.prefill(reference.inputs, cache, chunk=16)
    # float32, 5 layers: a latent of 56 and a rotary key of 32 a token, or keys and values of 2 heads of 32.
    row = 4 * 5 * (56 + 32 if reference.path.name == "iv3-micro" else 2 * 2 * 32)
    after = int(reference.expected["rope_delta"][0]) + 58
    assert (cache.length, cache.nbytes, cache.next_position) == (58, 58 * row, after)
    model.decode(7, cache)
    assert (cache.length, cache.nbytes, cache.next_position) == (59, 59 * row, after + 1)
    assert cache.trim(10) == 10
    assert (cache.length, cache.nbytes) == (49, 49 * row)
    assert cache.trim(0) == 0
    assert cache.trim(1000) == 49
    assert (cache.length, cache.nbytes, cache.next_position) == (0, 0, 0)


# 49: after the image; 45: inside it; 33: inside the third frame; 31: before it; 12: inside the first; 3: in the text.
@pytest.mark.parametrize("kept", [57, 49, 45, 41, 33, 31, 12, 3, 0])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_going_on_after_trim_equals_never_having_seen_the_rest(
    model: Any, reference: Any, kept: int, form: str
) -> None:
    model.form = form
    trimmed, fresh = model.new_cache(), model.new_cache()
    model.prefill(reference.inputs, trimmed)
    model.decode(9, trimmed)
    assert trimmed.trim(59 - kept) == 59 - kept
    positions = reference.expected["position_ids"]
    assert trimmed.next_position == positions[:, :kept].max(initial=-1) + 1
    if kept:
        model.prefill(first(reference.inputs, kept, positions), fresh)
    for follow in (text_prompt(11, 12, 13), picture_prompt(seed=kept)):
        assert (trimmed.length, trimmed.next_position) == (fresh.length, fresh.next_position)
        close(model.prefill(follow, trimmed, chunk=2), model.prefill(follow, fresh))
    for token_id in (21, 22):
        close(model.decode(token_id, trimmed), model.decode(token_id, fresh))
    assert (trimmed.length, trimmed.next_position, trimmed.nbytes) == (fresh.length, fresh.next_position, fresh.nbytes)


def test_trimmed_tokens_seen_again_give_the_same_logits(model: Any, reference: Any) -> None:
    cache = model.new_cache()
    model.prefill(reference.inputs, cache)
    cache.trim(9)
    again = text_prompt(*reference.inputs.token_ids[-9:].tolist())
    close(model.prefill(again, cache), reference.expected["logits"][-1])


def test_a_conversation_on_a_cache_equals_one_long_prompt(model: Any, reference: Any) -> None:
    cache = model.new_cache()
    answer = list(model.generate(reference.inputs, max_tokens=5, cache=cache))
    assert cache.length == 58 + 4, "the last id is not in the cache"
    question = picture_prompt(seed=5)
    question.token_ids = np.concatenate([[answer[-1]], question.token_ids]).astype(np.int32)
    continued = model.prefill(question, cache, chunk=3)

    whole = ModelInputs(
        np.concatenate([reference.inputs.token_ids, answer[:-1], question.token_ids]).astype(np.int32),
        np.concatenate([reference.inputs.pixels, question.pixels]),
        np.concatenate([reference.inputs.grid_thw, question.grid_thw]),
    )
    long_cache = model.new_cache()
    close(continued, model.prefill(whole, long_cache))
    assert (cache.length, cache.next_position) == (long_cache.length, long_cache.next_position)
    assert list(model.generate(text_prompt(4, 5), max_tokens=4, cache=cache)) == list(
        model.generate(text_prompt(4, 5), max_tokens=4, cache=long_cache)
    )


def test_a_cache_outgrows_its_buffers_and_keeps_what_it_holds(model: Any) -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 600).astype(np.int32)
    cache = model.new_cache()
    for start in range(0, 600, 150):
        last = model.prefill(ModelInputs(tokens[start : start + 150], None, None), cache)
    close(last, prefilled(model, ModelInputs(tokens, None, None)))
    assert cache.length == 600


def test_a_prefill_that_was_stopped_leaves_the_cache_at_a_whole_chunk(model: Any, reference: Any) -> None:
    class StopHere(Exception):
        pass

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "prefill" and done >= 32:
            raise StopHere

    cache = model.new_cache()
    with pytest.raises(StopHere):
        model.prefill(reference.inputs, cache, chunk=16, on_progress=stop)
    assert cache.length == 32
    cache.trim(32)
    close(model.prefill(reference.inputs, cache), reference.expected["logits"][-1])


def test_progress_counts_every_visual_token_and_every_token(model: Any, reference: Any) -> None:
    calls: list[tuple[str, int, int]] = []
    model.memory_budget = 1
    model.prefill(reference.inputs, model.new_cache(), chunk=20, on_progress=lambda *call: calls.append(call))
    assert [call for call in calls if call[0] == "prefill"] == [("prefill", n, 58) for n in (20, 40, 58)]
    assert [call for call in calls if call[0] == "encode"] == [("encode", n, 24) for n in (6, 12, 18, 24)]


def test_generation_ends_at_a_stop_id_and_when_closed(model: Any, reference: Any) -> None:
    greedy = reference.expected["greedy_ids"].tolist()
    assert model.stop_ids == {504, 500}
    stop_ids, model.stop_ids = model.stop_ids, frozenset([greedy[3]])
    try:
        assert list(model.generate(reference.inputs, max_tokens=12)) == greedy[:4]
    finally:
        model.stop_ids = stop_ids
    cache = model.new_cache()
    stream = model.generate(reference.inputs, max_tokens=12, cache=cache)
    assert [next(stream), next(stream)] == greedy[:2]
    stream.close()
    assert cache.length == 59
    assert list(model.generate(reference.inputs, max_tokens=0)) == []
