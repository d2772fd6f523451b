"""Small runs of the supervised stages: data of every kind of medium, recipes, and what of a run must be the same."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import train.loop
from ivcore.backend import load
from ivcore.errors import IvError
from ivcore.prompt import build_inputs
from train.loop import Job
from train.recipe_file import parse_recipe
from train.run_folder import RunFolder
from train.toyworld.dataset import write_dataset

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
MICRO = REFERENCE / "iv3-micro"
TIMING = ("seconds", "tokens_per_second", "peak_bytes")
END = 504
"""<|im_end|>, which closes every turn."""

LORA: dict[str, Any] = {"lora": {"rank": 3, "dropout": 0.25}}
FULL: dict[str, Any] = {"full": True}


def said(question: Any, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def text_rows(count: int) -> list[dict[str, Any]]:
    """Rows of different lengths, none the same."""
    return [said(f"What is {number}?", "one " * (number % 4) + f"more than {number - 1}.") for number in range(count)]


def media_rows(folder: Path) -> list[dict[str, Any]]:
    """A row with an image, and two with a clip of the toy world; the files are written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    picture = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "What is this?"}]
    rows = write_dataset(folder, "train", 0, 2, shares={"colour": 1.0}).read_text(encoding="utf-8").splitlines()
    return [said(picture, "Noise."), *map(json.loads, rows)]


def write_rows(file: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    """A JSONL of rows; a text is a line as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def recipe(**changes: Any) -> Any:
    """A short sft; a table is laid over the one that is there."""
    raw: dict[str, Any] = {
        "stage": "sft",
        "steps": 4,
        "batch": 2,
        "save_every": 2,
        "checkpointing": False,
        "learning_rate": {"peak": 1e-2, "warmup": 0.25},
        "data": {"max_tokens": 256, "window": 3, "max_frames": 4},
        "lora": {"rank": 3},
    }
    for name, value in changes.items():
        raw[name] = {**raw.get(name, {}), **value} if isinstance(value, dict) else value
    if "phases" in changes:
        del raw["steps"]
    return parse_recipe(raw)


def job(
    out: Path, rows: Path, backend: str = "torch", /, *, model: Path | str = MICRO, dtype: Any = None, **changes: Any
) -> Job:
    """A run of a `recipe` with changes."""
    return Job(recipe(**changes), str(model), str(rows), out, backend, dtype)  # type: ignore[arg-type]


class Stopped(BaseException):
    """A run was stopped, as by Ctrl-C."""


def run(job: Job, *, stop: int | None = None, **how: Any) -> RunFolder:
    """Run a job; raises Stopped after the step `stop`."""

    def progress(step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        if step == stop:
            raise Stopped

    return train.loop.train(job, on_progress=progress, **how)


def refused(job: Job, **how: Any) -> str:
    """The one sentence with which a job ends."""
    with pytest.raises(IvError) as caught:
        run(job, **how)
    return one_sentence(str(caught.value))


def one_sentence(text: str) -> str:
    assert (
        text.endswith((".", "?")) and "\n" not in text and "  " not in text and ".." not in text.replace("...", "")
    ), text
    return text


def trainers(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None] = lambda trainer: None) -> list[Any]:
    """The trainers of the runs to come, each changed as it is made."""
    made: list[Any] = []
    make = train.loop.make_trainer

    def keep(*given: Any) -> Any:
        made.append(make(*given))
        change(made[-1])
        return made[-1]

    monkeypatch.setattr(train.loop, "make_trainer", keep)
    return made


def logits(path: Path, backend: str, inputs: Any, adapter: Path | None = None) -> np.ndarray:
    """float32 (S, vocab) of a checkpoint, with an adapter."""
    model = load(path, backend)  # type: ignore[arg-type]
    if adapter is not None:
        importlib.import_module(f"iv{backend}.lora").load_adapter(model, adapter)
    return np.asarray(model.logits(inputs), np.float32)


def absolute(row: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The messages of a row with the paths of media as `build_inputs` takes them."""
    return json.loads(json.dumps(row["messages"]), object_hook=lambda each: _absolute(each, folder))


def _absolute(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    kind = part.get("type")
    return {**part, kind: str(folder / part[kind])} if kind in ("image", "video") else part


def inputs_of(row: Mapping[str, Any], folder: Path, model: Path = MICRO, **how: Any) -> tuple[Any, int]:
    """A row's conversation up to the end of its only answer, as a model takes it, and where the answer begins."""
    messages = absolute(row, folder)
    whole = build_inputs(model, messages, add_generation_prompt=False, **how)
    start = len(build_inputs(model, messages[:-1], add_generation_prompt=True, **how).token_ids)
    assert whole.token_ids[start:].tolist().count(END) == 1  # and after it, a line break
    return whole, start


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def metrics(out: Path) -> list[dict[str, Any]]:
    """The run's metrics but for those of the clock and of memory."""
    return [{key: each[key] for key in each if key not in TIMING} for each in lines(out / "metrics.jsonl")]


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder by its relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def outcome(out: Path) -> dict[str, Any]:
    """What a resumed run must share with an undisturbed one: everything but times and cached clips."""
    kept = {name: content for name, content in files(out).items() if not name.startswith("clips/")}
    return {**kept, "metrics.jsonl": metrics(out)}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Like ==, but names what differs instead of printing the weights."""
    differing = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
    assert not differing, differing


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
