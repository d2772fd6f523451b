"""Data sets on disk: rows that the rest of the project reads, splits that never meet, and runs that go on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ivcore import build_inputs
from ivcore.inputs import ModelInputs
from ivcore.tokenizer import Tokenizer
from train.toyworld import dataset
from train.toyworld.compose import KINDS, make_script
from train.toyworld.dataset import BASE_SHARES, LONG_SHARES, kind_of, write_dataset
from train.toyworld.questions import NOT_THERE, ask
from train.toyworld.script import seeds, split_of
from train.toyworld.tokenizer import write_tokenizer

EVERY_KIND = dict.fromkeys(KINDS, 1.0)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_dir(folder)


def prompt(tokenizer: Tokenizer, row: dict[str, Any], folder: Path) -> ModelInputs:
    (user, _) = row["messages"]
    video, text = user["content"]
    content = [{**video, "video": str(folder / video["video"])}, text]
    return build_inputs(tokenizer, [{"role": "user", "content": content}])


def test_a_short_clip_becomes_eight_frames_of_sixteen_tokens_a_temporal_patch(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for row in rows_of(write_dataset(tmp_path, "train", 0, 8, shares=EVERY_KIND)):
        inputs = prompt(tokenizer, row, tmp_path)
        assert inputs.pixels is not None and inputs.grid_thw is not None
        assert inputs.grid_thw.tolist() == [[4, 8, 8]] and inputs.pixels.shape == (256, 3 * 2 * 8 * 8)
        assert int((inputs.token_ids == tokenizer.token_id("<|video_pad|>")).sum()) == 4 * 16
        text = tokenizer.decode(inputs.token_ids)
        assert row["messages"][0]["content"][1]["text"] in text
        assert all(time in text for time in ("<0.3 seconds>", "<1.4 seconds>", "<2.5 seconds>", "<3.6 seconds>"))


def test_a_long_clip_keeps_its_size(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (row,) = rows_of(write_dataset(tmp_path, "heldout", 0, 1, shares={"rare": 1.0}, duration=40.0))
    inputs = prompt(tokenizer, row, tmp_path)
    assert inputs.grid_thw is not None and inputs.grid_thw.tolist() == [[40, 8, 8]]


def test_rows_say_what_a_reward_needs(tmp_path: Path) -> None:
    rows = rows_of(write_dataset(tmp_path, "heldout", 10, 40, shares=EVERY_KIND))
    assert {row["kind"] for row in rows} == set(KINDS)
    for row, seed in zip(rows, seeds("heldout", 10, 40), strict=True):
        question = ask(make_script(seed, row["kind"]))
        user, assistant = row["messages"]
        assert (user["role"], assistant) == ("user", {"role": "assistant", "content": question.answer})
        assert user["content"][1]["text"].endswith(question.text) and (tmp_path / user["content"][0]["video"]).is_file()
        assert user["content"][1]["text"].startswith("Subtitles:\n") == question.read
        assert row["seed"] == seed and row["duration"] == 4.0
        if row["kind"] == "when":
            assert row["span"] == list(question.span or ()) and "choices" not in row
        elif row["kind"] == "absent":
            assert row["evidence"] is None and assistant["content"] == NOT_THERE
        if "choices" in row:
            assert row["choices"][row["answer"]] == question.answer and "span" not in row


def test_splits_share_no_seed_and_no_clip(tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        write_dataset(tmp_path, split, 0, 12)
    train, heldout = (rows_of(tmp_path / f"{split}.jsonl") for split in ("train", "heldout"))
    assert {split_of(row["seed"]) for row in train} == {"train"}
    assert {split_of(row["seed"]) for row in heldout} == {"heldout"}
    clips = [(tmp_path / row["messages"][0]["content"][0]["video"]).read_bytes() for row in train + heldout]
    assert len(set(clips)) == 24


def test_an_interrupted_run_goes_on_to_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_dataset(whole, "train", 3, 9)
    written: list[str] = []
    original = dataset.write_clip

    def stop_at_fifth(path: Path, *args: Any) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(Path(path).name)
        original(path, *args)

    monkeypatch.setattr(dataset, "write_clip", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(broken, "train", 3, 9)
    assert not (broken / "train.jsonl").exists()

    def count(path: Path, *args: Any) -> None:
        written.append(Path(path).name)
        original(path, *args)

    monkeypatch.setattr(dataset, "write_clip", count)
    write_dataset(broken, "train", 3, 9)
    assert len(written) == len(set(written)) == 9
    assert contents(whole) == contents(broken)


def test_several_processes_write_the_same_data_set(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", "train", 0, 20)
    write_dataset(tmp_path / "two", "train", 0, 20, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("shares", [BASE_SHARES, LONG_SHARES, {"colour": 3, "when": 1, "order": 0}])
def test_kinds_come_in_their_shares(shares: dict[str, float]) -> None:
    counts = Counter(kind_of(seed, shares) for seed in seeds("train", 0, 4000))
    for kind, share in shares.items():
        part = share / sum(shares.values())
        assert abs(counts[kind] - 4000 * part) <= 4 * (4000 * part * (1 - part)) ** 0.5


def test_the_new_kind_of_question_is_not_in_the_base_mix() -> None:
    assert not {"before_after", "absent"} & (set(BASE_SHARES) | set(LONG_SHARES))


@pytest.mark.parametrize("shares", [{"taste": 1.0}, {"colour": 0.0}, {"colour": 2.0, "when": -1.0}])
def test_shares_that_cannot_be_are_refused(shares: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shares"):
        write_dataset(tmp_path, "train", 0, 1, shares=shares)
