"""What is asked in fresh contexts: what windows and claims say is so in the film, and tells nothing by the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from agent import prompts
from agent.oracle.rows import OF_A_FILM, OF_A_LONGEST, Drawn, claims_of, windows_of
from agent.oracle.wording import absent, moved
from agent.spans import overlap
from agent.tools.ground import FINE_WINDOW, Found, Ground
from agent.tools.verify import Verify
from agent.workspace import Workspace, question_parts
from ivcore.video import Clip
from tests.agent.made_films import Made, holds, in_parts, make_films, subject_of
from train.rewards import temporal_iou
from train.toyworld.questions import NOT_THERE
from train.toyworld.score import parse_span
from train.toyworld.words import COLOURS


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    return make_films(tmp_path_factory.mktemp("films"))


of_a_film = pytest.mark.parametrize("drawn", [OF_A_FILM, OF_A_LONGEST], ids=["a film", "a longest"])


def turns_of(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """The questions of a row and their answers."""
    asked, answers = raw["messages"][::2], raw["messages"][1::2]
    assert [each["role"] for each in raw["messages"]] == ["user", "assistant"] * len(asked)
    return [(in_parts(one)[-1]["text"], other["content"]) for one, other in zip(asked, answers, strict=True)]


def looked_for(question: str) -> set[str]:
    (what,) = re.findall(r"is the (.*) visible", question)
    return set(what.split()) - {"figure"}


@of_a_film
def test_windows_say_what_is_there_and_what_is_not_and_close_ones_when_in_seconds_of_their_own(
    films: list[Made], drawn: Drawn
) -> None:
    said = {"yes": 0, "no": 0, "when": 0}
    for made in films:
        for raw in windows_of(*made.about, np.random.default_rng(0), drawn):
            times, origin = (raw["messages"][0]["content"][0][key] for key in ("times", "origin"))
            for question, answer in turns_of(raw):
                words, span = looked_for(question), parse_span(answer)
                meant = [each for each in made.script.figures if words <= {*each.name}]
                visible = [each for each in meant if any(map(each.visible, times))]
                said["when" if span else answer] += 1
                if span is None:
                    assert bool(visible) == (answer == "yes") and question.startswith("Yes or no: ")
                    continue
                (figure,) = visible
                seen = span[0] + origin, span[1] + origin
                assert overlap(seen, figure.span) > 0.9 * (seen[1] - seen[0]) - 0.1  # a tenth is lost to rounding
                assert span[0] >= 0 and seen[1] <= times[-1] + 1.2 and times[-1] - times[0] < FINE_WINDOW
    assert min(said.values()) > 50 and 0.8 < said["yes"] / said["no"] < 1.25


@of_a_film
def test_whether_something_is_there_does_not_follow_from_the_words(films: list[Made], drawn: Drawn) -> None:
    """Colours, shapes and whole names are as often there as not, in long windows and in short ones."""
    said: dict[tuple[bool, str], list[bool]] = {}
    for made in films:
        for raw in (raw for seed in range(3) for raw in windows_of(*made.about, np.random.default_rng(seed), drawn)):
            times = raw["messages"][0]["content"][0]["times"]
            for question, answer in turns_of(raw):
                if answer in prompts.YES_NO:
                    words = looked_for(question)
                    form = "name" if len(words) > 1 else "colour" if words <= set(COLOURS) else "shape"
                    said.setdefault((times[-1] - times[0] < FINE_WINDOW, form), []).append(answer == "yes")
    assert len(said) == 6
    for form, answers in said.items():
        assert len(answers) > 20 and 0.4 < np.mean(answers) < 0.6, (form, len(answers), np.mean(answers))


def test_of_one_answer_the_next_does_not_follow_and_the_key_is_asked_about_where_it_is(films: list[Made]) -> None:
    for made in films:
        key = made.script.keys[0]
        for raw in windows_of(*made.about, np.random.default_rng(0)):
            there = [looked_for(question) for question, answer in turns_of(raw) if answer == "yes"]
            assert len(set(map(frozenset, there))) == len(there)
            if any(map(key.visible, raw["messages"][0]["content"][0]["times"])) and not absent(made.question):
                assert any(words <= {*key.name} for words in there)


@of_a_film
def test_windows_and_claims_are_what_the_tools_ask(
    films: list[Made], drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, Any]]] = []

    class Undecided:
        def log_likelihoods(self, answers: Sequence[str], *, whole: bool = True) -> np.ndarray:
            return np.log(np.full(len(answers), 0.4))

        def answer(self, most: int) -> Iterator[str]:
            return iter(("1.0 to 2.0",))

        def read(self, messages: Any) -> None: ...

    def ask_nobody(
        self: Workspace, clip: Clip, question: str, *, quoted: Sequence[str] = (), origin: float = 0.0
    ) -> Undecided:
        content = question_parts(clip, question, quoted, origin)
        asked.append([{**content[0], "video": str(self.video)}, *content[1:]])
        return Undecided()

    def said(raw: dict[str, Any], made: Made) -> list[dict[str, Any]]:
        video, *rest = raw["messages"][0]["content"]
        return [{**video, "video": str(made.folder / video["video"])}, *rest]

    monkeypatch.setattr(Workspace, "asked", ask_nobody)
    monkeypatch.setattr("agent.tools.ground.CANDIDATES", 99)
    monkeypatch.setattr("agent.oracle.rows.moved", lambda span, rng: span)
    for made in (made for made in films if made.kind in ("rare", "said")):
        monkeypatch.setattr(made.workspace, "memo", {})
        whole = (0.0, made.workspace.duration)
        for raw in windows_of(*made.about, np.random.default_rng(0), drawn):
            what = re.findall(r"is the (.*) visible", raw["messages"][0]["content"][-1]["text"])[0]
            Ground(made.workspace).find(what, whole)
            for figure in made.script.figures if drawn.matches else ():
                Ground(made.workspace)._confirmed(what, Found(figure.span, 0.9, whole), 1)
            assert said(raw, made) in asked
        for raw in claims_of(*made.about, np.random.default_rng(0), drawn):
            first = raw["messages"][0]["content"][-1]["text"].splitlines()[-1]
            claim, question = (claim_of(first), "") if claim_of(first) else ("It is so.", first)
            for span in [each.span for each in (*made.script.figures, *made.script.lines)]:
                Verify(made.workspace).check(claim, [span], question)
            assert said(raw, made) in asked


def judged(raw: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """The claims of a row, the verdicts, and what is answered before."""
    before = None
    for question, said in turns_of(raw):
        if claim := claim_of(question):
            yield claim, said, before
            before = None
        else:
            before = said


def claim_of(question: str) -> str:
    return question.partition("Claim: ")[2]


def test_claims_about_spans_are_so_where_the_figure_is_there_for_just_these_seconds(films: list[Made]) -> None:
    verdicts = []
    for made in (made for made in films if not made.question.read):
        for raw in (raw for seed in range(6) for raw in claims_of(*made.about, np.random.default_rng(seed))):
            for claim, verdict, _ in judged(raw):
                if (said := re.search(r"visible from ([0-9.]+) to ([0-9.]+)\.", claim)) is None:
                    continue
                verdicts.append(verdict)
                start, end = float(said[1]), float(said[2])
                meant = [each for each in made.script.figures if subject_of(claim) <= {*each.name}]
                shared = max(temporal_iou((start, end), each.span) for each in meant)
                assert shared > 0.55 if verdict == "support" else shared < 0.45
                times = raw["messages"][0]["content"][0]["times"]
                assert times[0] >= start - 1.1 and times[-1] <= end + 1.1
    assert verdicts.count("support") > 20 and verdicts.count("contradict") > 20


def test_a_supported_claim_is_so_a_contradicted_one_is_not_and_an_unclear_one_is_about_nothing_there(
    films: list[Made],
) -> None:
    counted: dict[str, int] = {}
    for made in (made for made in films if not made.question.read):
        for raw in (raw for seed in range(3) for raw in claims_of(*made.about, np.random.default_rng(seed))):
            times = raw["messages"][0]["content"][0]["times"]
            seen = [each for each in made.script.figures if any(map(each.visible, times))]
            for claim, verdict, said in judged(raw):
                if is_of_a_line(claim):
                    continue
                assert said is None or (said == NOT_THERE) == (verdict == "unclear")
                counted[verdict] = counted.get(verdict, 0) + 1
                about = [each for each in seen if subject_of(claim) <= {*each.name}]
                assert len(about) == (0 if verdict == "unclear" else 1)
                if " visible from " not in claim:
                    assert [holds(claim, each) for each in about] == [verdict == "support"] * len(about)
                    assert said is None or all(said in {*each.name, each.direction} for each in about)
    assert min(counted.values()) > 10 and len(counted) == 3


def is_of_a_line(claim: str) -> bool:
    return any(words in claim for words in (" likes ", " lives in ", " is called "))


def test_claims_about_lines_follow_the_subtitles(films: list[Made]) -> None:
    made = next(made for made in films if made.kind == "said")
    said = {line.text for line in made.script.lines}
    verdicts: list[str] = []
    at_first = 0
    for raw in (raw for seed in range(6) for raw in claims_of(*made.about, np.random.default_rng(seed))):
        quoted = "\n".join(raw["messages"][0]["content"][-1]["text"].splitlines()[:-1])
        for claim, verdict, first in judged(raw):
            if not is_of_a_line(claim):
                continue
            assert {"support": claim in quoted, "contradict": claim not in said, "unclear": claim not in quoted}[
                verdict
            ]
            assert first is None or (first != NOT_THERE) == (verdict != "unclear") == (f"{first}." in quoted)
            at_first += first is not None
            verdicts.append(verdict)
    assert set(verdicts) == {"support", "contradict", "unclear"} and 0 < at_first < len(verdicts)


@pytest.mark.parametrize("span", [(0.0, 0.8), (1.0, 2.0), (30.0, 33.2), (58.0, 60.0)])
def test_a_moved_span_is_another(span: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        other = moved(span, rng)
        assert 0 <= other[0] < other[1] and temporal_iou(span, other) < 0.5


@pytest.mark.parametrize("described", ["red circle", "a red circle", "The red circle.", " an red circle"])
def test_what_is_looked_for_is_asked_about_with_or_without_its_article(described: str) -> None:
    assert prompts.is_visible(described) == "Yes or no: is the red circle visible?"
    assert prompts.when(described).endswith(": when is the red circle visible?")
