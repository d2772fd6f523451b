"""Pictures and pairs: what a row says is what its picture or its list shows, and each of it once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train.row import parse_row
from train.toyworld.compose import MAX_COUNT, still
from train.toyworld.pairs import row as pairs_row
from train.toyworld.pairs import write_pairs
from train.toyworld.render import frames
from train.toyworld.script import SHORT_SECONDS, SIZE
from train.toyworld.stills import row, write_stills
from train.toyworld.words import COLOURS, FACTS, SHAPES

any_seed = st.integers(0, 100_000)


@settings(max_examples=40, deadline=None)
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


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer), the question without picture or list."""
    asked = [message["content"] for message in row["messages"] if message["role"] == "user"]
    asked = [content if isinstance(content, str) else content[-1]["text"] for content in asked]
    answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return [(text.rpartition("\n\n")[2], answer) for text, answer in zip(asked, answers, strict=True)]


@settings(max_examples=80, deadline=None)
@given(seed=any_seed)
def test_a_still_tells_every_figure_once_and_the_first_word_of_it_tells_which(seed: int) -> None:
    script = still(seed)
    names = {(each.name.shape, each.name.colour) for each in script.figures}
    told = turns(row(script, "picture.png"))
    found = []
    if told[0][0].startswith("Describe"):
        ((asked, said),) = told
        pairs = [tuple(each.split(" ")) for each in said.split("; ")]
        by_shape = asked == "Describe the figures by their shapes."
        assert all((one in SHAPES, other in COLOURS) == (by_shape, by_shape) for one, other in pairs)
        found = [pair if by_shape else pair[::-1] for pair in pairs]
    else:
        for asked, said in told:
            (named,) = [word for word in re.findall(r"\w+", asked) if word in (*SHAPES, *COLOURS)]
            found.append((named, said) if named in SHAPES else (said, named))
    assert set(found) == names and len(found) == len(names)


@settings(max_examples=80, deadline=None)
@given(seed=any_seed)
def test_pairs_are_repeated_or_asked_about_each_once_and_no_key_or_value_is_there_twice(seed: int) -> None:
    row = pairs_row(seed)
    pairs = row["messages"][0]["content"].partition("\n\n")[0].split("\n")
    told = turns(row)
    if told[0][0].startswith("Repeat"):
        assert sorted(pairs) == sorted(told[0][1].split("\n"))
    else:
        assert sorted(pairs) == sorted(f"{asked.rstrip('?')}: {said}" for asked, said in told)
    keys, values = zip(*(pair.split(": ") for pair in pairs), strict=True)
    assert len(set(keys)) == len(set(values)) == len(pairs) >= 2
    assert any(set(values) <= set(fact.values) for fact in FACTS.values())


def test_orders_and_ways_differ_from_row_to_row() -> None:
    stills = [turns(row(still(seed), "p.png")) for seed in range(300)]
    described = [told[0][0] for told in stills if told[0][0].startswith("Describe")]
    assert 120 < len(described) < 180
    assert 0.55 < np.mean(["shapes" in asked for asked in described]) < 0.85
    repeated = [pairs_row(seed)["messages"] for seed in range(300) if len(pairs_row(seed)["messages"]) == 2]
    same = [one["content"].partition("\n\n")[0] == other["content"] for one, other in repeated]
    assert 0.0 < np.mean(same) < 0.4


def test_rows_and_pictures_are_written_for_training_and_kept(tmp_path: Path) -> None:
    stills, pairs = write_stills(tmp_path / "stills", "train", 0, 3), write_pairs(tmp_path / "pairs", "train", 0, 3)
    rows = [json.loads(line) for line in stills.read_text().splitlines()]
    parsed = [parse_row(each, tmp_path / "stills", "sft") for each in rows]
    paths = [Path(path) for each in parsed for _, path in each.media]
    assert len(paths) == 3
    for path in paths:
        assert np.asarray(Image.open(path)).shape == (SIZE, SIZE, 3)
    assert all(parse_row(json.loads(line), tmp_path / "pairs", "sft") for line in pairs.read_text().splitlines())
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert write_stills(tmp_path / "stills", "train", 0, 3) == stills
    assert before == {path: path.stat().st_mtime_ns for path in paths}
