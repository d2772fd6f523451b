"""Rewards that are computed, not judged: the right choice, the overlap of a span, the form of an answer.

- Each is a number and the reason for it; what cannot be read is worth 0.
- An answer that names several choices, or several spans, is worth 0 too: naming them all would always be right.
- What stands between <think> and </think> is no answer; an answer in <answer></answer> or \\boxed{} is only that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ivcore.errors import ConfigError
from train.row import Row, Span

RewardKind = Literal["choice", "iou", "format"]


@dataclass(frozen=True)
class Reward:
    """value: 0 to 1. reason: a few words for logs."""

    value: float
    reason: str


@dataclass(frozen=True)
class Score:
    """The weighted sum of an answer's rewards, and each of them."""

    total: float
    rewards: Mapping[RewardKind, Reward]


@dataclass(frozen=True)
class Judge:
    """Scores answers to rows: of the weighted kinds, those that a row has the means for.

    weights: by kind. form: the regular expression that a whole answer is to match, for the kind "format".
    """

    weights: Mapping[RewardKind, float]
    form: str = ""
    _form: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "_form", re.compile(self.form, re.DOTALL))
        except re.error as error:
            raise ConfigError(f"The form of answers, {self.form!r}, is no regular expression ({error}).") from None

    def __call__(self, row: Row, answer: str) -> Score:
        rewards: dict[RewardKind, Reward] = {}
        if row.choices is not None and row.answer is not None and "choice" in self.weights:
            rewards["choice"] = choice_reward(answer, row.choices, row.answer)
        if row.span is not None and "iou" in self.weights:
            rewards["iou"] = iou_reward(answer, row.span)
        if "format" in self.weights:
            rewards["format"] = format_reward(answer, self._form)
        return Score(sum(self.weights[kind] * reward.value for kind, reward in rewards.items()), rewards)


def format_reward(answer: str, form: re.Pattern[str]) -> Reward:
    """1 where the whole answer has the form, thoughts and all."""
    return Reward(1.0, "in form") if form.fullmatch(answer.strip()) else Reward(0.0, "not in form")


def iou_reward(answer: str, right: Span) -> Reward:
    """The temporal IoU of the one span that an answer names."""
    span = parse_span(answer)
    if span is None:
        return Reward(0.0, "names no span, or several")
    value = temporal_iou(span, right)
    return Reward(value, f"{span[0]:g} to {span[1]:g} s overlaps {right[0]:g} to {right[1]:g} s by {value:.2f}")


def temporal_iou(one: Span, other: Span) -> float:
    """Seconds that both spans cover, by seconds that either does."""
    shared = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    covered = (one[1] - one[0]) + (other[1] - other[0]) - shared
    return shared / covered if covered > 0 else 0.0


# Hours, minutes and seconds by colons, or seconds; with a unit, and not a part of a longer number.
_TIME = (
    r"(?:(?:(\d{1,3}):)?(\d{1,3}):(\d{1,2}(?:\.\d{1,6})?)|(\d{1,9}(?:\.\d{1,6})?))(?![.:]?\d)"
    r"\s{0,3}(?:s|secs?|seconds?)?(?![\w%])"
)
_FIRST = rf"(?<![\w.:-]){_TIME}"
_CLOSE, _OPEN = r"['\"\]>)*]{0,3}\s{0,3}", r"\s{0,3}['\"\[<(*]{0,3}"
_TO = r"(?:to|until|till|through|-{1,2}>?|[–—→~])"
# "1.5 to 3.0", "00:01.5-00:03", "between 1.5 and 3 s", "[1.5, 3.0]", "it starts at 1.5 and ends at 3".
_SPAN_FORMS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"{_FIRST}{_CLOSE}{_TO}{_OPEN}{_TIME}",
        rf"\bbetween{_OPEN}{_FIRST}{_CLOSE}and{_OPEN}{_TIME}",
        rf"[\[(]\s{{0,3}}{_FIRST}\s{{0,3}}[,;]\s{{0,3}}{_TIME}\s{{0,3}}[\])]",
        rf"\bstart[^\d-]{{0,12}}{_FIRST}{_CLOSE}[,;]?[^\d-]{{0,12}}\bend[^\d-]{{0,12}}{_TIME}",
    )
)
_CHAIN = re.compile(rf"{_FIRST}{_CLOSE}{_TO}{_OPEN}{_TIME}{_CLOSE}{_TO}{_OPEN}\d", re.IGNORECASE)  # 1 to 2 to 3


def parse_span(text: str) -> Span | None:
    """The one span, in seconds, that an answer names; None where it names none, several, or one that is reversed."""
    answer = final_answer(text)
    if _CHAIN.search(answer):
        return None
    found = set()
    for form in _SPAN_FORMS:
        for match in form.finditer(answer):
            start, end = _seconds(*match.groups()[:4]), _seconds(*match.groups()[4:])
            if start is None or end is None or not start < end:
                return None
            found.add((start, end))
    return found.pop() if len(found) == 1 else None


def _seconds(hours: str | None, minutes: str | None, seconds: str | None, plain: str | None) -> float | None:
    if plain is not None:
        return float(plain)
    assert minutes is not None and seconds is not None  # the two forms of _TIME
    if float(seconds) >= 60 or (hours is not None and int(minutes) >= 60):
        return None
    return 3600.0 * int(hours or 0) + 60.0 * int(minutes) + float(seconds)


def choice_reward(answer: str, choices: Sequence[str], right: int) -> Reward:
    """1 where an answer names the right choice and no other, by its letter or its text."""
    named = named_choices(answer, choices)
    letters = ", ".join(_letter(index) for index in sorted(named))
    if len(named) != 1:
        return Reward(0.0, f"names several choices, {letters}" if named else "names no choice")
    if named == {right}:
        return Reward(1.0, f"{letters} is right")
    return Reward(0.0, f"names {letters}, but {_letter(right)} is right")


def named_choices(answer: str, choices: Sequence[str]) -> set[int]:
    """The indices of the choices that an answer names: by letters, or, where it has none, by their texts.

    A letter counts where it stands alone; "A" and "I" not where they are English words. After one letter, the text of
    another choice counts where it is all that follows: "B. red" names two if red is C.
    """
    final = final_answer(answer)
    last = _letter(len(choices) - 1)
    # A single letter may be lower case.
    only = re.fullmatch(rf"{_BEFORE_LETTER}([a-{last.lower()}]){_AFTER_LETTER}", final, re.IGNORECASE)
    if only:
        return {ord(only[1].upper()) - ord("A")}
    found = [
        match
        for match in re.finditer(rf"(?<![\w'’])([A-{last}])(?![\w'’])", final)
        if not (match[1] in "AI" and _ARTICLE.match(final, match.end()))
    ]
    letters = {ord(match[1]) - ord("A") for match in found}
    if not letters:
        return _named_texts(final, choices)
    rest = final[found[-1].end() :]
    return letters | {
        index for index, choice in enumerate(choices) if len(letters) == 1 and _plain(rest) == _plain(choice)
    }


_BEFORE_LETTER = r"[^\w]*(?:(?:the\s+)?(?:correct\s+|right\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?[^\w]*)?"
_AFTER_LETTER = r"[^\w]*"
# "A red ball", but not "A or B", "A is right", "A because".
_ARTICLE = re.compile(r"\s+(?!(?:or|and|is|because|since|as|but|not)\b)[a-z]")


def _named_texts(answer: str, choices: Sequence[str]) -> set[int]:
    """The choices whose whole text stands in an answer, longer ones first: "dark red" does not name "red" as well."""
    text = _plain(answer)
    named = set()
    for index in sorted(range(len(choices)), key=lambda index: -len(choices[index])):
        pattern = rf"(?<![\w.]){re.escape(_plain(choices[index]))}(?!\w|\.\d)"
        text, count = re.subn(pattern, "\0", text)
        if count:
            named.add(index)
    return named


def final_answer(text: str) -> str:
    """What of a text is its answer: without thoughts, and of tags or a box for answers what is in them."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        text = text.partition("<think>")[0]  # thoughts that were cut off
    tagged = [part.partition("</answer>")[0] for part in text.split("<answer>")[1:] if "</answer>" in part]
    tagged = tagged or re.findall(r"\\boxed\{([^{}]*)\}", text)
    return " | ".join(tagged) if tagged else text.strip()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?()[]*\"'")


def _letter(index: int) -> str:
    return chr(ord("A") + index)
