"""`iv3 agent`: what it prints, and that nothing is written where it cannot begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import prompts
from agent.calls import written
from agent.entries import Instruction, Observation, Result
from agent.trace import read_trace
from tests.agent.commands import LOOK, OPTIONS, Says, answer, film, says
from tests.agent.conftest import Run

MESSAGES = [LOOK, answer("blue", "o1")]
Fails = Callable[..., str]


@pytest.fixture(name="says")
def says_fixture(monkeypatch: pytest.MonkeyPatch) -> Says:
    return says(monkeypatch)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("agent"))


def options(tmp_path: Path) -> list[object]:
    """Of a run that would write all that it can."""
    paths = ["--trace", tmp_path / "run.jsonl", "--report", tmp_path / "run.html", "--library", tmp_path / "library"]
    return [*OPTIONS, *paths]


def test_the_answer_is_on_stdout_the_turns_on_stderr_and_all_of_it_in_the_trace(
    clip: Path, tmp_path: Path, run: Run, says: Says
) -> None:
    says(*MESSAGES)
    code, out, err = run("agent", clip, "What moves?", *options(tmp_path))
    assert code == 0 and "blue" in out and "[00:02.0-00:03.0]" in out and "look 2" in err and "Traceback" not in err
    result = read_trace(tmp_path / "run.jsonl")[-1]
    assert isinstance(result, Result) and result.answer == "blue"
    assert "blue" in (tmp_path / "run.html").read_text()


def test_json_is_one_object(clip: Path, run: Run, says: Says) -> None:
    says(*MESSAGES)
    code, out, _ = run("agent", clip, "What moves?", *OPTIONS, "--json")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert (result["answer"], result["evidence"][0]["span"], result["turns"]) == ("blue", [2.0, 3.0], 2)


def test_a_missing_video_or_an_unknown_tool_is_one_sentence_and_nothing_is_written(
    clip: Path, tmp_path: Path, failure: Fails, says: Says
) -> None:
    model = says("never said")
    given = options(tmp_path)
    assert "nowhere.mp4" in failure("agent", tmp_path / "nowhere.mp4", "What moves?", *given)
    (tmp_path / "empty.mp4").touch()
    assert "empty.mp4" in failure("agent", tmp_path / "empty.mp4", "What moves?", *given)
    (tmp_path / "empty.mp4").unlink()
    assert "There is no tool 'zoom'; there are overview" in failure("agent", clip, "Q?", *given, "--tools", "look,zoom")
    assert "nowhere" in failure("agent", clip, "What moves?", *given, "-m", tmp_path / "nowhere")
    assert not list(tmp_path.iterdir()) and model._answers


def test_a_missing_question_or_too_much_to_resume_is_bad_usage(clip: Path, tmp_path: Path, run: Run) -> None:
    for arguments, said in (
        ([clip], "a video and a question are missing, or --resume TRACE"),
        ([], "a video and a question are missing, or --resume TRACE"),
        ([clip, "  "], "the question is empty"),
        ([clip, "--resume", tmp_path / "run.jsonl"], "--resume knows the run's video, question and options; leave out"),
        (["--max-turns", "3", "--resume", tmp_path / "run.jsonl"], "question and options; leave out --max-turns"),
        (["--trace", "t.jsonl", "--resume", tmp_path / "run.jsonl"], "question and options; leave out --trace"),
        ([clip, "What moves?", "--max-turns", "0"], "max-turns"),
    ):
        code, out, err = run("agent", *arguments)
        assert (code, out) == (2, "") and said in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_a_trace_or_report_that_cannot_be_written_is_known_before_the_model_is_loaded(
    clip: Path, tmp_path: Path, failure: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("agent.act.load", never)
    (tmp_path / "mine.jsonl").write_text("mine")
    asked = ["agent", clip, "What moves?", *OPTIONS]
    assert "is there already" in failure(*asked, "--trace", tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    nowhere = tmp_path / "nowhere"
    assert "cannot be written" in failure(*asked, "--trace", nowhere / "run.jsonl")
    assert "cannot be written" in failure(*asked, "--trace", tmp_path / "run.jsonl", "--report", nowhere / "run.html")
    assert [each.name for each in tmp_path.iterdir()] == ["mine.jsonl"]


def test_looks_are_bounded_and_the_model_is_told_more_where_it_was_asked_for(
    clip: Path, tmp_path: Path, run: Run, says: Says
) -> None:
    says(written("look", {"start": 2.0, "end": 6.0, "fps": 4}), answer("blue", "o1"))
    bounds = ["--fps", "2", "--max-frames", "3", "--system", "Answer in French.", "--trace", tmp_path / "run.jsonl"]
    assert run("agent", clip, "What moves?", *OPTIONS, *bounds)[0] == 0
    entries = read_trace(tmp_path / "run.jsonl")
    (seen,) = (each for each in entries if isinstance(each, Observation))
    assert len(seen.times) == 3
    assert isinstance(entries[1], Instruction) and entries[1].text == f"{prompts.SYSTEM}\n\nAnswer in French."


_LINES: list[str] = []


@pytest.fixture
def stopped(clip: Path, tmp_path: Path, run: Run, says: Says) -> Callable[..., Path]:
    """Function (lines, film) -> a trace of a run in `tmp_path` that was stopped behind so many."""
    if not _LINES:  # one run is enough for all
        says(*MESSAGES)
        assert run("agent", clip, "What moves?", *OPTIONS, "--trace", tmp_path / "whole.jsonl")[0] == 0
        _LINES[:] = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "whole.jsonl").unlink()

    def cut(count: int, film: Path = clip) -> Path:
        first = json.dumps(json.loads(_LINES[0]) | {"path": str(film)})
        (tmp_path / "run.jsonl").write_text("".join([f"{first}\n", *_LINES[1:count]]))
        return tmp_path / "run.jsonl"

    return cut


# Behind the run itself, the first instruction, both, and what the first call showed.
@pytest.mark.parametrize(("lines", "left"), [(1, 2), (2, 2), (3, 2), (7, 1)])
def test_a_stopped_run_goes_on_to_its_answer(
    stopped: Callable[..., Path], run: Run, says: Says, failure: Fails, lines: int, left: int
) -> None:
    trace = stopped(lines)
    says(*MESSAGES[-left:])
    code, out, err = run("agent", "--resume", trace, "--json")
    assert code == 0, err
    assert json.loads(out)["answer"] == "blue" and json.loads(out)["evidence"][0]["observation"] == "o1"
    entries = read_trace(trace)
    assert [entry.kind for entry in entries].count("instruction") == 2
    assert json.loads(entries[-1].model_dump_json()) == json.loads(out)
    assert "has its result already; see it with iv3 replay" in failure("agent", "--resume", trace)


def test_another_video_in_its_place_is_not_gone_on_with(
    stopped: Callable[..., Path], tmp_path: Path, failure: Fails
) -> None:
    trace = stopped(4, film(tmp_path, seed=3))
    before = trace.read_bytes()
    assert "is another video than the run's" in failure("agent", "--resume", trace)
    (tmp_path / "film.mp4").unlink()
    assert "film.mp4" in failure("agent", "--resume", trace)
    assert trace.read_bytes() == before


def test_what_is_no_trace_is_not_gone_on_with(tmp_path: Path, failure: Fails) -> None:
    assert "cannot be read" in failure("agent", "--resume", tmp_path / "run.jsonl")
    (tmp_path / "run.jsonl").touch()
    assert "is empty, because its run was stopped" in failure("agent", "--resume", tmp_path / "run.jsonl")
    (tmp_path / "run.jsonl").write_text("{}\n")
    assert "line 1: that is no entry of a trace" in failure("agent", "--resume", tmp_path / "run.jsonl")


def test_what_one_run_notes_the_next_one_recalls_with_no_library_named(
    clip: Path, tmp_path: Path, run: Run, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("IV3_LIBRARY")
    given = [*OPTIONS, "--tools", "look,note,recall", "--trace", tmp_path / "run.jsonl"]
    says(written("note", {"text": "a lighthouse", "start": 1.0, "end": 2.0}), *MESSAGES)
    assert run("agent", clip, "What moves?", *given)[0] == 0
    (tmp_path / "run.jsonl").unlink()
    says(written("recall", {"query": "lighthouse"}), *MESSAGES)
    code, _, err = run("agent", clip, "What moves?", *given)
    assert code == 0 and "note, 1.0 to 2.0: a lighthouse" in err
    assert (tmp_path / ".cache/ivmlx/library").is_dir()
