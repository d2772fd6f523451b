"""Sampling against distributions worked out by hand on small vocabularies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ivcore.errors import BackendError, ConfigError
from ivcore.sampling import Sampler, Sampling, stop_ids

PROBABILITIES = np.array([0.1, 0.4, 0.02, 0.3, 0.18])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + np.float32(3)
DRAWS = 20_000


def frequencies(how: Sampling, logits: np.ndarray = LOGITS, generated: tuple[int, ...] = ()) -> np.ndarray:
    sampler = Sampler(how)
    counts = Counter(sampler(logits, generated) for _ in range(DRAWS))
    return np.array([counts[token] / DRAWS for token in range(len(logits))])


def agree(drawn: np.ndarray, expected: np.ndarray) -> None:
    """Five standard deviations of a frequency; a token that may not come never comes."""
    expected = expected / expected.sum()
    assert not drawn[expected == 0].any()
    np.testing.assert_array_less(np.abs(drawn - expected), 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9)


def only(*tokens: int) -> np.ndarray:
    return np.where(np.isin(np.arange(5), tokens), PROBABILITIES, 0)


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert Sampler()(LOGITS) == 1
    assert Sampler(Sampling(seed=3, top_p=0.1))(np.array([1.0, 5.0, 5.0], np.float32)) == 1


def test_temperature_one_draws_from_the_softmax() -> None:
    agree(frequencies(Sampling(temperature=1.0, seed=0)), PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.25, 0.7, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature: float) -> None:
    agree(frequencies(Sampling(temperature=temperature, seed=1)), PROBABILITIES ** (1 / temperature))


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, (1,)), (2, (1, 3)), (3, (1, 3, 4)), (5, (0, 1, 2, 3, 4)), (99, (0, 1, 2, 3, 4))]
)
def test_top_k_keeps_the_likeliest(top_k: int, kept: tuple[int, ...]) -> None:
    agree(frequencies(Sampling(temperature=1.0, top_k=top_k, seed=2)), only(*kept))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, (1,)), (0.39, (1,)), (0.41, (1, 3)), (0.69, (1, 3)), (0.71, (1, 3, 4)), (0.9, (0, 1, 3, 4)),
        (1.0, (0, 1, 2, 3, 4)),
    ],
)  # fmt: skip
def test_top_p_keeps_the_smallest_set_with_that_much_probability(top_p: float, kept: tuple[int, ...]) -> None:
    agree(frequencies(Sampling(temperature=1.0, top_p=top_p, seed=3)), only(*kept))


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.04, (0, 1, 2, 3, 4)), (0.06, (0, 1, 3, 4)), (0.26, (1, 3, 4)), (0.5, (1, 3)), (0.9, (1,))]
)
def test_min_p_keeps_what_has_that_fraction_of_the_best(min_p: float, kept: tuple[int, ...]) -> None:
    agree(frequencies(Sampling(temperature=1.0, min_p=min_p, seed=4)), only(*kept))


def test_filters_apply_after_temperature_and_one_after_the_other() -> None:
    # Squared: .16 .09 .0324 .01, .2928 in all. Of the three that k keeps, .5666 .3187 .1147, 0.88 needs two.
    how = Sampling(temperature=0.5, top_k=3, top_p=0.88, min_p=0.2, seed=5)
    agree(frequencies(how), only(1, 3) ** 2)
    # Without top_k the two likeliest hold .8538 of all, so a third is needed, which min_p then takes away or leaves.
    agree(frequencies(Sampling(temperature=0.5, top_p=0.88, min_p=0.21, seed=6)), only(1, 3) ** 2)
    agree(frequencies(Sampling(temperature=0.5, top_p=0.88, min_p=0.2, seed=6)), only(1, 3, 4) ** 2)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = np.array([2.0, -1.0, 1.5, -0.5], np.float32)
    penalised = np.array([2.0 / 1.5, -1.0 * 1.5, 1.5, -0.5])
    how = Sampling(temperature=1.0, repetition_penalty=1.5, seed=7)
    # However often a token came, it counts once.
    agree(frequencies(how, logits, generated=(0, 1, 1, 0, 0)), np.exp(penalised))
    assert Sampler(Sampling(repetition_penalty=1.5))(logits, [0]) == 2
    assert Sampler(Sampling(repetition_penalty=1.5))(logits, []) == 0
    np.testing.assert_array_equal(logits, np.array([2.0, -1.0, 1.5, -0.5], np.float32))


def test_a_seed_gives_the_same_tokens_again_and_others_give_others() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(LOGITS) for _ in range(50)]

    assert draw(11) == draw(11)
    assert len({tuple(draw(seed)) for seed in (11, 12, 13, None, None)}) == 5


def test_nearly_equal_logits_draw_the_same_tokens() -> None:
    noise = np.random.default_rng(0).standard_normal(5).astype(np.float32) * np.float32(1e-6)
    samplers = Sampler(Sampling(temperature=1.0, seed=8)), Sampler(Sampling(temperature=1.0, seed=8))
    assert [samplers[0](LOGITS) for _ in range(500)] == [samplers[1](LOGITS + noise) for _ in range(500)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=1.0, seed=0)])
def test_logits_that_are_no_numbers_are_one_sentence(bad: float, how: Sampling) -> None:
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(BackendError, match="float32"):
        Sampler(how)(logits)


def test_a_token_of_probability_zero_never_comes() -> None:
    logits = LOGITS.copy()
    logits[1] = -np.inf
    agree(frequencies(Sampling(temperature=1.0, seed=9), logits), only(0, 2, 3, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": -0.1}, {"min_p": 1.0}, {"repetition_penalty": 0.0}, {"seed": -1},
    ],
)  # fmt: skip
def test_a_setting_outside_its_range_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(BackendError) as caught:
        Sampler(Sampling(**wrong))  # type: ignore[arg-type]
    [(name, value)] = wrong.items()
    assert name in str(caught.value) and str(value) in str(caught.value)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-320])
def test_a_very_low_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=0))
    assert {sampler(LOGITS) for _ in range(20)} == {1}


def test_stop_ids_are_those_of_the_generation_config(tmp_path: Path) -> None:
    assert stop_ids(tmp_path) == frozenset()
    for content, expected in (({"eos_token_id": 5}, {5}), ({"eos_token_id": [5, 7]}, {5, 7}), ({}, set()),
                              ({"eos_token_id": None}, set())):  # fmt: skip
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        assert stop_ids(tmp_path) == expected
    for wrong in ("x", [1, "x"], {"a": 1}, 1.5):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ConfigError, match=r"generation_config\.json.*eos_token_id"):
            stop_ids(tmp_path)
