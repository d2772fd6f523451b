"""Scenes of shots whose colours are known: what is alike and near is one scene, with everything between."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.scene_grouping import WINDOW, Colours, Span, group

COLOURS = ((0, 0, 90), (0, 90, 0), (90, 0, 0), (0, 90, 90), (200, 200, 200))
PLACES = {letter: np.full((4, 4, 3), colour, np.uint8) for letter, colour in zip("ABCDE", COLOURS, strict=True)}


def film(places: str, seconds: Sequence[float]) -> tuple[list[Span], Colours]:
    """Shots of places, a letter each, and their colours."""
    edges = np.concatenate(([0.0], np.cumsum(seconds)))
    colours = Colours()
    shots = [(float(start), float(end)) for start, end in pairwise(edges)]
    for letter, (start, end) in zip(places, shots, strict=True):
        for time in np.arange(start, end - 1e-6, 0.25):
            colours.add(float(time), PLACES[letter])
    return shots, colours


def scenes_of(places: str, seconds: float = 2.0) -> str:
    """The places of a film of equal shots, a bar between scenes."""
    shots, colours = film(places, [seconds] * len(places))
    rest = iter(places)
    return "|".join("".join(next(rest) for _ in scene) for scene in group(shots, colours))


@pytest.mark.parametrize(
    "scenes",
    ["A", "A|B|C", "AA|B", "ABA|C", "ABAB|CDC|E", "ABCA|D", "ABACBC|D", "A|BCB|D", "ABBA"],
)
def test_links_that_overlap_make_a_scene(scenes: str) -> None:
    assert scenes_of(scenes.replace("|", "")) == scenes


def test_a_place_that_comes_again_later_is_another_scene() -> None:
    assert scenes_of("ABA", WINDOW) == "ABA"
    assert scenes_of("ABA", WINDOW + 1) == "A|B|A"
    assert scenes_of("AA", 10 * WINDOW) == "AA"


def test_pictures_are_alike_by_the_share_of_their_colours() -> None:
    """Of ten rows as many are of the first shot's colour as the case says."""
    for rows, together in ((6, False), (8, True)):
        colours = Colours()
        first = np.zeros((10, 8, 3), np.uint8)
        other = first.copy()
        other[rows:] = 255
        colours.add(0.0, first)
        colours.add(1.0, other)
        assert len(group([(0.0, 1.0), (1.0, 2.0)], colours)) == (1 if together else 2)


def test_a_shot_without_a_picture_is_alike_to_nothing() -> None:
    colours = Colours()
    colours.add(1.0, PLACES["A"])
    assert len(group([(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)], colours)) == 3


@given(st.text("ABCDE", min_size=1, max_size=12), st.data())
def test_scenes_are_the_shots_in_order_and_no_link_leaves_one(places: str, data: st.DataObject) -> None:
    lengths = st.lists(st.floats(0.6, 12), min_size=len(places), max_size=len(places))
    shots, colours = film(places, data.draw(lengths))
    found = group(shots, colours)
    assert [shot for scene in found for shot in scene] == shots and all(found)
    scene_of = {shot: number for number, scene in enumerate(found) for shot in scene}
    linked = {
        (one, other)
        for one in range(len(shots))
        for other in range(one + 1, len(shots))
        if places[one] == places[other] and shots[other][0] - shots[one][1] <= WINDOW
    }
    assert all(scene_of[shots[one]] == scene_of[shots[other]] for one, other in linked)
    # Between two scenes nothing is linked, and within one no cut is without a link across.
    for cut in range(1, len(shots)):
        across = any(one < cut <= other for one, other in linked)
        assert across == (scene_of[shots[cut - 1]] == scene_of[shots[cut]])
