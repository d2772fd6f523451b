"""Forked caches and rollouts: the same numbers as reading everything again, and none in the way of another."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivcore.errors import TrainingError
from ivcore.inputs import ModelInputs
from ivcore.positions import position_ids
from ivcore.sampling import Sampling
from ivcore.tokenizer import Tokenizer
from ivcore.training import Batch, LoraSettings, NextToken
from train.recipe import Data, ResolvedPhase, Rollout
from train.rollouts import Roller, at_places, packs, prompt_budget, roll_out, rollout_seed
from train.rows import read_rows
from train.samples import Sample, SampleBuilder

WORDS = 28
VISION = {
    "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "patch_size": 2, "spatial_merge_size": 2,
    "out_hidden_size": 16, "num_position_embeddings": 4, "deepstack_visual_indexes": [0],
}  # fmt: skip
TEXT = {
    "vocab_size": WORDS + 2, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 100.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
}  # fmt: skip
ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"attention": "gqa"},
    "release": {"attention": "m2la", "attention_layout": "release", "kv_lora_rank": 6, "qk_nope_head_dim": 5,
                "qk_rope_head_dim": 8, "v_head_dim": 7},
    "norm": {"attention": "m2la", "attention_layout": "norm", "kv_lora_rank": 6, "qk_rope_num_heads": 2},
}  # fmt: skip
MICRO = Path(__file__).resolve().parents[1] / "data/reference/iv3-micro"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> dict[str, Path]:
    """A random checkpoint of each attention."""
    made = {}
    for name, attention in ATTENTIONS.items():
        made[name] = tmp_path_factory.mktemp(name)
        raw = {"model_type": "internvideo3", "text_config": TEXT | attention, "vision_config": VISION,
               "image_token_id": WORDS, "video_token_id": WORDS + 1}  # fmt: skip
        tools.neighbour("parity", "conftest")._write_random(made[name], raw)
    return made


@pytest.fixture(params=ATTENTIONS)
def model(folders: dict[str, Path], backend: str, request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(f"iv{backend}").load(folders[request.param])


def picture_prompt() -> ModelInputs:
    """Text, an image of four visual tokens, text: the positions after it are not the number of tokens."""
    random = np.random.default_rng(0)
    token_ids = np.array([3, 1, *[WORDS] * 4, 4, 5, 9], np.int32)
    return ModelInputs(token_ids, random.standard_normal((16, 24)).astype(np.float32), np.array([[1, 4, 4]], np.int32))


# What is done to a tree of caches: (which cache, what, a number).
ACTIONS = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from(["fork", "fork", "decode", "decode", "read", "trim"]),
              st.integers(1, 6)), min_size=4, max_size=14,
)  # fmt: skip


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(actions=ACTIONS)
def test_every_fork_gives_the_logits_of_one_cache_that_was_never_forked(model: Any, actions: list[Any]) -> None:
    """And of reading all of its tokens from scratch. Buffers grow by little, so that forks outgrow what they share."""
    library = importlib.import_module(f"iv{model.backend}.cache")
    first, prompt = model.new_cache(), picture_prompt()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "GROWTH", 2)
        model.prefill(prompt, first)
        caches: list[Any] = [first]
        histories: list[list[Any]] = [[]]
        random = np.random.default_rng(1)
        for which, what, number in [*actions, *((index, "decode", 1) for index in range(10))]:
            cache, history = caches[which % len(caches)], histories[which % len(caches)]
            if what == "fork":
                caches.append(cache.fork())
                histories.append(list(history))
            else:
                trimmed = min(number, cache.length - len(prompt.token_ids))
                drawn = random.integers(0, WORDS, number).astype(np.int32)
                history.append((what, trimmed if what == "trim" else drawn))
                apply(model, cache, history[-1])
    for cache, history in zip(caches, histories, strict=True):
        alone = model.new_cache()
        model.prefill(prompt, alone)
        for action in history:
            apply(model, alone, action)
        assert (cache.length, cache.next_position) == (alone.length, alone.next_position)
        found = model.decode(7, cache)
        np.testing.assert_array_equal(found, model.decode(7, alone))
        tokens = [*prompt.token_ids, *kept(history), 7]
        whole = model.logits(replace(prompt, token_ids=np.array(tokens, np.int32)))
        np.testing.assert_allclose(found, whole[-1], rtol=0, atol=2e-5)


def apply(model: Any, cache: Any, action: tuple[str, Any]) -> None:
    what, given = action
    if what == "trim":
        cache.trim(given)
    elif what == "read":
        model.prefill(ModelInputs(given, None, None), cache)
    else:
        for token_id in given:
            model.decode(int(token_id), cache)


def kept(history: list[tuple[str, Any]]) -> list[int]:
    """The tokens that are left of a history."""
    tokens: list[int] = []
    for what, made in history:
        tokens = tokens[: len(tokens) - made] if what == "trim" else [*tokens, *map(int, made)]
    return tokens


def test_a_fork_of_nothing_is_empty_and_goes_its_own_way(model: Any) -> None:
    cache = model.new_cache()
    fork = cache.fork()
    expected = model.prefill(picture_prompt(), cache)
    assert (fork.length, fork.nbytes) == (0, 0)
    np.testing.assert_array_equal(model.prefill(picture_prompt(), fork), expected)


def test_a_fork_takes_no_memory_until_it_is_written_to() -> None:
    torch_cache = pytest.importorskip("ivtorch.cache")
    torch = pytest.importorskip("torch")
    buffer = torch_cache.Buffer(axis=1)
    buffer.write(torch.ones(1, 3, 2), 0, 3)
    fork = buffer.fork()
    assert fork.array.data_ptr() == buffer.array.data_ptr()
    fork.write(torch.zeros(1, 1, 2), 3, 3)
    assert fork.array.data_ptr() != buffer.array.data_ptr()
    copied = fork.array.data_ptr()
    fork.write(torch.zeros(1, 1, 2), 4, 3)
    assert fork.array.data_ptr() == copied


@pytest.mark.parametrize("stops", [frozenset(), frozenset(range(0, WORDS, 3))], ids=["no stop", "stops"])
def test_a_rollout_is_what_generate_gives_with_its_seed(model: Any, stops: frozenset[int]) -> None:
    model.stop_ids = stops
    answers = roll_out(model, picture_prompt(), Rollout(rollouts=6, max_tokens=9, temperature=0.8, top_p=0.9), 5, 6)
    for number, answer in enumerate(answers):
        drawn = []
        for attempt in range(100):
            sampling = Sampling(temperature=0.8, top_p=0.9, seed=rollout_seed(5, 6, number, attempt))
            drawn.append(tuple(model.generate(picture_prompt(), max_tokens=9, sampling=sampling)))
            if max(drawn[-1]) < WORDS:
                break
        assert answer.token_ids == drawn[-1]
        assert answer.cut_off == (not stops & set(answer.token_ids))
        assert len(answer) == 9 or not answer.cut_off
    assert len(set(answers)) > 1


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=7), stops=st.sets(st.integers(0, 12)),
    most=st.integers(0, 12), rows=st.integers(1, 7), room=st.integers(0, 20),
)  # fmt: skip
def test_answers_side_by_side_are_those_that_each_is_alone(
    model: Any, seeds: list[int], stops: set[int], most: int, rows: int, room: int
) -> None:
    """However many go side by side, whenever each ends, and where the context does; the cache stays as it was."""
    cache = model.new_cache()
    logits = model.prefill(picture_prompt(), cache)
    text = model.config.text.model_copy(update={"max_position_embeddings": cache.length + room})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "stop_ids", frozenset(stops))
        patch.setattr(model, "memory_budget", rows * cache.nbytes)
        patch.setattr(model, "config", model.config.model_copy(update={"text": text}))
        samplings = [Sampling(temperature=1.5, seed=seed) for seed in seeds]
        together = model.continue_each(logits, cache, samplings, max_tokens=most)
        alone = [list(model.continue_from(logits, cache.fork(), max_tokens=most, sampling=each)) for each in samplings]
    assert together == alone
    assert cache.length == len(picture_prompt().token_ids)
    np.testing.assert_allclose(model.decode(3, cache), model.decode(3, prefilled(model)), atol=1e-5)


def prefilled(model: Any) -> Any:
    cache = model.new_cache()
    model.prefill(picture_prompt(), cache)
    return cache


def test_the_prompt_of_a_group_is_read_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    prefill: Callable[..., Any] = model.prefill

    def count(inputs: ModelInputs, cache: Any, **how: Any) -> Any:
        read.append(len(inputs.token_ids))
        return prefill(inputs, cache, **how)

    monkeypatch.setattr(model, "prefill", count)
    roll_out(model, picture_prompt(), Rollout(max_tokens=3), 0)
    assert read == [len(picture_prompt().token_ids)]


def test_an_answer_with_a_placeholder_is_drawn_again_and_a_model_that_writes_nothing_else_is_refused(
    model: Any,
) -> None:
    answers = roll_out(model, picture_prompt(), Rollout(rollouts=20, max_tokens=12, temperature=2.0), 0)
    assert max(max(answer.token_ids) for answer in answers) < WORDS
    only = np.where(np.arange(WORDS + 2) < WORDS, -1e9, 0).astype(np.float32)
    model.prefill = lambda inputs, cache: only
    with pytest.raises(TrainingError, match="placeholders of images or videos"):
        roll_out(model, picture_prompt(), Rollout(max_tokens=1), 0)


def test_no_two_rollouts_of_a_run_have_one_seed() -> None:
    seeds = {rollout_seed(*(int(each) for each in where)) for where in np.ndindex(3, 8, 8, 8)}
    assert len(seeds) == 3 * 8**3 and max(seeds) > 1 << 120 and min(seeds) >= 0


@pytest.fixture
def make_roller(tmp_path: Path) -> Callable[..., Roller]:
    lines = [f'{{"messages": [{{"role": "user", "content": "Question {number}"}}]}}\n' for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    builder = SampleBuilder(Tokenizer.from_dir(MICRO))

    def make(seed: int = 0, batch: int = 3) -> Roller:
        rows = read_rows(tmp_path / "rows.jsonl", "distill")
        phase = ResolvedPhase("all", 9, batch, Data())
        return Roller(rows, phase, Rollout(rollouts=2, max_tokens=5), lambda row: (builder.prompt(row),), seed)

    return make


def test_a_roller_goes_on_with_the_very_answers_of_one_that_was_not_stopped(
    make_roller: Callable[..., Roller], backend: str
) -> None:
    model = importlib.import_module(f"iv{backend}").load(MICRO)

    def answers(roller: Roller) -> list[Any]:
        return [(group.position, group.answers) for group in roller.step(model)]

    undisturbed = make_roller()
    expected = [answers(undisturbed) for _ in range(4)]
    stopped, fresh = make_roller(), make_roller()
    for each in expected[:2]:
        assert answers(stopped) == each
    fresh.load_state(stopped.state())
    assert [answers(fresh) for _ in range(2)] == expected[2:]
    assert expected[0] != expected[1] and answers(make_roller(seed=1)) != expected[0]


def test_answers_of_a_lane_do_not_depend_on_how_many_lanes_there_are(
    make_roller: Callable[..., Roller], one_lab: Any, backend: str
) -> None:
    """The first step's lane k shows the k-th row of the order, whatever the batch."""
    model = one_lab.model(backend)
    few, many = make_roller(batch=2).step(model), make_roller(batch=4).step(model)
    assert [(group.position, group.answers) for group in many[:2]] == [(group.position, group.answers) for group in few]


def sampled(prompts: list[np.ndarray], answers: list[tuple[int, int]], pixels: Any = None) -> list[Sample]:
    """Of each answer, (which prompt, its length), the sample."""
    random, samples = np.random.default_rng(7), []
    for index, (which, length) in enumerate(answers):
        token_ids = np.concatenate([prompts[which], random.integers(0, WORDS, length)]).astype(np.int32)
        positions = np.tile(np.arange(len(token_ids), dtype=np.int32), (3, 1))
        trained = np.arange(len(token_ids)) >= len(prompts[which])
        samples.append(Sample(str(index), token_ids, trained, positions, pixels, None))
    return samples


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    answers=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=8),
    budget=st.integers(1, 40),
)
def test_packs_hold_each_rollout_once_within_the_budget_and_weigh_one_together(
    lengths: list[int], answers: list[tuple[int, int]], budget: int
) -> None:
    prompts = [100 * which + np.arange(length) for which, length in enumerate(lengths)]
    samples = sampled(prompts, [(which % len(prompts), length) for which, length in answers])
    total = sum(length for _, length in answers)
    made = list(packs(samples, total, budget))
    assert sorted(index for indices, _ in made for index in indices) == list(range(len(samples)))
    assert sum(batch.weights.sum(dtype=np.float64) for _, batch in made) == pytest.approx(1, abs=1e-6)
    for indices, batch in made:
        assert len(batch.token_ids) <= budget or len(indices) == 1
        said = np.concatenate([samples[index].token_ids[samples[index].trained] for index in indices])
        np.testing.assert_array_equal(batch.targets[batch.places], said)
        assert set(batch.weights[batch.places].tolist()) == {float(np.float32(np.float32(1) / total))}
        np.testing.assert_array_equal(at_places(batch, said), batch.targets)
        assert sorted(seen_by_rows(batch)) == sorted(tuple(samples[index].token_ids) for index in indices)


def seen_by_rows(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens of every row that no other goes on from, behind those of the row that it goes on from."""
    ends = np.cumsum(batch.lengths)
    parents = np.full(len(ends), -1) if batch.parents is None else batch.parents
    rows = [tuple(batch.token_ids[end - length : end]) for end, length in zip(ends, batch.lengths, strict=True)]
    whole = [(rows[parent] if parent >= 0 else ()) + row for row, parent in zip(rows, parents, strict=True)]
    return [row for index, row in enumerate(whole) if index not in parents]


def test_answers_to_one_prompt_have_it_in_their_batch_once() -> None:
    prompts = [np.arange(20), 100 + np.arange(5)]
    samples = sampled(prompts, [(0, 3), (0, 1), (0, 4), (1, 2), (1, 2)])
    ((indices, batch),) = packs(samples, 12, 100)
    assert indices == [0, 1, 2, 3, 4]
    assert batch.lengths.tolist() == [19, 4, 2, 5, 4, 3, 3]
    assert batch.parents is not None
    assert batch.parents.tolist() == [-1, 0, 0, 0, -1, 4, 4]


@pytest.mark.parametrize("what", ["other media", "another token", "one token"])
def test_what_is_not_one_prompt_is_not_shared(what: str) -> None:
    first, second = np.arange(6), np.arange(6)
    if what == "another token":
        second = np.array([0, 1, 2, 9, 4, 5])
    if what == "one token":
        first = second = np.arange(1)
    samples = [*sampled([first], [(0, 3)]), *sampled([second], [(0, 2)])]
    if what == "other media":
        samples = [replace(each, pixels=np.zeros((4, 4), np.float32)) for each in samples]
    ((_, batch),) = packs(samples, 5, 100)
    assert batch.parents is None
    assert batch.lengths.tolist() == [len(sample) for sample in samples]


@pytest.mark.parametrize("lora", [LoraSettings(rank=2, targets=("*",)), None], ids=["lora", "full"])
def test_a_shared_prompt_gives_the_scores_and_gradients_of_one_for_each_answer(
    folders: dict[str, Path], backend: str, lora: LoraSettings | None, tools: Any
) -> None:
    """With a picture in the prompt, on every attention; the vision tower's gradient is among them."""
    for folder in folders.values():
        prompt, found = picture_prompt(), []
        trainer = tools.trainer_of(importlib.import_module(f"iv{backend}").load(folder), lora)
        trainer = trainer if lora is None else tools.randomize(trainer)
        answers = sampled([prompt.token_ids], [(0, 5), (0, 1), (0, 3), (0, 5)], prompt.pixels)
        samples = [
            replace(each, position_ids=positions_after(prompt, len(each)), grid_thw=prompt.grid_thw) for each in answers
        ]
        for group in ([samples], [[sample] for sample in samples]):
            scores, gradients = [], {name: np.zeros(shape) for name, shape in trainer.trainable.items()}
            trainer.set_gradients({name: np.zeros(shape, np.float32) for name, shape in trainer.trainable.items()})
            for part in group:
                for _, batch in packs(part, 14, 200):
                    scores.append(trainer.logprobs(batch)[batch.places])
                    trainer.accumulate(batch, NextToken())
            gradients = trainer.gradients()
            found.append((np.concatenate(scores), gradients))
        np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5)
        assert any(name.startswith("model.visual.") for name in found[0][1])
        assert tools.furthest(found[0][1], found[1][1]) < 1e-4


def positions_after(prompt: ModelInputs, length: int) -> np.ndarray:
    """int32 (3, length) of a prompt with a picture of 2 x 2 visual tokens at token 2, and what follows it."""
    assert prompt.grid_thw is not None
    token_ids = np.concatenate([prompt.token_ids, np.zeros(length - len(prompt.token_ids), np.int32)])
    return position_ids(token_ids, prompt.grid_thw, image_token_id=WORDS, video_token_id=WORDS + 1, merge_size=2)


def test_answers_that_leave_no_room_for_a_prompt_are_refused() -> None:
    assert prompt_budget(100, Rollout(max_tokens=99)) == 1
    with pytest.raises(TrainingError, match=r"rollout.max_tokens is 100.*data.max_tokens, 100;"):
        prompt_budget(100, Rollout(max_tokens=100))
