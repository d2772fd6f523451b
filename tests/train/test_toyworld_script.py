"""What scripts promise: reproducible, split by seed, every event inside its clip, and keys told apart from fillers."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.toyworld.compose import KINDS, RARE_SECONDS, make_script, what_is_asked
from train.toyworld.questions import ask
from train.toyworld.script import SIZE, Script, seeds, split_of

DURATIONS = (4.0, 16.0, 23.7, 90.0)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, 500), st.integers(0, 10**6), st.integers(0, 500))
def test_train_and_held_out_seeds_never_meet(first: int, count: int, other_first: int, other_count: int) -> None:
    train, heldout = seeds("train", first, count), seeds("heldout", other_first, other_count)
    assert not set(train) & set(heldout)
    assert (len(train), len(heldout)) == (count, other_count)
    assert {split_of(seed) for seed in train} <= {"train"}
    assert {split_of(seed) for seed in heldout} <= {"heldout"}
    assert set(seeds("train", first, count)) | set(seeds("train", first + count, 3)) == set(
        seeds("train", first, count + 3)
    )


def test_an_unknown_split_has_no_seeds() -> None:
    with pytest.raises(ValueError, match="'test'"):
        seeds("test", 0, 1)  # type: ignore[arg-type]


def test_seeds_of_both_splits_make_different_clips() -> None:
    numbers = [*seeds("train", 0, 200), *seeds("heldout", 0, 200)]
    paths = {figure.path for seed in numbers for figure in make_script(seed, "colour").figures}
    assert len(paths) == len(numbers)


@pytest.mark.parametrize("duration", DURATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_always_makes_the_same_script_and_question(kind: str, duration: float) -> None:
    script = make_script(7, kind, duration)
    assert script == make_script(7, kind, duration)
    assert ask(script) == ask(make_script(7, kind, duration))
    assert script.figures != make_script(9, kind, duration).figures


def scripts(kind: str) -> list[Script]:
    return [make_script(seed, kind, duration) for seed in range(25) for duration in DURATIONS]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_happens_within_its_scene_and_its_picture(kind: str) -> None:
    for script in scripts(kind):
        bounds = [scene.span[0] for scene in script.scenes] + [script.duration]
        assert bounds[0] == 0 and [scene.span for scene in script.scenes] == list(pairwise(bounds))
        assert len(script.frame_times()) == round(10 * script.duration)
        for start, end in [figure.span for figure in script.figures] + [line.span for line in script.lines]:
            assert start < end and any(scene.span[0] <= start and end <= scene.span[1] for scene in script.scenes)
        for figure in script.figures:
            assert all(figure.radius <= at <= SIZE - figure.radius for point in figure.path for at in point)
            (x, y), (to_x, to_y) = figure.path
            moves = {"left": to_x < x, "right": to_x > x, "up": to_y < y, "down": to_y > y}
            assert [way for way, moved in moves.items() if moved] == [figure.direction]


@pytest.mark.parametrize("kind", KINDS)
def test_subtitles_never_overlap_and_never_contradict_each_other(kind: str) -> None:
    for script in scripts(kind):
        assert script.lines
        for one, other in combinations(script.lines, 2):
            assert one.span[1] <= other.span[0]
            if (one.name, one.fact) == (other.name, other.fact):
                assert one.value == other.value


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("count", "absent")])
def test_a_key_is_the_only_figure_of_its_name(kind: str) -> None:
    for script in scripts(kind):
        names = Counter(figure.name for figure in script.figures)
        assert script.keys and all(names[key.name] == 1 for key in script.keys)
        assert len({key.name.colour for key in script.keys}) == len(script.keys)


@pytest.mark.parametrize("kind", ["colour", "shape", "rare"])
def test_a_figure_named_by_one_property_is_alone_with_it_and_not_with_the_one_that_is_asked(kind: str) -> None:
    shared = 0
    for script in scripts(kind):
        (key,) = script.keys
        asked = what_is_asked(script.seed, kind)
        others = [figure.name for figure in script.figures if figure is not key]
        if asked == "colour":
            assert key.name.shape not in [name.shape for name in others]
            shared += key.name.colour in [name.colour for name in others]
        elif asked == "shape":
            assert key.name.colour not in [name.colour for name in others]
            shared += key.name.shape in [name.shape for name in others]
    assert shared > 10


def test_what_is_absent_is_neither_seen_nor_spoken_of() -> None:
    for script in scripts("absent"):
        (key,) = script.keys
        assert script.figures
        assert all(key.name.colour != figure.name.colour for figure in script.figures)
        assert all(key.name.shape != figure.name.shape for figure in script.figures)
        assert key.name not in [line.name for line in script.lines]


def test_a_ten_minute_film_has_many_scenes_and_one_event_of_three_seconds() -> None:
    script = make_script(5, "rare", 600.0)
    (key,) = script.keys
    assert len(script.scenes) == 50 and len(script.figures) > 100
    assert key.span[1] - key.span[0] == pytest.approx(RARE_SECONDS)
    assert min(scene.span[1] - scene.span[0] for scene in script.scenes) >= 8


def test_the_event_of_a_film_may_be_anywhere_in_it() -> None:
    tenths = Counter(int(make_script(seed, "rare", 600.0).keys[0].span[0] // 60) for seed in range(60))
    assert len(tenths) >= 9 and max(tenths.values()) < 20


@pytest.mark.parametrize(("kind", "duration"), [("colour", 5.0), ("colour", 12.0), ("taste", 4.0)])
def test_a_script_that_cannot_be_is_refused(kind: str, duration: float) -> None:
    with pytest.raises(ValueError, match=kind):
        make_script(0, kind, duration)
