"""`make tiny-adapters`: what a LoRA can teach iv3-tiny's base, every trial with three seeds.

sft       a new kind of question, "before_after", among rows of the kinds that are known
rl        spans, rewarded by their temporal IoU
distill   to answer from one frame a second as the base does from four

OUT/data/            rows and clips
OUT/<trial>-<seed>/  the runs, as `iv3 train` leaves them
OUT/adapters.json    what was measured on held-out clips before and after, of every seed
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ivcore.backend import load
from ivcore.errors import IvError
from ivcore.files import write_beside
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from train.clips import ClipCache
from train.distill import teacher_framing
from train.evaluate import evaluate
from train.loop import Job
from train.loop import train as run_stage
from train.recipe import DistillRecipe, Recipe
from train.recipe_file import read_recipe
from train.rows import read_rows
from train.run_folder import EVALUATIONS, RUN
from train.samples import Framing, SampleBuilder
from train.tiny.bar import Bar
from train.tiny.base import HELDOUT_CLIPS, TRAIN_CLIPS
from train.toyworld.dataset import BASE_SHARES, write_dataset

NEW_KIND = "before_after"
SEEDS = (0, 1, 2)
SHARES: dict[str, Mapping[str, float]] = {
    "sft": {**{kind: share / 2 for kind, share in BASE_SHARES.items()}, NEW_KIND: 0.5},
    "rl": {"when": 1.0},
    "distill": {
        "direction": 0.3,
        "when": 0.2,
        "order": 0.2,
        "shape": 0.15,
        "colour": 0.05,
        "count": 0.05,
        "said": 0.05,
    },
}
"""Of the kinds of question in each trial's training rows; for distill most of those that few frames are too few for."""

TRAIN = {"sft": 12_000, "rl": 2_000, "distill": 8_000}
"""Clips of each trial, none of which the base has seen."""

HELDOUT = {"new": (200, {NEW_KIND: 1.0}), "said": (1_000, {"said": 1.0}), "spans": (300, {"when": 1.0})}
"""Held-out clips beside those of the base. It hardly reads subtitles, and where it guesses, the few rows of its own set
rise and fall by more than what is to be told from them."""

CACHE_BYTES = 10 << 30
Kinds = Mapping[str, float]


def main() -> None:
    """Run what is not done of the trials and print their table; exit 1 with one sentence where that fails."""
    parser = argparse.ArgumentParser(description="What a LoRA can teach iv3-tiny's base.")
    parser.add_argument("--base", type=Path, default=Path("build/tiny-base"), help="the folder of make tiny-base")
    parser.add_argument("--out", type=Path, default=Path("build/tiny-adapters"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--trial", choices=SHARES, action="append", help="only this one; may be repeated")
    given = parser.parse_args()
    try:
        make_adapters(given.base, given.out, given.trial or list(SHARES), given.overrides)
    except IvError as error:
        sys.exit(f"tiny-adapters: {error}")


def make_adapters(base: Path, out: Path, trials: list[str], overrides: list[str]) -> dict[str, Any]:
    """Each trial's figures by kind: `before`, for distill the `teacher`'s, and `after`, a list over SEEDS.

    overrides: of the recipes' values.
    """
    out.mkdir(parents=True, exist_ok=True)
    heldout = _write_data(base, out, trials)
    found: dict[str, Any] = {}
    for trial in trials:
        recipe = read_recipe(f"tiny/lora-{trial}", overrides)
        measured = out / f"{trial}-before.json"
        if not measured.exists():
            write_beside(measured, json.dumps(_before(base, out, recipe, heldout[trial])).encode())
        found[trial] = json.loads(measured.read_text(encoding="utf-8"))
        found[trial]["after"] = [_run(base, out, trial, heldout[trial], [*overrides, f"seed={seed}"]) for seed in SEEDS]
        write_beside(out / "adapters.json", (json.dumps(found, indent=1) + "\n").encode())
        print(_table(trial, found[trial]), flush=True)
    return found


def _write_data(base: Path, out: Path, trials: list[str]) -> dict[str, Path]:
    """Training rows of the trials; the held-out rows of each."""
    data, workers = out / "data", os.cpu_count() or 1
    for trial in trials:
        if not (data / trial / "train.jsonl").exists():
            write_dataset(data / trial, "train", TRAIN_CLIPS, TRAIN[trial], shares=SHARES[trial], workers=workers)
    for name, (clips, shares) in HELDOUT.items():
        if not (data / name / "heldout.jsonl").exists():
            write_dataset(data / name, "heldout", HELDOUT_CLIPS, clips, shares=shares, workers=workers)
    known, new, said = ((folder / "heldout.jsonl").resolve() for folder in (base / "data", data / "new", data / "said"))
    together = data / "known-and-new.json"
    meta = {file.parent.name: {"annotation": str(file), "media_root": str(file.parent)} for file in (known, new, said)}
    write_beside(together, json.dumps(meta).encode())
    return {"sft": together, "rl": data / "spans/heldout.jsonl", "distill": known}


def _before(base: Path, out: Path, recipe: Recipe, heldout: Path) -> dict[str, Kinds]:
    """What the base answers; where it is a teacher, also from as many frames as that one has."""
    data = recipe.data
    student = Framing(data.fps, data.min_frames, data.max_frames, data.frame_tokens)
    found = {"before": _measure(base, out, student, heldout)}
    if isinstance(recipe, DistillRecipe):
        found["teacher"] = _measure(base, out, teacher_framing(recipe.teacher, student), heldout)
    return found


def _measure(base: Path, out: Path, framing: Framing, heldout: Path) -> Kinds:
    tokenizer = Tokenizer.from_dir(base / "model")
    clips = ClipCache(out / "cache", CACHE_BYTES)
    builder = SampleBuilder(tokenizer, framing, partial(build_inputs, videos=clips))
    model = load(base / "model", "torch", "float32")
    return {
        name: kind.value for name, kind in evaluate(model, tokenizer, read_rows(heldout, "rl"), builder).kinds.items()
    }


def _run(base: Path, out: Path, trial: str, heldout: Path, overrides: list[str]) -> Kinds:
    recipe = read_recipe(f"tiny/lora-{trial}", overrides)
    run = out / f"{trial}-{recipe.seed}"
    if not (run / "adapter").exists():
        job = Job(
            recipe, str(base / "model"), str(out / "data" / trial / "train.jsonl"), run, "torch", "float32",
            cache=out / "cache", held_out=str(heldout),
        )  # fmt: skip
        with Bar(run.name) as bar:
            run_stage(job, resume=(run / RUN).exists(), on_progress=bar)
    last = json.loads((run / EVALUATIONS).read_text(encoding="utf-8").splitlines()[-1])
    return {name: kind["value"] for name, kind in last["kinds"].items()}


def _table(trial: str, found: Mapping[str, Any]) -> str:
    """Markdown: a row a kind, with the mean over seeds and their spread (largest less least)."""
    teacher = "teacher" in found
    lines = [
        f"| {trial} | before |{' teacher |' if teacher else ''} after | spread |",
        "|---" * (5 if teacher else 4) + "|",
    ]
    for kind in sorted(found["before"]):
        after = [each[kind] for each in found["after"]]
        cells = [found["before"][kind], *([found["teacher"][kind]] if teacher else [])]
        cells += [statistics.mean(after), max(after) - min(after)]
        lines.append(f"| {kind} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
