"""Rewards: what an answer names, in the forms that models write, and what it cannot gain by naming everything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivcore.errors import ConfigError
from train.rewards import (
    Judge,
    choice_reward,
    final_answer,
    format_reward,
    iou_reward,
    named_choices,
    parse_span,
    temporal_iou,
)
from train.row import Row, parse_row
from train.toyworld.compose import KINDS, make_script
from train.toyworld.dataset import row as toy_row
from train.toyworld.questions import ask

CHOICES = ("red", "a blue ball", "dark red", "2")


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("B", "B"), ("b", "B"), ("(b)", "B"), ("B.", "B"), ("B)", "B"), ("**B**", "B"), (" B\n", "B"),
        ("option c", "C"),
        ("Answer: B.", "B"), ("answer: b", "B"), ("The answer is B", "B"),
        ("The correct answer is: (C) dark red.", "C"),
        ("B. a blue ball", "B"), ("D: 2", "D"), ("I think B", "B"), ("A because the ball is red", "A"),
        ("A is right.", "A"),
        ("B, as the ball is not red", "B"), ("<answer>D</answer>", "D"), ("So it is \\boxed{D}.", "D"),
        ("<think>A or B? Not A.</think>\nC", "C"), ("A blue ball", "B"), ("a blue ball.", "B"), ("It is red.", "A"),
        ("It is dark red", "C"), ("2", "D"), ("There are 2 of them", "D"),
        # several
        ("A or B", "AB"), ("A, B", "AB"), ("A and B", "AB"), ("A B C D", "ABCD"), ("Answer: B or C", "BC"),
        ("A/B", "AB"),
        ("B. dark red", "BC"), ("red and dark red", "AC"), ("<answer>A</answer> <answer>B</answer>", "AB"),
        # none
        ("", ""), ("E", ""), ("12", ""), ("2.5", ""), ("redder", ""), ("<think>It is B", ""), ("I don't know", ""),
        ("A ball in a hall", ""), ("C'est la vie", ""), ("BC", ""),
    ],
)  # fmt: skip
def test_the_choices_that_an_answer_names(answer: str, named: str) -> None:
    assert named_choices(answer, CHOICES) == {"ABCD".index(letter) for letter in named}
    for right, letter in enumerate("ABCD"):
        reward = choice_reward(answer, CHOICES, right)
        assert reward.value == float(named == letter) and reward.reason


@given(st.permutations(["circle", "square", "triangle", "star"]), st.integers(0, 3), st.data())
def test_any_usual_form_of_the_right_choice_is_right_and_of_a_wrong_one_wrong(
    choices: Sequence[str], index: int, data: st.DataObject
) -> None:
    letter, text = "ABCD"[index], choices[index]
    forms = [letter, f"{letter}.", f"({letter})", f"Answer: {letter}", f"{letter}. {text}", text, f"It is a {text}."]
    form = data.draw(st.sampled_from(forms))
    for right in range(4):
        assert choice_reward(form, choices, right).value == float(right == index)
    other = data.draw(st.sampled_from([each for each in range(4) if each != index]))
    for both in (f"{form} or {'ABCD'[other]}", f"{text} or {choices[other]}", f"{letter} {'ABCD'[other]}"):
        assert choice_reward(both, choices, index).value == 0


@pytest.mark.parametrize(
    "text",
    [
        "1.5 to 3.0", "1.5 to 3", "1.50 to 3.00.", "from 1.5s to 3s", "1.5s-3s", "1.5 - 3.0", "1.5s–3s",
        "1.5 — 3.0 seconds",
        "00:01.5-00:03", "0:01.5 to 0:03", "00:00:01.5 --> 00:00:03", "00:01.5 → 00:03", "[1.5, 3.0]", "(1.5, 3)",
        "[1.5; 3]",
        "between 1.5 and 3 seconds.",
        "start: 1.5, end: 3.0", '{"start": 1.5, "end": 3.0}', "It starts at 1.5 s and ends at 3 s.",
        "start_time: 1.5s end_time: 3s", "<1.5 seconds> to <3.0 seconds>", "**1.5** to **3.0**", "1.5 sec until 3 secs",
        "The event happens in 1.5 - 3.0 seconds.", "At 2 frames a second, it is seen from 1.5 to 3.0 s of 12.",
        "<think>Perhaps 1 to 2.</think>1.5 to 3.0", "<think>1 to 2</think><answer>1.5 to 3.0</answer> or 5 to 6",
        "1.5 to 3.0, that is, 00:01.5-00:03",
    ],
)  # fmt: skip
def test_a_span_is_read_however_it_is_written(text: str) -> None:
    assert parse_span(text) == (1.5, 3.0)
    assert iou_reward(text, (1.5, 3.0)).value == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "", "never", "1.5", "1.5 to", "to 3.0", "3.0 to 1.5", "2 to 2", "1 to 2 and 3 to 4", "1 to 2 to 3", "1-2-3",
        "-1 to 3",
        "1 - -3", "1.5.2 to 3", "1 to 3.0.1", "00:75-01:30", "0:90:00 to 2:00:00", "nan to 3", "inf to inf",
        "1e3 to 2e3",
        "1, 3", "2 balls, 3 seconds", "1% to 3%", "a1 to 3b", "start: -1, end: 3", "<think>1.5 to 3.0",
        "1.5 minutes to 3 minutes",
        "9" * 400 + " to " + "9" * 401,
    ],
)  # fmt: skip
def test_a_malformed_span_or_several_are_worth_nothing(text: str) -> None:
    assert parse_span(text) is None
    assert iou_reward(text, (1.0, 3.0)).value == 0.0


TENTHS = st.integers(0, 3_000)


@given(TENTHS, TENTHS, st.sampled_from(["{} to {}", "from {}s to {}s", "[{}, {}]", "{}-{}", "between {} and {} s"]))
def test_a_written_span_is_read_back(one: int, other: int, form: str) -> None:
    start, end = sorted((one, other))
    clock = f"{start // 600:02}:{start % 600 / 10:04.1f}-{end // 600:02}:{end % 600 / 10:04.1f}"
    for text in (form.format(start / 10, end / 10), clock):
        expected = (start / 10, end / 10) if start < end else None
        assert parse_span(text) == (None if expected is None else pytest.approx(expected))


@given(st.lists(TENTHS, min_size=4, max_size=4, unique=True))
def test_the_iou_is_the_share_of_tenths_of_a_second(points: list[int]) -> None:
    one, other = sorted(points[:2]), sorted(points[2:])
    inside, outside = set(range(*one)), set(range(*other))
    expected = len(inside & outside) / len(inside | outside)
    spans = [(one[0] / 10, one[1] / 10), (other[0] / 10, other[1] / 10)]
    assert temporal_iou(spans[0], spans[1]) == pytest.approx(expected, abs=1e-9) == temporal_iou(spans[1], spans[0])


@given(st.text("0123456789 .:-to[](),<>answerthink/\\{}AB'\"", max_size=60))
def test_no_text_breaks_a_reward(text: str) -> None:
    assert 0 <= iou_reward(text, (1.0, 2.0)).value <= 1
    assert choice_reward(text, CHOICES, 1).value in (0, 1)


@pytest.mark.parametrize(
    "part", ["1", "1 ", "1.5 to ", "1:", "between 1 ", "start ", "<answer>", "<think>", "'", "\\boxed{", "answer "]
)
def test_a_long_text_is_read_in_linear_time(part: str) -> None:
    # Quadratic, one of these would take minutes: it is the run that ends which tells.
    text = part * 100_000
    parse_span(text)
    named_choices(text, CHOICES)


def test_the_answer_is_what_stands_after_the_thoughts() -> None:
    assert final_answer("<think>a</think> b ") == "b"
    assert final_answer("b <think>cut off") == "b"
    assert final_answer("<think>a</think>x<answer> b </answer>y").strip() == "b"


FORM = r"<think>.*</think>\s*<answer>.*</answer>"


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("<think>a\nb</think>\n<answer>B</answer>", 1), ("<think></think><answer></answer>\n", 1), ("B", 0),
        ("<think>a</think><answer>B</answer> and more", 0),
    ],
)  # fmt: skip
def test_the_format_is_that_of_the_whole_answer(answer: str, value: float) -> None:
    assert format_reward(answer, re.compile(FORM, re.DOTALL)).value == value


def row(**fields: object) -> Row:
    return parse_row({"messages": [{"role": "user", "content": "?"}], **fields}, Path(), "distill")


def test_a_judge_weighs_what_a_row_has_the_means_for(tmp_path: Path) -> None:
    judge = Judge({"choice": 2.0, "iou": 1.0, "format": 0.5}, FORM)
    choice = row(choices=["x", "y"], answer=1)
    score = judge(choice, "<think>?</think><answer>B</answer>")
    assert score.total == 2.5 and {kind: reward.value for kind, reward in score.rewards.items()} == {
        "choice": 1,
        "format": 1,
    }
    assert judge(choice, "B").total == 2.0 and judge(choice, "A").total == 0.0
    (tmp_path / "a.mp4").touch()
    video = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "When?"}]}]
    span = parse_row({"messages": video, "span": [1, 3]}, tmp_path, "rl")
    assert judge(span, "2 to 3").total == 0.5 and set(judge(span, "").rewards) == {"iou", "format"}
    assert Judge({"choice": 1.0})(span, "2 to 3").rewards == {}


def test_a_form_that_is_no_regular_expression_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="is no regular expression"):
        Judge({"format": 1.0}, "(")


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_of_the_toy_world_earn_the_whole_reward(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.mp4").touch()
    judge = Judge({"choice": 1.0, "iou": 1.0})
    for seed in range(10):
        script = make_script(seed, kind, 4.0)
        made = parse_row(toy_row(script, ask(script), "a.mp4"), tmp_path, "sft")
        answer = made.messages[-1]["content"]
        if made.span is not None or made.choices is not None:
            assert judge(made, answer).total == pytest.approx(1.0, abs=0.05), answer  # spans are written in tenths
        for wrong in set(made.choices or ()) - {answer}:
            assert judge(made, wrong).total == 0.0
