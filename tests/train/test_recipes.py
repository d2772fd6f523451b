"""Recipes: the built-in ones, overrides, and one sentence for whatever is wrong."""

from __future__ import annotations

import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivcore.errors import ConfigError
from train.recipe import Data, RlRecipe, SftRecipe
from train.recipe_file import builtin_recipes, parse_recipe, read_recipe, to_dict, to_toml
from train.row import Stage

LEAST: dict[str, Any] = {"stage": "sft", "steps": 10, "learning_rate": {"peak": 1e-4}}


def test_every_built_in_recipe_is_read_and_written_back_the_same(tmp_path: Path) -> None:
    names = builtin_recipes()
    assert {"8b-cpt", "8b-sft-short", "8b-sft-long", "8b-rl", "8b-distill", "mac16-sft", "mac16-rl"} <= set(names)
    for name in names:
        recipe = read_recipe(name)
        assert recipe.stage in name or name.startswith("tiny/")
        assert not (recipe.full and name.startswith("mac16-"))
        file = tmp_path / "resolved.toml"
        file.write_text(to_toml(recipe))
        assert read_recipe(file) == recipe
        assert tomllib.loads(to_toml(recipe)) == to_dict(recipe)
        assert sum(phase.steps for phase in recipe.plan()) == recipe.steps


def test_the_8b_recipes_have_the_published_settings() -> None:
    published = {  # peak, warm-up, tokens, frames a second, most frames
        "8b-cpt": (2e-5, 0.03, 65_536, 2.0, 768),
        "8b-sft-short": (4e-5, 0.1, 32_768, 2.0, 768),
        "8b-sft-long": (1e-5, 0.1, 262_144, 4.0, 2_048),
    }
    for name, expected in published.items():
        recipe = read_recipe(name)
        rate, data = recipe.learning_rate, recipe.data
        assert (rate.peak, rate.warmup, data.max_tokens, data.fps, data.max_frames) == expected
        assert (rate.floor, rate.shape, recipe.optimizer.weight_decay, recipe.full) == (1e-6, "cosine", 0.05, True)
    schedule = read_recipe("8b-cpt").learning_rate.schedule(1000)
    assert schedule(29) == 2e-5 and schedule(999) == pytest.approx(1e-6)


def test_a_curriculum_s_phases_take_what_they_leave_out_from_the_recipe() -> None:
    phases = [
        {"name": "short", "steps": 3},
        {"name": "long", "steps": 2, "batch": 1, "data": {"max_frames": 64, "mix": {"x": 2}}},
    ]
    raw = {
        "stage": "sft",
        "batch": 4,
        "learning_rate": {"peak": 1},
        "data": {"fps": 2.0, "max_frames": 8},
        "phases": phases,
    }
    recipe = parse_recipe(raw)
    assert recipe.steps == 5 and isinstance(recipe, SftRecipe)
    short, long = recipe.plan()
    assert (short.name, short.steps, short.batch, short.data) == ("short", 3, 4, Data(fps=2.0, max_frames=8))
    assert (long.name, long.batch, long.data) == ("long", 1, Data(fps=2.0, max_frames=64, mix={"x": 2.0}))


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("learning_rate.peak=3e-5", ("learning_rate", "peak"), 3e-5),
        ("learning_rate.shape=constant", ("learning_rate", "shape"), "constant"),
        ('weighting = "token"', ("weighting",), "token"),
        ("full=true", ("full",), True),
        ("optimizer.betas=[0.9, 0.99]", ("optimizer", "betas"), (0.9, 0.99)),
        ('optimizer.multipliers."model.visual.*"=0.1', ("optimizer", "multipliers"), {"model.visual.*": 0.1}),
        ("data.mix.short-clips=0.5", ("data", "mix"), {"short-clips": 0.5}),
        ("phases.1.data.max_frames=48", ("phases", 1, "data", "max_frames"), 48),
        ("data.fps=3", ("data", "fps"), 3.0),
    ],
)
def test_a_value_is_overridden_with_a_toml_value(override: str, path: tuple[str | int, ...], value: Any) -> None:
    found: Any = read_recipe("mac16-sft", ["seed=7", override])
    assert found.seed == 7
    for part in path:
        found = found[part] if isinstance(part, int) else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate.peek=1", "learning_rate.peek is not a key of a recipe for sft; the nearest is peak"),
        ("learing_rate.peak=1", "learing_rate is not a key of a recipe for sft; the nearest is learning_rate"),
        (
            "phases.1.data.max_frame=3",
            "phases.1.data.max_frame is not a key of a recipe for sft; the nearest is max_frames",
        ),
        ("rollout.max_tokens=3", "rollout is not a key of a recipe for sft; there are seed, "),
        ("data.fps=-1", "data.fps is -1 but must be above 0"),
        ("data.fps=inf", "data.fps is Infinity but must be a finite number"),
        ("learning_rate.warmup=3", "learning_rate.warmup is 3 but must be at most 1"),
        ("lora.dropout=1.0", "lora.dropout is 1.0 but must be below 1"),
        ("batch=0", "batch is 0 but must be at least 1"),
        ("seed=2.5", "seed is 2.5 but must be a whole number"),
        ("full=1", "full is 1 but must be true or false"),
        ('data.fps="2"', 'data.fps is "2" but must be a number'),
        ("weighting=squared", "weighting is \"squared\" but must be 'token', 'sample' or 'square'"),
        ("learning_rate=3", "learning_rate is 3 but must be a table"),
        ("lora.targets=q_proj", 'lora.targets is "q_proj" but must be a list'),
        ("learning_rate.floor=1", "learning_rate: floor is 1, above peak"),
        ("data.min_frames=20", "data: min_frames is 20, more than max_frames, 16"),
        ("phases.1.data.min_frames=65", "phase 'long': min_frames is 65, more than max_frames, 64"),
        ("steps=3", "steps is 3, but the phases have 300"),
        ("stage=rll", "stage is 'rll'; it must be one of cpt, sft, rl, distill"),
        ("phases.2.steps=1", "phases is a list of 2, counted from 0"),
        ("phases.0=1", "phases.0 is a table"),
        ("steps.x=1", "steps is not a key of a recipe|the phases|is a value|must be"),
        ("seed", "is not of the form key=value"),
        ("seed=", "has no TOML value"),
        ("seed=1\nbatch=2", "sets more than one value"),
        ("data.fps=2 frames", "has no TOML value"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_recipe("mac16-sft", [override])
    sentence = str(error.value)
    assert any(part in sentence for part in message.split("|")), sentence
    assert sentence.endswith(".") and "\n" not in sentence.replace(override, "")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "stage is None"),
        ({"stage": "rl", "steps": 1}, "learning_rate is missing"),
        ({"stage": "rl", "steps": 1, "learing_rate": {"peak": 1}}, "the nearest is learning_rate"),
        ({**LEAST, "stage": "rl", "rollout": {"rollouts": 1}}, "rollout.rollouts is 1"),
        (
            {**LEAST, "stage": "rl", "rewards": {"weights": {"iuo": 1}}},
            "rewards.weights has the key iuo, which must be",
        ),
        ({**LEAST, "stage": "rl", "rewards": {"weights": {"format": 1}}}, "form must say"),
        ({**LEAST, "stage": "rl", "rewards": {"form": "("}}, "form is no regular expression"),
        ({**LEAST, "stage": "rl", "overlong_buffer": 600}, "overlong_buffer is 600, more than rollout.max_tokens, 512"),
        ({**LEAST, "stage": "distill", "vocabulary": "sampled", "forward_share": 0.5}, "forward_share needs the whole"),
        ({**LEAST, "steps": 3, "phases": [{"name": "a", "steps": 2}]}, "steps is 3, but the phases have 2"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(raw, "x.toml")
    assert message in str(error.value) and str(error.value).startswith("x.toml: ")


def test_a_recipe_that_is_not_there_or_not_for_the_stage_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no recipe mac16-stf; the nearest built-in one is mac16-sft\."):
        read_recipe("mac16-stf")
    with pytest.raises(ConfigError, match="mac16-sft is a recipe for sft, not for rl"):
        read_recipe("mac16-sft", stage="rl")
    (tmp_path / "x.toml").write_text("steps = \n")
    with pytest.raises(ConfigError, match=r"x\.toml is not valid TOML"):
        read_recipe(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path)


def test_the_settings_of_backends_are_the_recipe_s() -> None:
    recipe = read_recipe("mac16-cpt", ["optimizer.multipliers.visual=0.1", "lora.targets=['q_proj']"])
    lora, optimizer = recipe.lora.settings(), recipe.optimizer.settings()
    assert (lora.rank, lora.alpha, lora.rank_stabilized, lora.targets) == (32, 32.0, True, ("q_proj",))
    assert (optimizer.betas, optimizer.multipliers) == ((0.9, 0.95), (("visual", 0.1),))


TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12)


@given(st.dictionaries(TEXTS, st.floats(0, 1e6), max_size=4), TEXTS, st.sampled_from(["", "a", "(a|b)+", r"\d\s\"'"]))
def test_any_text_and_number_survives_being_written(mix: dict[str, float], name: str, form: str) -> None:
    stage: Stage
    for stage, extra in (
        ("sft", {"phases": [{"name": name, "steps": 2}], "steps": 2}),
        ("rl", {"rewards": {"form": form}}),
    ):
        raw = {"stage": stage, "steps": 3, "learning_rate": {"peak": 1e-4}, "data": {"mix": mix}, **extra}
        recipe = parse_recipe(raw)
        assert parse_recipe(tomllib.loads(to_toml(recipe))) == recipe
        assert recipe.data.mix == mix and (not isinstance(recipe, RlRecipe) or recipe.rewards.form == form)


@given(st.text(string.printable, max_size=20))
def test_no_override_breaks_more_than_its_sentence(text: str) -> None:
    try:
        read_recipe("mac16-cpt", [text])
    except ConfigError as error:
        assert str(error).endswith(".")
