"""Traces: what was shown is in the file, whatever happens next, and a run goes on from what is in the file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.calls import written
from agent.entries import (
    Belief,
    Call,
    Cost,
    Entry,
    Feedback,
    Instruction,
    Observation,
    Reasoning,
    Result,
    Resumed,
    Run,
)
from agent.trace import Trace, TraceError, read_trace, resumed

OPTIONS: dict[str, object] = {"model": "micro", "sampling": {}, "budget": {}, "tools": None}
RUN = Run(
    path="film.mp4", video="0" * 64, duration=16.0, question="What moves?", model="micro", backend="torch",
    dtype="float32", options=OPTIONS,
)  # fmt: skip
ENTRIES: list[Entry] = [
    RUN,
    Instruction(role="system", text="Look first."),
    Instruction(text="Was läuft? 犬\n🐕\u2028"),
    Belief(unknown=("Was läuft?",)),
    Reasoning(text="", said=written("look", {"start": 1, "end": 2}), turn=1, prefilled=9, seconds=0.5),
    Call(id="c1", name="look", arguments={"start": 1, "end": 2}, turn=1),
    Observation(id="o1", source="look", span=(1.0, 2.0), times=(1.0, 1.5), turn=1),
    Feedback(call="c1", text="2 frames.", observation="o1", turn=1),
    Result(answer="blue", status="unverified"),
]


def write(path: Path, entries: list[Entry]) -> None:
    with Trace(path) as trace:
        for entry in entries:
            trace.append(entry)


def sentence(path: Path) -> str:
    with pytest.raises(TraceError) as error:
        read_trace(path)
    (line,) = str(error.value).splitlines()
    assert str(path) in line and line.endswith(".")
    return line


def test_an_entry_is_in_the_file_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    with Trace(tmp_path / "run.jsonl") as trace:
        for count, entry in enumerate(ENTRIES, 1):
            trace.append(entry)
            assert read_trace(tmp_path / "run.jsonl") == ENTRIES[:count]


@given(st.data())
@settings(max_examples=60)
def test_a_trace_that_is_cut_anywhere_is_the_whole_lines_before_and_can_be_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.unlink(missing_ok=True)
    write(path, ENTRIES)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == len(ENTRIES)
    cut = data.draw(st.integers(len(lines[0]), len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    assert read_trace(path) == ENTRIES[:whole]
    with Trace(path, resume=True) as trace:
        trace.append(ENTRIES[-1])
    assert read_trace(path) == [*ENTRIES[:whole], ENTRIES[-1]]


def test_a_trace_whose_first_line_was_cut_is_none(tmp_path: Path) -> None:
    for content, said in (
        ("", "is empty, because its run was stopped before its first line"),
        (RUN.model_dump_json(), "is empty, because its run was stopped before its first line"),
        (f"{ENTRIES[1].model_dump_json()}\n", "is no trace of a run"),
    ):
        (tmp_path / "run.jsonl").write_text(content)
        assert said in sentence(tmp_path / "run.jsonl")


def test_a_trace_to_which_nothing_was_written_is_not_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with suppress(KeyboardInterrupt), Trace(path):
        assert path.exists()  # nobody else takes the name meanwhile
        raise KeyboardInterrupt
    assert not path.exists()
    write(path, ENTRIES)
    with Trace(path, resume=True):
        pass
    assert read_trace(path) == ENTRIES


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff\xfe", b"{}", b'{"kind": "dream"}', b'{"kind": "call"', b"[" * 9_000, b'{"kind":"belief","x":1}'],
)
def test_a_damaged_line_is_named_by_its_number(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "run.jsonl"
    write(path, ENTRIES)
    lines = path.read_bytes().split(b"\n")
    lines[4] = damage
    path.write_bytes(b"\n".join(lines))
    assert ", line 5: " in sentence(path)


@pytest.mark.parametrize("dropped", [-1, 3, 99])
def test_a_line_that_voids_more_than_there_is_is_damage(tmp_path: Path, dropped: int) -> None:
    write(tmp_path / "run.jsonl", [*ENTRIES[:3], Resumed(dropped=dropped)])
    assert ", line 4: " in sentence(tmp_path / "run.jsonl")


def test_a_file_that_is_there_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(TraceError, match=r"is there already; name another file, or go on with it by --resume\.$"):
        Trace(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_that_cannot_be_is_one_sentence(tmp_path: Path, resume: bool) -> None:
    with pytest.raises(TraceError, match=r"cannot be written \(No such file or directory\); choose another file\.$"):
        Trace(tmp_path / "nowhere/run.jsonl", resume=resume)
    assert "cannot be read (No such file" in sentence(tmp_path / "nowhere.jsonl")
    assert "cannot be read (Is a directory" in sentence(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(
            TraceError, match=r"run.jsonl cannot be written \(No space left on device\); the run stops here\.$"
        ),
        Trace(tmp_path / "run.jsonl") as trace,
    ):
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, trace._file.fileno())
        os.close(full)
        trace.append(RUN)


def test_a_run_goes_on_behind_what_came_to_its_end() -> None:
    for kept, count in ((0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 7)):
        entries, mark = resumed(ENTRIES[1 : 1 + kept])
        assert entries == ENTRIES[1 : 1 + count] and mark.dropped == kept - count


def test_what_a_resumed_run_dropped_is_void_but_was_spent(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    cost = Cost(prefilled=70, visual=60, generated=5, frames=4)
    write(path, [*ENTRIES[:6], ENTRIES[6].model_copy(update={"seconds": 9.0, "cost": cost})])
    for dropped in (2, 3, 1):  # stopped twice behind an observation, and once before anything came of it
        kept, mark = resumed(read_trace(path)[1:])
        assert [RUN, *kept] == ENTRIES[:5]
        assert (mark.dropped, mark.seconds, mark.cost, mark.turn) == (dropped, 9.0, cost, 1)
        with Trace(path, resume=True) as trace:
            trace.append(mark)
            for entry in ENTRIES[5:7] if dropped == 2 else ():
                trace.append(entry.model_copy(update={"seconds": mark.seconds, "cost": mark.cost}))
    assert [entry for entry in read_trace(path) if not isinstance(entry, Resumed)] == ENTRIES[:5]


def test_a_run_that_was_stopped_before_its_question_has_spent_what_it_has() -> None:
    kept, mark = resumed([ENTRIES[1].model_copy(update={"seconds": 2.0})])
    assert (kept, mark) == ([], Resumed(dropped=1, seconds=2.0))
    assert resumed([]) == ([], Resumed(dropped=0))
