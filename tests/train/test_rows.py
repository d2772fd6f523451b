"""Reading rows: what is kept, what is rejected and why, and the annotations of others."""

from __future__ import annotations

import json
import string
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ivcore.errors import ConfigError
from ivcore.messages import read_messages
from train.rewards import parse_span
from train.row import RowError, Stage, parse_row
from train.rows import Rows, read_rows

SECONDS = 2.0
VIDEO = {"type": "video", "video": "clips/a.mp4"}
ADDRESS = {"type": "video_url", "video_url": {"url": "http://x/a.mp4"}}
PLAIN = '{"messages": [{"role": "user", "content": "When?"}], '


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_clip: Callable[..., Path]) -> Path:
    """A folder with clips/a.mp4 of two seconds, a copy b.mp4, and a file that is no video."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "clips").mkdir()
    clip = write_clip(folder / "clips/a.mp4", frames=20, fps=10, size=(32, 32))
    (folder / "clips/b.mp4").write_bytes(clip.read_bytes())
    Image.new("RGB", (32, 32)).save(folder / "clips/p.png")
    (folder / "clips/damaged.mp4").write_bytes(b"not a video at all")
    return folder


def question(*media: dict[str, Any], text: str = "What is it?") -> dict[str, Any]:
    return {"role": "user", "content": [*(media or [VIDEO]), {"type": "text", "text": text}]}


def answer(text: str = "A ball.") -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def row(**fields: Any) -> dict[str, Any]:
    return {"messages": [question(), answer()], **fields}


def showing(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [question(part), answer()]}


def video(path: str) -> dict[str, Any]:
    return {"type": "video", "video": path}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in rows))
    return path


def read_one(folder: Path, raw: Any, stage: Stage = "sft", **options: Any) -> Rows:
    return read_rows(write(folder / "one.jsonl", [raw]), stage, **options)


def test_a_row_has_its_clips_beside_its_file_and_what_verifies_it(folder: Path) -> None:
    rows = read_one(folder, row(choices=["red", "blue"], answer="B", span=[0.5, 1], kind="colour"))
    assert (len(rows), rows.rejected) == (1, [])
    only = rows[0]
    assert only.media == (("video", str(folder / "clips/a.mp4")),)
    assert (only.choices, only.answer, only.span, only.kind) == (("red", "blue"), 1, (0.5, 1.0), "colour")
    assert only.dataset == "one"
    _, items = read_messages(only.messages)  # what `build_inputs` begins with
    assert items[0].source == folder / "clips/a.mp4"
    assert [message["role"] for message in only.prompt()] == ["user"]


UNUSABLE: dict[str, tuple[Any, Stage, str]] = {
    "cut off": ('{"messages": [\n', "sft", "broken JSON"),
    "not an object": ("[1, 2]\n", "sft", "broken JSON"),
    "not UTF-8": ('{"messages": "\udcff"}\n', "sft", "broken JSON"),
    "no messages": ({"text": "hello"}, "sft", "malformed messages"),
    "messages are text": ({"messages": "hello"}, "sft", "malformed messages"),
    "no question": ({"messages": [answer()]}, "sft", "malformed messages"),
    "a clip answers": ({"messages": [question(), {**answer(), "content": [VIDEO]}]}, "sft", "malformed messages"),
    "an address": (showing(ADDRESS), "sft", "malformed messages"),
    "unknown role": ({"messages": [question(), {"role": "bot", "content": "x"}]}, "sft", "unknown role"),
    "unknown weight": ({"messages": [question(), {**answer(), "weight": 0.5}]}, "sft", "malformed messages"),
    "weight of true": ({"messages": [question(), {**answer(), "weight": True}]}, "sft", "malformed messages"),
    "no answer": ({"messages": [question()]}, "sft", "no answer"),
    "empty answer": ({"messages": [question(), answer(" ")]}, "cpt", "no answer"),
    "choices without the right one": (row(choices=["a", "b"]), "sft", "no answer"),
    "nothing to verify": (row(), "rl", "no answer"),
    "an answer without choices": (row(answer="red"), "rl", "no answer"),
    "letter beyond": (row(choices=["red", "blue"], answer="C"), "rl", "answer not among the choices"),
    "index beyond": (row(choices=["red", "blue"], answer=2), "rl", "answer not among the choices"),
    "text of none": (row(choices=["red", "blue"], answer="green"), "rl", "answer not among the choices"),
    "true is no index": (row(choices=["red", "blue"], answer=True), "rl", "answer not among the choices"),
    "equal choices": (row(choices=["red", "Red"], answer=0), "rl", "malformed choices"),
    "one choice": (row(choices=["red"], answer=0), "rl", "malformed choices"),
    "a clip that is not there": (showing(video("clips/c.mp4")), "sft", "missing clip"),
    "a folder for a clip": (showing(video("clips")), "sft", "missing clip"),
    "reversed span": (row(span=[1, 0.5]), "rl", "span reversed"),
    "empty span": (row(span=[1, 1]), "rl", "span reversed"),
    "span before the clip": (row(span=[-1, 1]), "rl", "span outside its clip"),
    "span after the clip": (row(span=[1, 4], duration=2.0), "rl", "span outside its clip"),
    "span of one number": (row(span=[1]), "rl", "malformed span"),
    "span of texts": (row(span=["1", "2"]), "rl", "malformed span"),
    "span that is not a number": (PLAIN + '"span": [NaN, 2]}\n', "rl", "malformed span"),
    "span without a video": (PLAIN + '"span": [0, 1]}\n', "rl", "span without a video"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_row_that_cannot_be_used_is_listed_with_its_line_and_reason(folder: Path, case: str) -> None:
    bad, stage, reason = UNUSABLE[case]
    good = row(span=[0, 1])
    file = folder / "mixed.jsonl"
    lines = [json.dumps(good) + "\n", "\n", bad if isinstance(bad, str) else json.dumps(bad) + "\n", json.dumps(good)]
    file.write_bytes("".join(lines).encode(errors="surrogateescape"))
    rows = read_rows(file, stage)
    assert len(rows) == 2
    assert [(each.file, each.line, each.reason) for each in rows.rejected] == [(str(file), 3, reason)]
    assert rows.rejected[0].detail and not rows.rejected[0].detail.endswith(".")
    assert rows.counts == {reason: 1}
    assert f"{reason} (1, first at {file}:3: " in rows.summary()


@pytest.mark.parametrize(
    ("stage", "usable"), [("cpt", [0, 1, 2]), ("sft", [0, 1, 2]), ("rl", [1, 2, 3]), ("distill", [0, 1, 2, 3])]
)
def test_each_stage_takes_the_rows_it_can_learn_from(folder: Path, stage: Stage, usable: list[int]) -> None:
    raw = [row(), row(span=[0, 1]), row(choices=["x", "y"], answer=1), {"messages": [question()], "span": [0, 1]}]
    assert [len(read_one(folder, each, stage)) for each in raw] == [int(index in usable) for index in range(4)]


@given(
    st.lists(st.text(string.ascii_letters + " 0123456789", min_size=2, max_size=9), min_size=2, max_size=8), st.data()
)
def test_the_right_choice_is_an_index_a_letter_or_a_text(texts: list[str], data: st.DataObject) -> None:
    choices = list({text.strip().casefold(): text for text in texts if len(text.strip()) > 1}.values())
    if len(choices) < 2:
        return
    index = data.draw(st.integers(0, len(choices) - 1))
    said = {"messages": [{"role": "user", "content": "Which?"}], "choices": choices}
    for right in (index, string.ascii_uppercase[index], string.ascii_lowercase[index], choices[index].upper()):
        assert parse_row({**said, "answer": right}, Path(), "rl").answer == index


def test_the_id_of_a_row_is_its_content_s(folder: Path, tmp_path: Path) -> None:
    here = read_rows(write(folder / "ids.jsonl", [row(kind="x"), row(span=[0, 1]), row()]))
    ids = [each.id for each in here]
    assert ids[0] == ids[2] != ids[1]  # the label and the line do not count
    (tmp_path / "clips").symlink_to(folder / "clips")
    turned = dict(reversed(row(span=[0, 1]).items()))
    assert read_rows(write(tmp_path / "moved.jsonl", [turned]))[0].id == ids[1]
    # sha256sum of {"answer": null, "choices": null, "messages": [{"content": "a", "role": "user"}], "span": null}
    plain = parse_row({"messages": [{"role": "user", "content": "a"}]}, Path(), "distill")
    assert plain.id == "0fd5fcd01d2e5718"


def test_a_row_may_say_which_frames_it_shows_and_which_tools_it_offers(folder: Path) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    shown = {**VIDEO, "times": [0.5, 1.5], "origin": 0.5}
    parsed = parse_row({**showing(shown), "tools": [tool]}, folder, "sft")
    (part, *_) = parsed.messages[0]["content"]
    assert parsed.tools == (tool,) and (part["times"], part["origin"]) == ([0.5, 1.5], 0.5)
    assert parsed.id != parse_row(showing(shown), folder, "sft").id != parse_row(showing(VIDEO), folder, "sft").id
    for tools in ([], {}, ["look"], "look"):
        with pytest.raises(RowError, match="list of functions"):
            parse_row({**row(), "tools": tools}, folder, "sft")
    with pytest.raises(RowError, match="ascending"):
        parse_row(showing({**VIDEO, "times": [1.5, 0.5]}), folder, "sft")


def test_a_large_file_is_indexed_and_not_held(tmp_path: Path) -> None:
    text = {"messages": [{"role": "user", "content": "x" * 10_000}, answer()]}
    file = write(tmp_path / "large.jsonl", [text] * 2_000)
    assert file.stat().st_size > 20e6
    tracemalloc.start()
    rows = read_rows(file)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 2_000 and held < 0.5e6 and peak < 2e6
    assert rows[1_999].messages[0]["content"] == "x" * 10_000
    assert rows[-1] == rows[0] and len(rows[5:9]) == 4
    with pytest.raises(IndexError):
        rows[2_000]


def test_rows_are_found_again_whatever_ends_their_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": [{"role": "user", "content": text}, answer()]}) for text in ("a", "日", "b")]
    (tmp_path / "odd.jsonl").write_bytes(f"{lines[0]}\r\n  \r\n {lines[1]}  \n\n{lines[2]}".encode())
    assert [each.messages[0]["content"] for each in read_rows(tmp_path / "odd.jsonl")] == ["a", "日", "b"]


def test_clips_are_opened_later_or_at_once(folder: Path) -> None:
    damaged = showing(video("clips/damaged.mp4"))
    late = row(span=[0.5, SECONDS + 0.6])
    for raw, reason in ((damaged, "unusable clip"), (late, "span outside its clip")):
        later = read_one(folder, raw, "distill")
        with pytest.raises(RowError) as found:
            later[0].check_media()
        assert found.value.reason == reason
        at_once = read_one(folder, raw, "distill", check_media=True)
        assert (len(at_once), at_once.counts) == (0, {reason: 1})
    # Annotations are rounded to up to whole seconds.
    assert len(read_one(folder, row(span=[0.5, SECONDS + 0.4]), "rl", check_media=True)) == 1


def test_what_proves_unusable_later_is_listed_once(folder: Path) -> None:
    rows = read_rows(write(folder / "later.jsonl", [row(), row()]))
    for _ in range(2):
        rows.reject(1, RowError("longer than the budget", "it takes 9 tokens"))
    assert [rows.is_usable(index) for index in range(2)] == [True, False]
    assert [(each.line, each.reason) for each in rows.rejected] == [(2, "longer than the budget")]
    assert rows.summary().startswith("1 rows; 1 cannot be used: longer than the budget (1, ")


CONVERSATIONS: list[tuple[dict[str, Any], list[list[str]]]] = [
    ({"video": "a.mp4", "conversations": [("human", "<video>\nWhat?"), ("gpt", "It.")]}, [["a.mp4", "What?"]]),
    ({"video": "a.mp4", "conversations": [("human", "<image>\nWhat?"), ("gpt", "It.")]}, [["a.mp4", "What?"]]),
    ({"video": "a.mp4", "conversations": [("human", "What?"), ("gpt", "It.")]}, [["a.mp4", "What?"]]),
    (
        {"video": ["a.mp4", "b.mp4"], "conversations": [("human", "Is <video> like <video>?"), ("gpt", "Yes.")]},
        [["Is ", "a.mp4", " like ", "b.mp4", "?"]],
    ),
    (
        {
            "video": ["a.mp4", "b.mp4"],
            "conversations": [("system", "Look."), ("human", "<video>A?"), ("gpt", "x"), ("human", "<video>B?")],
        },
        [["a.mp4", "A?"], ["b.mp4", "B?"]],
    ),
    (
        {"image": "p.png", "video": "a.mp4", "conversations": [("human", "<video>like <image>?"), ("gpt", "Yes.")]},
        [["a.mp4", "like ", "p.png", "?"]],
    ),
    ({"conversations": [("human", "What?"), ("gpt", "It.")]}, [["What?"]]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CONVERSATIONS)))
def test_media_of_conversations_stand_where_their_placeholders_are(folder: Path, case: int) -> None:
    raw, expected = CONVERSATIONS[case]
    turns = [{"from": who, "value": text} for who, text in raw["conversations"]]
    write(folder / "turns.jsonl", [{**raw, "conversations": turns}])
    meta = folder / "meta.json"
    meta.write_text(json.dumps({"some": {"annotation": "turns.jsonl", "root": "clips"}}))
    rows = read_rows(meta)
    assert rows.rejected == []
    asked = [message["content"] for message in rows[0].messages if message["role"] == "user"]
    parts = [[part.get("text") or Path(part[part["type"]]).name for part in content] for content in asked]
    assert parts == expected
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    assert [message["role"] for message in rows[0].messages] == [roles[turn["from"]] for turn in turns]


def test_messages_may_say_where_their_media_stand(folder: Path) -> None:
    part = {"type": "video_url", "video_url": {"url": "clips/a.mp4", "image_wh": [32, 32], "origin_fps": 10.0}}
    content = [part, {"type": "text", "text": "In <VIDEO_CONTEXT>\nwhat happens?"}]
    rows = read_one(folder, {"messages": [{"role": "user", "content": content}, answer()]})
    assert rows[0].messages[0]["content"] == [
        {"type": "text", "text": "In "},
        {"type": "video", "video": str(folder / "clips/a.mp4")},
        {"type": "text", "text": "what happens?"},
    ]


DISAGREE = "media and placeholders disagree"
CONTEXT_WITHOUT_MEDIA = [{"type": "text", "text": "<VIDEO_CONTEXT>?"}]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"video": "a.mp4", "conversations": [{"from": "human", "value": "<video><video>?"}]}, DISAGREE),
        ({"conversations": [{"from": "human", "value": "<video>?"}]}, DISAGREE),
        ({"conversations": [{"from": "robot", "value": "?"}]}, "unknown role"),
        ({"conversations": [{"from": "human", "value": 3}]}, "malformed messages"),
        ({"video": 3, "conversations": [{"from": "human", "value": "?"}]}, "malformed messages"),
        ({"messages": [{"role": "user", "content": CONTEXT_WITHOUT_MEDIA}]}, DISAGREE),
    ],
)
def test_conversations_that_cannot_be_read_are_listed(folder: Path, raw: dict[str, Any], reason: str) -> None:
    assert read_one(folder, raw).counts == {reason: 1}


def test_a_meta_file_joins_data_sets_with_their_shares(folder: Path) -> None:
    write(folder / "one.jsonl", [row(), row(span=[0, 1])])
    write(folder / "clips/two.jsonl", [showing(video("b.mp4")), "{"])
    meta = {
        "first": {"annotation": "one.jsonl", "repeat_time": 2, "length": 99, "data_augment": False},
        "second": {"annotation": "clips/two.jsonl", "sample_ratio": 0.5, "fps": 4},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    rows = read_rows(folder / "meta.json")
    assert rows.datasets == {"first": range(2), "second": range(2, 3)}
    assert rows.ratios == {"first": 2.0, "second": 0.5}
    assert [each.dataset for each in rows] == ["first", "first", "second"]
    assert [(Path(each.file).name, each.line) for each in rows.rejected] == [("two.jsonl", 2)]
    assert len(rows.notes) == 1 and "fps of 'second'" in rows.notes[0]


@pytest.mark.parametrize(("queries", "spans"), [("queries", "spans"), ("sentences", "timestamps")])
def test_temporal_grounding_becomes_questions_with_spans(folder: Path, queries: str, spans: str) -> None:
    content = {
        "a": {"duration": SECONDS, queries: [" a ball falls ", "it rolls"], spans: [[0, 0.73], [1.0, 1.5]]},
        "b.mp4": {"duration": SECONDS, queries: ["it stops"], spans: [[1.0, 9.0]]},
        "c": {"duration": SECONDS, queries: ["x"], spans: [[0, 1]]},
        "a.mp4": {"duration": SECONDS, queries: ["x", "y"], spans: [[0, 1]]},
        "clips": {"duration": SECONDS, queries: ["x"], spans: ["0-1"]},
    }
    (folder / "grounding.json").write_text(json.dumps(content))
    meta = {"found": {"annotation": "grounding.json", "media_root": "clips"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    rows = read_rows(folder / "meta.json", "rl")
    assert [each.span for each in rows] == [(0.0, 0.73), (1.0, 1.5)]
    assert {each.media for each in rows} == {(("video", str(folder / "clips/a.mp4")),)}
    assert '"a ball falls"' in rows[0].messages[0]["content"][1]["text"]
    # The answer that sft learns is one that the reward of rl reads.
    assert parse_span(rows[1].messages[1]["content"]) == rows[1].span
    assert [(each.line, each.reason) for each in rows.rejected] == [
        (3, "span outside its clip"),
        (4, "missing clip"),
        (5, "malformed span"),
        (6, "malformed span"),
    ]


def test_a_list_of_rows_in_one_json_file_is_read_as_well(folder: Path) -> None:
    (folder / "list.json").write_text(json.dumps([row(), 3]))
    rows = read_rows(folder / "list.json")
    assert len(rows) == 1 and rows.rejected[0].line == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "There is no readable file"),
        ("none.json", None, "cannot be read"),
        ("x.json", '{"messages": []}\n{"messages": []}\n', "must be named .jsonl"),
        ("x.json", "3", "neither an object nor a list"),
        ("x.json", '{"a": 3}', "'a' has no annotation"),
        ("x.json", '{"a": {"annotation": "none.jsonl"}}', "There is no readable file"),
        ("x.json", '{"a": {"annotation": "x.json", "sample_ratio": "2"}}', "sample_ratio of 'a' is '2'"),
        ("x.json", '{"a": {"annotation": "x.json"}}', "neither rows nor temporal grounding"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        read_rows(tmp_path / name)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and str(error.value).endswith(".")


def test_a_row_that_changed_after_reading_is_not_taken_for_what_it_was(folder: Path) -> None:
    file = write(folder / "changes.jsonl", [row()])
    rows = read_rows(file)
    file.write_text("{")
    with pytest.raises(RowError, match="not valid JSON"):
        rows[0]
