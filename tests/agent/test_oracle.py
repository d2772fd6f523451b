"""The oracle: what its runs, windows and claims say is so in the film, and a run of its is worth the whole reward."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import prompts
from agent.answering import Answering
from agent.calls import parse
from agent.entries import Call, Entry, Evidence, Result
from agent.oracle import dataset
from agent.oracle.environment import PRICE, parts, worth
from agent.oracle.rows import claims_of, question_of, windows_of
from agent.oracle.runs import CLOSELY, Oracle
from agent.oracle.wording import absent, moved
from agent.spans import overlap
from agent.tools.box import NAMES, tools
from agent.tools.ground import CANDIDATES, FINE_WINDOW, Ground
from agent.tools.tool import checked, schema
from agent.tools.verify import Verify
from agent.workspace import Workspace, question_parts
from ivcore.chat_template import QWEN_TEMPLATE, render_template
from ivcore.video import Clip
from train.rewards import temporal_iou
from train.row import Row, parse_row
from train.tiny.template import terse_template
from train.toyworld.questions import NOT_THERE, Question, ask
from train.toyworld.score import is_right, parse_span
from train.toyworld.script import Script, random_of, seeds
from train.toyworld.words import COLOURS, DIRECTIONS

LONG_ENOUGH = 0.9
"""Seconds of a key of which more than half is seen whatever the slips."""


class Made:
    """A film of a kind, with its question and a workspace whose model nobody asks."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        (folder / "films").mkdir(exist_ok=True)
        self.folder, self.kind = folder, kind
        self.script, path = dataset.film(folder, seed, kind, 60.0)
        self.question = ask(self.script)
        self.workspace = Workspace(path, None, None)  # type: ignore[arg-type]

    @property
    def about(self) -> tuple[Script, Question, Workspace]:
        return self.script, self.question, self.workspace

    def row(self, raw: dict[str, Any], stage: str = "sft") -> Row:
        """The row as training reads it."""
        return parse_row(json.loads(json.dumps(raw)), self.folder, stage)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    folder = tmp_path_factory.mktemp("films")
    (read,) = [each for each in seeds("train", 0, 40) if absent_read(each, True)][:1]
    (seen,) = [each for each in seeds("train", 0, 40) if absent_read(each, False)][:1]
    kinds = ["rare", "colour", "shape", "direction", "when", "said"]
    return [Made(folder, kind, number) for kind, number in zip(kinds, seeds("train", 7, 6), strict=True)] + [
        Made(folder, "absent", read), Made(folder, "absent", seen),
    ]  # fmt: skip


def absent_read(seed: int, read: bool) -> bool:
    """Whether the film of this seed is asked about a line that is not there, or about a figure."""
    return ask(dataset.make_script(seed, "absent", 60.0)).read == read


def runs_of(made: Made, count: int = 6, follow_ups: int = 0) -> Iterator[tuple[Oracle, list[dict[str, Any]]]]:
    for number in range(count):
        oracle = Oracle(*made.about, random_of(number, 99))
        yield oracle, oracle.run(follow_ups)


def ended(made: Made, oracle: Oracle, messages: list[dict[str, Any]]) -> list[Entry]:
    """The run's entries with the result that its last call comes to when every claim is supported."""
    (last,) = parse(messages[-1]["content"])[1]
    assert last.name == "answer" and isinstance(last.arguments, dict)
    cited = [name for claim in last.arguments["claims"] for name in claim["evidence"]]
    found = [oracle.context.observation(name) for name in cited]
    evidence = tuple(Evidence(observation=each.id, span=each.span) for each in found if each is not None)
    assert len(evidence) == len(cited)
    status = "verified" if last.arguments.get("found", True) else "not found"
    return [*oracle.context.entries, Result(answer=last.arguments["text"], status=status, evidence=evidence)]


def test_every_call_of_a_run_is_one_that_its_tool_takes(films: list[Made]) -> None:
    for made in films:
        for oracle, messages in runs_of(made, follow_ups=4):
            offered = tools(made.workspace, NAMES if oracle.has_library else None)
            known = {**offered, "answer": Answering(made.workspace)}
            for message in messages:
                if message["role"] != "assistant":
                    continue
                (call,) = parse(message["content"])[1]
                assert call.problem is None and isinstance(call.arguments, dict)
                checked(known[call.name], call.arguments)


def test_a_run_ends_in_the_right_answer_with_evidence_and_is_worth_the_whole_reward_less_its_calls(
    films: list[Made],
) -> None:
    for made in films:
        row = made.row(question_of(*made.about), "rl")
        for oracle, messages in runs_of(made):
            entries = ended(made, oracle, messages)
            result = entries[-1]
            assert isinstance(result, Result)
            assert made.kind == "when" or is_right(result.answer, made.question.answer)
            span = made.question.span
            if span is not None and span[1] - span[0] < LONG_ENOUGH:
                continue
            assert parts(row, entries) == {"right": 1.0, "shown": 1.0}, (made.kind, messages)
            calls = sum(isinstance(entry, Call) for entry in entries)
            assert worth(row, entries) == pytest.approx(1 - PRICE * calls)


def test_a_run_makes_mistakes_and_gets_over_them(films: list[Made]) -> None:
    """Of many runs, some look at something else first; they look again before they answer."""
    made = next(made for made in films if made.kind == "rare")
    (key,) = made.script.keys
    again = 0
    for _, messages in runs_of(made, 40):
        (last_look,) = [parse(each["content"]) for each in messages if '"look"' in str(each["content"])][-1][1]
        spans = [parse(each["content"])[1][0].arguments for each in messages if '"look"' in str(each["content"])]
        first = spans[0]
        if not (first["start"] < key.span[1] and key.span[0] < first["end"]):
            again += 1
            assert 2 <= len(spans) <= CANDIDATES
        assert isinstance(last_look.arguments, dict)
        assert temporal_iou((last_look.arguments["start"], last_look.arguments["end"]), key.span) > 0.5
    assert 2 <= again <= 20


def test_what_is_misread_is_contradicted_and_looked_at_more_closely(films: list[Made]) -> None:
    made = next(made for made in films if made.kind == "rare")
    slipped = 0
    for _, messages in runs_of(made, 40):
        places = [place for place, each in enumerate(messages) if "A fresh look contradicts k1" in str(each["content"])]
        assert len(places) <= 1
        for place in places:
            slipped += 1
            seen, wrong, _, look, closer = messages[place - 2 : place + 3]
            first, last = (parse(each["content"])[1][-1].arguments for each in (wrong, messages[-1]))
            (again,) = parse(look["content"])[1]
            assert again.name == "look" and isinstance(again.arguments, dict) and again.arguments["fps"] > CLOSELY
            assert isinstance(first, dict) and first["text"] == answered(seen) != made.question.answer
            assert isinstance(last, dict) and last["text"] == answered(closer) == made.question.answer
    assert 3 <= slipped <= 20


def test_a_run_asks_of_what_it_looks_at_and_says_what_it_hears(films: list[Made]) -> None:
    """A look at something else answers that it is not there, and the next match is looked at."""
    elsewhere = 0
    for made in (made for made in films if not made.question.read):
        for _, messages in runs_of(made, 8):
            calls = [(place, *parse(each["content"])[1]) for place, each in enumerate(messages) if is_call(each)]
            looks = [(place, each) for place, each in calls if each.name == "look"]
            assert all("question" in each.arguments for _, each in looks)
            heard = [answered(messages[place + 1]) for place, _ in looks]
            misses = [each for each in heard if each in (NOT_THERE, "no")]
            elsewhere += len(misses)
            assert misses == heard if absent(made.question) else heard[-1] not in misses
            if not absent(made.question) and made.kind != "when":
                assert heard[-1] == made.question.answer
                assert all(each.arguments["question"] == made.question.text for _, each in looks)
    assert elsewhere >= 10


def is_call(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant"


def answered(message: dict[str, Any]) -> str:
    """What a look says about what it was asked."""
    (_, said) = in_parts(message)[-1]["text"].split("> ")
    return str(said)


def test_questions_that_follow_are_answered_rightly_and_without_a_search_where_it_was_seen(
    films: list[Made],
) -> None:
    at_once = not_there = 0
    for made in (made for made in films if not made.question.read):
        names = {figure.name for figure in made.script.figures}
        for _, messages in runs_of(made, 8, follow_ups=4):
            asked = [place for place, each in enumerate(messages) if each["role"] == "user"][1:]
            assert len(asked) == len({messages[place]["content"] for place in asked}) <= 4
            for place, end in zip(asked, [*asked[1:], len(messages)], strict=True):
                (last,) = parse(messages[end - 1]["content"])[1]
                assert last.name == "answer" and isinstance(last.arguments, dict)
                names_of_calls = [parse(each["content"])[1][0].name for each in messages[place:end] if is_call(each)]
                at_once += "ground" not in names_of_calls and bool(last.arguments["claims"])
                if not last.arguments["claims"]:
                    not_there += 1
                    words = set(messages[place]["content"].strip("?.").split())
                    assert last.arguments["found"] is False and not any({*name} <= words for name in names)
                    continue
                said = last.arguments["claims"][0]["text"]
                about = [each for each in made.script.figures if subject_of(said) <= {*each.name}]
                if " visible from " in said:
                    (figure,) = about
                    start, end_ = (float(each) for each in re.findall(r"[0-9.]+[0-9]", said))
                    assert overlap((start, end_), figure.span) > 0
                    assert last.arguments["text"] in said
                else:
                    assert len(about) == 1 and holds(said, about[0]) and last.arguments["text"] in said
    assert at_once >= 10 and not_there >= 3


def test_a_question_without_an_answer_ends_as_not_found_and_cites_nothing(films: list[Made]) -> None:
    for made in (made for made in films if made.kind == "absent"):
        for oracle, messages in runs_of(made):
            result = ended(made, oracle, messages)[-1]
            assert isinstance(result, Result) and (result.status, result.evidence) == ("not found", ())


def test_a_look_and_a_claim_have_the_seconds_that_ground_has_said(films: list[Made]) -> None:
    (made,) = (made for made in films if made.kind == "when")
    for _, messages in runs_of(made):
        said = [
            part["text"] for each in messages if each["role"] == "tool" for part in in_parts(each) if "text" in part
        ]
        (matches,) = [text for text in said if "Matches: " in text]
        calls = [call for each in messages if each["role"] == "assistant" for call in parse(each["content"])[1]]
        for given in (call.arguments for call in calls if call.name == "look"):
            assert f"{given['start']:.1f} to {given['end']:.1f} (" in matches
        assert f"{calls[-1].arguments['text']} (" in matches
        assert calls[-1].arguments["text"] in calls[-1].arguments["claims"][0]["text"]


def in_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def turns_of(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """The questions of a row and their answers."""
    asked, answers = raw["messages"][::2], raw["messages"][1::2]
    assert [each["role"] for each in raw["messages"]] == ["user", "assistant"] * len(asked)
    return [(in_parts(one)[-1]["text"], other["content"]) for one, other in zip(asked, answers, strict=True)]


def looked_for(question: str) -> set[str]:
    (what,) = re.findall(r"is the (.*) visible", question)
    return set(what.split()) - {"figure"}


def test_windows_say_what_is_there_and_what_is_not_and_close_ones_when_in_seconds_of_their_own(
    films: list[Made],
) -> None:
    said = {"yes": 0, "no": 0, "when": 0}
    for made in films:
        for raw in windows_of(*made.about, np.random.default_rng(0)):
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


def test_whether_something_is_there_does_not_follow_from_the_words(films: list[Made]) -> None:
    """Colours, shapes and whole names are as often there as not, in long windows and in short ones."""
    said: dict[tuple[bool, str], list[bool]] = {}
    for made in films:
        for raw in (raw for seed in range(3) for raw in windows_of(*made.about, np.random.default_rng(seed))):
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


def test_windows_and_claims_are_what_the_tools_ask(films: list[Made], monkeypatch: pytest.MonkeyPatch) -> None:
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
        whole = (0.0, made.workspace.duration)
        for raw in windows_of(*made.about, np.random.default_rng(0)):
            what = re.findall(r"is the (.*) visible", raw["messages"][0]["content"][-1]["text"])[0]
            Ground(made.workspace).find(what, whole)
            assert said(raw, made) in asked
        for raw in claims_of(*made.about, np.random.default_rng(0)):
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


def subject_of(claim: str) -> set[str]:
    """What tells the figure that a claim is about."""
    return set(re.split(" is | moves ", claim.removesuffix("."))[0].removeprefix("The ").split()) - {"figure"}


def holds(claim: str, figure: Any) -> bool:
    """Whether a claim about a figure is so, read word by word."""
    words = set(re.findall(r"[a-z]+", claim))
    if directions := words & set(DIRECTIONS):
        return directions == {figure.direction}
    return {figure.name.colour, figure.name.shape} <= words


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


@pytest.mark.parametrize(
    ("answer", "status", "spans", "expected"),
    [
        ("red", "verified", [(9.5, 13.5)], {"right": 1.0, "shown": 1.0}),
        ("red", "verified", [(8.0, 16.0)], {"right": 1.0, "shown": 0.0}),
        ("red", "unverified", [], {"right": 1.0, "shown": 0.0}),
        ("blue", "verified", [(0.0, 1.0), (10.0, 13.0)], {"right": 0.0, "shown": 1.0}),
        ("red or blue", "verified", [(10.0, 13.0)], {"right": 0.0, "shown": 1.0}),
    ],
)
def test_a_reward_needs_the_right_answer_and_evidence_that_is_half_the_truth(
    answer: str, status: Any, spans: list[tuple[float, float]], expected: dict[str, float]
) -> None:
    row = Row("r", (), (), ("red", "blue"), 0, (10.0, 13.0), "run rare", "")
    evidence = tuple(Evidence(observation="o1", span=span) for span in spans)
    result = Result(answer=answer, status=status, evidence=evidence)
    assert parts(row, [result]) == expected
    assert worth(row, [Call(id="c1", name="look", arguments={}), result]) == min(expected.values()) - PRICE
    assert parts(row, [result.model_copy(update={"stopped": "turns"})]) == {"right": 0.0, "shown": 0.0}


def test_the_terse_template_writes_a_tool_as_a_line_of_its_names(films: list[Made]) -> None:
    offered = [schema(tool) for tool in tools(films[0].workspace).values()]
    messages = [{"role": "user", "content": "Hello"}]
    whole = render_template(QWEN_TEMPLATE, messages, tools=offered)
    terse = render_template(terse_template(), messages, tools=offered)
    assert "\nlook(start, end, fps, question)\n" in terse and "properties" not in terse
    assert len(terse) < len(whole) / 3
    assert render_template(terse_template(), messages) == render_template(QWEN_TEMPLATE, messages)


def test_films_and_rows_are_written_once_and_read_by_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "DURATIONS", (20.0,))

    class InThisProcess:
        """A pool of no other process, which would not know the shorter films."""

        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> InThisProcess:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def map(self, function: Any, values: Any, chunksize: int) -> Any:
            return map(function, values)

    monkeypatch.setattr(dataset, "ProcessPoolExecutor", InThisProcess)
    files = dataset.write_acts(tmp_path, "train", 0, 6)
    assert set(files) == set(dataset.FILES)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "films").iterdir()}
    before = {name: file.read_bytes() for name, file in files.items()}
    assert len(written) == 6
    dataset.write_acts(tmp_path, "train", 0, 6)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "films").iterdir()} == written
    assert {name: file.read_bytes() for name, file in files.items()} == before
    for name, file in files.items():
        for line in file.read_text().splitlines():
            row = parse_row(json.loads(line), tmp_path, "rl" if name == "questions" else "sft")
            row.check_media()


def test_a_note_says_what_was_found_where_and_only_a_run_with_a_library_has_one(films: list[Made]) -> None:
    noted = 0
    for made in films:
        for oracle, messages in runs_of(made, 12):
            said = [parse(each["content"])[1][0] for each in messages if each["role"] == "assistant"]
            notes = [each.arguments for each in said if each.name == "note"]
            noted += len(notes)
            assert len(notes) <= oracle.has_library and not (notes and absent(made.question))
            for note in notes:
                assert isinstance(note, dict) and isinstance(said[-1].arguments, dict)
                assert note["text"] == said[-1].arguments["claims"][0]["text"]
                assert made.question.span is not None
                assert temporal_iou((note["start"], note["end"]), made.question.span) > 0.3
    assert noted >= 5


@pytest.mark.parametrize("described", ["red circle", "a red circle", "The red circle.", " an red circle"])
def test_what_is_looked_for_is_asked_about_with_or_without_its_article(described: str) -> None:
    assert prompts.is_visible(described) == "Yes or no: is the red circle visible?"
    assert prompts.when(described).endswith(": when is the red circle visible?")
