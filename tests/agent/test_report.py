"""The report of a run: whole in one file, true to the trace, and nothing in it that a text of the run could be."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agent.clock import span_text
from agent.entries import (
    Belief,
    Call,
    Claim,
    Entry,
    Evidence,
    Feedback,
    Hypothesis,
    Instruction,
    Judgement,
    Memory,
    Observation,
    Reasoning,
    Result,
    Resumed,
    Run,
)
from agent.report import MAX_PICTURES, check_writable, write_report
from ivcore.errors import IvError
from train.toyworld.compose import make_script
from train.toyworld.render import frames, write_clip

SECONDS = 16.0
HOSTILE = (
    "</title></style></script><script>alert(1)</script> \"'> <img src=x onerror=alert(1)> &lt; {{ 7 * 7 }} \x1b[2J\x00"
)
VOID = {"meta", "img", "link", "br", "hr", "input", "base"}


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, the text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.folded: list[str] = []
        self.style = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words.append(data)
            if "details" in self.open and data.strip():
                self.folded.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self) -> list[str | None]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "a film.mp4"
    write_clip(path, make_script(1, "shape", SECONDS))
    return path


def run_of(film: Path, **changes: object) -> Run:
    fields = dict(path=str(film), video=hashlib.sha256(film.read_bytes()).hexdigest(), duration=SECONDS)
    fields |= dict(question="Which shape is it?", model="iv3-tiny", backend="torch", dtype="float32")
    return Run.model_validate(fields | {"options": {"max_turns": 8}} | changes)


def turns() -> list[Entry]:
    """Three turns: a look at all, a call that fails, a look that is cited."""
    return [
        Instruction(role="system", text="Use the tools."),
        Reasoning(text="I look at all of it.", prefilled=1200, generated=9),
        Call(id="c1", name="overview", arguments={}),
        Observation(id="o1", source="overview", span=(0, SECONDS), times=(1.0, 5.0, 9.0, 13.0)),
        Feedback(call="c1", observation="o1", text="4 frames."),
        Belief(hypotheses=(Hypothesis(text="a circle", confidence=0.3),), unknown=("its shape",)),
        Call(turn=1, id="c2", name="look", arguments={"start": 90, "end": 95}),
        Feedback(turn=1, call="c2", problem="The video ends at 16.0 s."),
        Call(turn=2, id="c3", name="look", arguments={"start": 4, "end": 6, "fps": 2}),
        Observation(turn=2, id="o2", source="look", span=(4, 6), times=(4.0, 4.5, 5.0, 5.5)),
        Feedback(turn=2, call="c3", observation="o2"),
        Memory(turn=2, text="The first look showed four scenes.", of=("o1",)),
        Claim(turn=2, id="k1", text="It is a cross.", evidence=("o2", "o7")),
        Judgement(turn=2, claim="k1", verdict="support", spans=((4.0, 6.0),), support=0.93, seconds=2.0, seen="Red."),
    ]


def result(**changes: object) -> Result:
    evidence = (
        Evidence(observation="o2", span=(4.0, 5.5), times=(4.5, 5.0)),
        Evidence(observation="o1", span=(9.0, 13.0), lines=("[00:09.0-00:10.0] It is a cross.",)),
    )
    return Result.model_validate(dict(turn=2, answer="A cross.", status="verified", evidence=evidence) | changes)


def report(tmp_path: Path, entries: list[Entry], video: Path | None = None) -> Page:
    write_report(tmp_path / "report.html", entries, video)
    return Page((tmp_path / "report.html").read_text("utf-8"))


def assert_refers_to_nothing_outside(page: Page) -> None:
    """No element that loads or runs anything, and no address but those of places and pictures in the page."""
    # The title of the page and those of marks are text, which is all that they can hold.
    harmless = (
        "html head meta title style body main section article header h1 h2 h3 p span div ul ol li dl dt dd a img figure"
        " figcaption blockquote details summary strong svg g rect line path circle text"
    )
    assert {tag for tag, _ in page.elements} <= set(harmless.split())
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("style", "srcset", "action", "data") for name in attributes)
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")  # type: ignore[union-attr]
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
        if tag == "meta" and "http-equiv" in attributes:
            assert attributes["content"] is not None and attributes["content"].startswith("default-src 'none'; ")
    for trace_of_a_reference in ("url(", "@import", "http", "//"):
        assert trace_of_a_reference not in page.style


def test_a_report_shows_the_question_the_answer_and_every_piece_of_evidence(tmp_path: Path, film: Path) -> None:
    page = report(tmp_path, [run_of(film), *turns(), result()])
    assert_refers_to_nothing_outside(page)
    assert "Which shape is it?" in page.text and "A cross." in page.text and "Verified" in page.text
    for number, evidence in enumerate(result().evidence, 1):
        assert span_text(evidence.span) in page.text
        assert f"evidence-{number}" in page.ids()
        assert f"evidence {number}: {span_text(evidence.span)}" in page.text  # in the timeline
        assert all(line in page.text for line in evidence.lines)
    assert page.text.count("The video ends at 16.0 s.") == 1
    assert "o7 (never observed)" in page.text


def test_turns_and_their_entries_come_in_the_order_of_the_trace(tmp_path: Path, film: Path) -> None:
    text = report(tmp_path, [run_of(film), *turns(), result()]).text
    told = text[text.index("Turn by turn") :]
    said = [
        "Turn 1 1,200 tokens read, 9 written", "Use the tools.", "I look at all of it.", "overview", "saw 4 frames of",
        "4 frames.", "a circle", "Not known yet: its shape", "Turn 2", "Problem", "Turn 3", "start 4", "fps 2",
        "saw 4 frames of", "Memory", "Claim k1", "It is a cross.", "supported", "93%", "The run",
    ]  # fmt: skip
    place = 0
    for words in said:
        place = told.index(words, place) + len(words)


def test_links_lead_to_places_in_the_page_and_every_id_is_there_once(tmp_path: Path, film: Path) -> None:
    page = report(tmp_path, [run_of(film), *turns(), result()])
    ids = page.ids()
    assert len(ids) == len(set(ids))
    links = {str(attributes["href"])[1:] for attributes in page.all("a")}
    assert {"evidence-1", "evidence-2", "turn-1", "turn-2", "turn-3", "o1", "o2"} <= links <= set(ids)


def test_reasoning_is_folded_away(tmp_path: Path, film: Path) -> None:
    page = report(tmp_path, [run_of(film), *turns(), result()])
    assert len(page.all("details")) == 2 and all("open" not in attributes for attributes in page.all("details"))
    assert page.folded == ["14 characters", "Use the tools.", "20 characters", "I look at all of it."]


@pytest.mark.parametrize(
    ("changes", "shown", "hidden"),
    [
        ({"status": "verified"}, ["Verified"], ["Unverified", "Not found", "Stopped", "Unfinished"]),
        ({"status": "unverified"}, ["Unverified"], ["Verified", "Not found", "Stopped", "Unfinished"]),
        ({"status": "not found", "evidence": ()}, ["Not found", "cites none"], ["Verified", "Unverified", "Stopped"]),
        ({"status": "unverified", "stopped": "8 turns"}, ["Unverified", "Stopped: 8 turns"], ["Verified", "Not found"]),
    ],
)
def test_the_status_is_told_in_words(
    tmp_path: Path, film: Path, changes: dict[str, object], shown: list[str], hidden: list[str]
) -> None:
    text = report(tmp_path, [run_of(film), *turns(), result(**changes)]).text
    assert all(words in text for words in shown)
    assert not any(words in text for words in hidden)


@pytest.mark.parametrize("kept", range(1, 15))
def test_a_run_that_was_killed_anywhere_has_a_report(tmp_path: Path, film: Path, kept: int) -> None:
    page = report(tmp_path, [run_of(film), *turns()[: kept - 1]])
    assert "Unfinished" in page.text and "Verified" not in page.text
    assert ("What it held most likely until then, at 30%: a circle" in page.text) == (kept > 6)


def test_pictures_are_the_frames_at_their_times(tmp_path: Path, film: Path) -> None:
    page = report(tmp_path, [run_of(film), *turns(), result()])
    script, shown = make_script(1, "shape", SECONDS), set()
    for image in page.all("img"):
        match = re.fullmatch(r"Frame at 00:(\d\d\.\d)", str(image["alt"]))
        assert match is not None
        jpeg = base64.b64decode(str(image["src"]).partition(",")[2])
        picture = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), np.float64)
        assert (image["width"], image["height"]) == (str(picture.shape[1]), str(picture.shape[0]))
        expected = frames(script, np.array([float(match[1])]))[0]
        assert np.abs(picture - expected).mean() < 6, match[1]
        shown.add(float(match[1]))
    assert shown == {1.0, 4.0, 4.5, 5.0, 5.5, 9.0, 13.0}


def test_of_many_frames_those_of_evidence_are_shown(tmp_path: Path, film: Path) -> None:
    many: list[Entry] = [
        Observation(turn=n, id=f"p{n}", source="look", span=(n, n + 1), times=tuple((n + k / 10) for k in range(10)))
        for n in range(15)
    ]
    cited = Evidence(observation="p4", span=(4.1, 4.4), times=(4.1, 4.3))  # between those shown of the observation
    page = report(tmp_path, [run_of(film), *many, result(evidence=(cited,))])
    shown = {str(image["src"]) for image in page.all("img")}
    assert len(shown) <= MAX_PICTURES
    assert {"Frame at 00:04.1", "Frame at 00:04.3"} <= {image["alt"] for image in page.all("img")}


@pytest.mark.parametrize("harm", ["gone", "no video", "another video", "folder"])
def test_without_its_video_a_report_is_written_and_says_so(tmp_path: Path, film: Path, harm: str) -> None:
    video = tmp_path / "film.mp4"
    video.write_bytes(film.read_bytes())
    run = run_of(video)
    video.unlink()
    if harm == "no video":
        video.write_bytes(b"not a film")
        run = run_of(video)
    elif harm == "another video":
        write_clip(video, make_script(3, "shape", 4.0))
    elif harm == "folder":
        video.mkdir()
    page = report(tmp_path, [run, *turns(), result()])
    assert not page.all("img")
    words = "is not the file that this run looked at" if harm == "another video" else "is gone or cannot be read"
    assert f"{video} {words}" in page.text
    assert "A cross." in page.text


def test_a_video_that_was_moved_is_taken_from_where_it_is_now(tmp_path: Path, film: Path) -> None:
    run = run_of(film, path="/gone/film.mp4")
    assert report(tmp_path, [run, *turns(), result()], film).all("img")
    assert not report(tmp_path, [run, *turns(), result()]).all("img")


def saying(text: str) -> list[Entry]:
    """A trace in which every text is this one."""
    arguments = {text: text, "start": text, "list": [text]}
    return [
        Run(
            path=text, video=text, duration=9, question=text, model=text, backend=text, dtype=text,
            options={text: text},
        ),
        Instruction(text=text),
        Instruction(text=text, question=text),
        Reasoning(text=text),
        Call(id=text, name=text, arguments=arguments),
        Observation(id=text, source=text, span=(1, 2), text=text),
        Feedback(call=text, observation=text, text=text, quoted=text, problem=text),
        Call(id="c2", name=text, arguments=text),
        Call(id="c3", name=text, arguments={"start": 1, "end": 2, "q": text}),
        Memory(text=text, of=(text, "never")),
        Claim(id=text, text=text, evidence=(text, "never" + text)),
        Judgement(claim=text, verdict="unclear", spans=((1, 2),), support=0.5, seen=text),
        Belief(hypotheses=(Hypothesis(text=text, confidence=1, pro=(text,), contra=(text,)),), unknown=(text,)),
        Result(
            answer=text, status="verified", stopped=text,
            evidence=(Evidence(observation=text, span=(1, 2), lines=(text,)),),
        ),
    ]  # fmt: skip


def skeleton(page: Page) -> list[tuple[str, list[str]]]:
    return [(tag, sorted(attributes)) for tag, attributes in page.elements]


@settings(max_examples=60)
@given(st.text(min_size=1, max_size=40) | st.text("<>\"'&/=! \n\x00\x1b\x9b{}%-a", min_size=1, max_size=40))
def test_no_text_becomes_a_part_of_the_page(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    # Empty texts and file names of several parts are told in other ways, so the text begins and ends with a letter.
    folder = tmp_path_factory.getbasetemp()
    harmless, page = report(folder, saying("xx")), report(folder, saying(f"x{text}x"))
    assert skeleton(page) == skeleton(harmless)
    assert_refers_to_nothing_outside(page)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "".join(page.words))


def test_a_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    page = report(tmp_path, saying(HOSTILE))
    assert_refers_to_nothing_outside(page)
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7 * 7 }}" in page.text and "&lt;" in page.text
    assert "\x1b" not in page.text and "\x00" not in page.text


def test_half_of_a_surrogate_pair_does_not_stop_a_report(tmp_path: Path) -> None:
    entries = [saying("x")[0], Call(id="c1", name="look", arguments={"q": "a\ud800b"})]
    assert "a?b" in report(tmp_path, entries).text


def test_a_long_text_is_cut_off_and_its_length_said(tmp_path: Path) -> None:
    page = report(tmp_path, saying("y" * 40_000))
    assert page.text.count("cut off here; it has 40,000 characters") > 15
    assert len(page.text) < 100_000


def test_a_report_that_cannot_be_written_is_an_error_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IvError, match=r"report.html cannot be written \(No such file or directory\); choose "):
        write_report(tmp_path / "none" / "report.html", saying("x"))
    assert not list(tmp_path.iterdir())


def test_a_trace_that_does_not_begin_with_its_run_is_refused(tmp_path: Path) -> None:
    for entries in ([], turns()):
        with pytest.raises(ValueError, match="begins with its run"):
            write_report(tmp_path / "report.html", entries)


def talk() -> list[Entry]:
    """Three questions: one that is verified, one that was stopped, one that is not found."""
    return [
        Instruction(text="Video: a film.\nQuestion: Which shape?", question="Which shape?"),
        *turns()[1:],
        result(turns=3, prefilled=1_000, frames=8),
        Instruction(turn=3, text="Who left?", question="Who left?"),
        Belief(turn=3, hypotheses=(Hypothesis(text="a square", confidence=0.4),)),
        Instruction(turn=3, text="When?", question="When?"),
        Reasoning(turn=3, text="I know.", prefilled=30),
        Observation(turn=3, id="o3", source="look", span=(12, 14), times=(12.0,)),
        result(
            turn=3, answer="Later.", status="unverified", turns=1, prefilled=30, frames=1,
            evidence=(Evidence(observation="o3", span=(12.0, 14.0), times=(12.0,)),),
        ),
    ]  # fmt: skip


def test_every_question_of_a_talk_stands_with_its_own_answer_status_and_evidence(tmp_path: Path, film: Path) -> None:
    page = report(tmp_path, [run_of(film, question=""), *talk()])
    told = page.text[page.text.index("3 questions") : page.text.index("Timeline")]
    said = [
        "3 questions", "Which shape?", "Verified", "A cross.", "[00:04.0-00:05.5]", "[00:09.0-00:13.0]",
        "Who left?", "Unfinished", "No answer", "at 40%: a square",
        "When?", "Unverified", "Later.", "[00:12.0-00:14.0]",
    ]  # fmt: skip
    places = [told.index(words) for words in said]
    assert places == sorted(places) and told.count("Verified") == told.count("Unfinished") == 1
    assert {"evidence-1", "evidence-2", "evidence-3"} <= set(page.ids())
    assert len(page.ids()) == len(set(page.ids()))
    links = {str(attributes["href"])[1:] for attributes in page.all("a")}
    assert {"evidence-1", "evidence-2", "evidence-3"} <= links <= set(page.ids())
    facts = page.text[page.text.index("The run") :]
    assert "Turns4" in facts and "Tokens read1,030" in facts and "Frames seen9" in facts


def test_a_talk_without_a_question_and_a_run_that_was_gone_on_with_have_a_report(tmp_path: Path, film: Path) -> None:
    assert "No question was asked" in report(tmp_path, [run_of(film, question="")]).text
    asked = Instruction(text="Video: a film.\nQuestion: Which shape is it?", question="Which shape is it?")
    page = report(tmp_path, [run_of(film), asked, *turns()[1:], Resumed(turn=2, dropped=1), result()])
    assert "3 questions" not in page.text and "Gone on with" in page.text
    assert page.text.count("Which shape is it?") == 3  # its title, its heading and its turn


def test_a_report_that_could_not_be_written_is_known_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "report.html")
    (tmp_path / "folder.html").mkdir()
    for path in (tmp_path / "nowhere/report.html", tmp_path / "folder.html"):
        with pytest.raises(IvError, match=r"cannot be written; name a file in a folder of yours for the report\.$"):
            check_writable(path)
