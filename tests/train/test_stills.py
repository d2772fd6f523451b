"""Pictures, moves, words and pairs: what a row says is what its picture or its list shows, and each of it once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.train.conversations import turns
from train.row import parse_row
from train.toyworld import echoes, moves, pairs
from train.toyworld.compose import MAX_COUNT, still
from train.toyworld.render import frames
from train.toyworld.script import SHORT_SECONDS, SIZE, Script
from train.toyworld.stills import description, talk, write_stills
from train.toyworld.words import COLOURS, FACTS, SHAPES

any_seed = st.integers(0, 100_000)


@settings(max_examples=40)
@given(seed=any_seed, time=st.floats(0, SHORT_SECONDS - 0.01))
def test_a_still_shows_every_figure_at_any_time_in_a_quarter_of_its_own(seed: int, time: float) -> None:
    script = still(seed)
    assert 2 <= len(script.figures) <= MAX_COUNT
    assert len({each.name.shape for each in script.figures}) == len(script.figures)
    assert len({each.name.colour for each in script.figures}) == len(script.figures)
    (picture,) = frames(script, np.array([time])).astype(int)
    half, found = SIZE // 2, {}
    for number in range(4):
        quarter = picture[half * (number // 2) :, half * (number % 2) :][:half, :half].reshape(-1, 3)
        for name, colour in COLOURS.items():
            if (np.abs(quarter - colour).max(axis=1) < 12).sum() > 20:
                found[number] = name
    assert sorted(found.values()) == sorted(each.name.colour for each in script.figures)


@settings(max_examples=80)
@given(seed=any_seed)
def test_a_still_s_description_pairs_every_shape_with_its_colour_in_the_order_asked_for(seed: int) -> None:
    script = still(seed)
    ((asked, said),) = turns(description(script, "picture.png"))
    pairs = [tuple(each.split(" ")) for each in said.split("; ")]
    by_shape = asked == "Describe the figures by their shapes."
    assert all((one in SHAPES, other in COLOURS) == (by_shape, by_shape) for one, other in pairs)
    assert sorted(pair if by_shape else pair[::-1] for pair in pairs) == names(script)


@settings(max_examples=80)
@given(seed=any_seed)
def test_a_talk_about_a_still_asks_for_every_figure_once(seed: int) -> None:
    script, found = still(seed), []
    for asked, said in turns(talk(script, "picture.png")):
        (named,) = [word for word in re.findall(r"\w+", asked) if word in (*SHAPES, *COLOURS)]
        found.append((named, said) if named in SHAPES else (said, named))
    assert sorted(found) == names(script)


def names(script: Script) -> list[tuple[str, str]]:
    return sorted((each.name.shape, each.name.colour) for each in script.figures)


@settings(max_examples=80)
@given(seed=any_seed)
def test_pairs_are_repeated_and_asked_about_each_once_and_no_key_or_value_is_there_twice(seed: int) -> None:
    rows = pairs.repetition(seed), pairs.talk(seed)
    (listed,) = {row["messages"][0]["content"].partition("\n\n")[0] for row in rows}
    ((_, said),) = turns(rows[0])
    assert sorted(listed.split("\n")) == sorted(said.split("\n"))
    assert sorted(listed.split("\n")) == sorted(f"{asked.rstrip('?')}: {value}" for asked, value in turns(rows[1]))
    keys, values = zip(*(pair.split(": ") for pair in listed.split("\n")), strict=True)
    assert len(set(keys)) == len(set(values)) == len(keys) >= 2
    assert any(set(values) <= set(fact.values) for fact in FACTS.values())


@settings(max_examples=40)
@given(seed=any_seed)
def test_every_figure_s_way_is_told_and_asked_for_once_and_the_clip_shows_it(seed: int) -> None:
    script = still(seed)
    ((_, said),) = turns(moves.description(script))
    assert sorted(said.split("; ")) == sorted(f"{each.name} {each.direction}" for each in script.figures)
    asked = turns(moves.talk(script))
    assert sorted(answer for _, answer in asked) == sorted(each.direction for each in script.figures)
    assert all(sum(str(each.name) in text for text, _ in asked) == 1 for each in script.figures)
    for each in script.figures:
        (x0, y0), (x1, y1) = each.centre(np.array([0.0, SHORT_SECONDS - 0.1]))
        along = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
        assert max(along, key=along.__getitem__) == each.direction and along[each.direction] > 5


@settings(max_examples=80)
@given(seed=any_seed)
def test_words_and_times_are_said_again_in_their_own_order(seed: int) -> None:
    row = echoes.echo(seed)
    ((_, said),) = turns(row)
    assert row["messages"][0]["content"] == f"Repeat: {said}"
    things = re.split(r"[,;]? (?!to )(?<! to )|\n", said)
    assert echoes.FEWEST <= len(things) <= 2 * echoes.MOST
    assert all(re.fullmatch(r"[A-Za-z]+|\d+\.\d( to \d+\.\d)?", thing) for thing in things)


def test_orders_and_ways_differ_from_row_to_row() -> None:
    described = [turns(description(still(seed), "p.png"))[0][0] for seed in range(200)]
    assert 0.55 < np.mean(["shapes" in asked for asked in described]) < 0.85
    repeated = [pairs.repetition(seed)["messages"] for seed in range(200)]
    same = [one["content"].partition("\n\n")[0] == other["content"] for one, other in repeated]
    assert 0.0 < np.mean(same) < 0.4


def test_rows_and_pictures_are_written_for_training_and_kept(tmp_path: Path) -> None:
    stills, moved, things, listed = (
        write_stills(tmp_path / "stills", "train", 0, 3),
        moves.write_moves(tmp_path / "moves", "train", 0, 3),
        echoes.write_echoes(tmp_path / "echoes", "train", 0, 3),
        pairs.write_pairs(tmp_path / "pairs", "train", 0, 3),
    )
    rows = [json.loads(line) for line in stills.read_text().splitlines()]
    parsed = [parse_row(each, tmp_path / "stills", "sft") for each in rows]
    paths = [Path(path) for each in parsed for _, path in each.media]
    assert len(paths) == 3
    for path in paths:
        assert np.asarray(Image.open(path)).shape == (SIZE, SIZE, 3)
    for file in (moved, things, listed, *(each.with_name("talks.jsonl") for each in (stills, moved, listed))):
        assert [parse_row(json.loads(line), file.parent, "sft").id for line in file.read_text().splitlines()]
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert write_stills(tmp_path / "stills", "train", 0, 3) == stills
    assert before == {path: path.stat().st_mtime_ns for path in paths}
