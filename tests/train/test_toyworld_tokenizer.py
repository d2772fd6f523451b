"""The small BPE: the same bytes every time, exact round trips, lone digits, and one token a word of the world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivcore.processor import ProcessorConfig
from ivcore.tokenizer import Tokenizer
from train.toyworld.compose import KINDS, make_script
from train.toyworld.questions import ask
from train.toyworld.script import seeds
from train.toyworld.subtitles import transcript
from train.toyworld.tokenizer import SPECIAL, WRITTEN, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_dir(folder)


def test_another_process_with_another_hash_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    code = f"from train.toyworld.tokenizer import write_tokenizer; write_tokenizer({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "77"})
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert written == {path.name: path.read_bytes() for path in tmp_path.iterdir()} and len(written) == 5


def test_there_are_about_a_thousand_tokens_and_ids_without_gaps(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]
    assert sorted(ids) == list(range(len(ids))) and 800 <= len(ids) <= 1024


def test_the_tokens_that_the_model_needs_are_there(folder: Path, tokenizer: Tokenizer) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    assert [(token["content"], token["special"]) for token in content["added_tokens"]] == [
        *((token, True) for token in SPECIAL),
        *((token, False) for token in WRITTEN),
    ]
    for token in SPECIAL + WRITTEN:
        assert tokenizer.encode(token) == [tokenizer.token_id(token)]
    assert tokenizer.stop_ids == {tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>")}


@settings(max_examples=80)
@given(st.text(max_size=40))
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@settings(max_examples=50)
@given(st.decimals(0, 99999, places=2, allow_nan=False))
def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer, number: object) -> None:
    text = f"From {number} to {number}: <{number} seconds>"
    pieces = [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]
    assert all(piece.isdigit() and len(piece) == 1 for piece in pieces if any(map(str.isdigit, piece)))


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_texts_take_one_token_a_word(tokenizer: Tokenizer, kind: str) -> None:
    for seed in seeds("heldout", 0, 30):
        script = make_script(seed, kind, 16.0)
        question = ask(script)
        words = question.text.replace("?", " ?").replace(".", " .").replace(",", " ,").split()
        assert len(tokenizer.encode(question.text)) == len(words)
        for line in transcript(script.lines).splitlines():
            text = line.split(": ")[1]
            assert len(tokenizer.encode(text)) == len(text.replace(".", " .").split())


def test_the_processor_cuts_pictures_into_patches_of_eight(folder: Path) -> None:
    config = ProcessorConfig.from_dir(folder)
    assert (config.patch_size, config.temporal_patch_size, config.merge_size, config.fps) == (8, 2, 2, 2.0)
