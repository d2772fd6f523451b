"""`make tiny-base`: its decoder learns to read, its vision tower to see, then all of it; nothing is done twice.

OUT/data/      train.jsonl, heldout.jsonl and their clips; rows of text alone
OUT/start/     the untrained checkpoint
OUT/text/      the run that trains the decoder on text
OUT/tower/     what came of it, with its vision tower trained
OUT/sft/       the run that trains all of it
OUT/model/     the result; OUT/base.json: what it was measured to answer
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ivcore.errors import IvError
from ivcore.files import write_beside
from train.run_folder import EVALUATIONS, RUN
from train.tiny.bar import Bar
from train.tiny.commands import add_processes, processes_for, run_module
from train.tiny.start import write_start
from train.tiny.tower import train_tower
from train.toyworld.dataset import BASE_SHARES, write_about, write_dataset
from train.toyworld.descriptions import description
from train.toyworld.echoes import write_echoes
from train.toyworld.pairs import write_pairs
from train.toyworld.script import SHORT_SECONDS, Script
from train.toyworld.stills import write_stills
from train.toyworld.talks import talk
from train.toyworld.texts import write_texts

TRAIN_CLIPS, HELDOUT_CLIPS = 30_000, 500
STILLS, ECHOES, PAIRS, TEXTS = 20_000, 20_000, 12_000, 12_000
ROWS = "rows.json"
MADE: Mapping[str, Callable[[Script], dict[str, Any] | None]] = {"talks": talk, "descriptions": description}
"""What else is made of the scripts behind clips."""

TOWER_STEPS = 1200
DTYPES = {"text": "float32", "base": "bfloat16"}
HELDOUT_SHARES = {"colour": 0.1, "shape": 0.1, "direction": 0.1, "when": 0.1, "count": 0.25, "order": 0.25, "said": 0.1}
GOALS = {"colour": 0.95, "shape": 0.95, "direction": 0.95, "count": 0.9, "order": 0.85, "when": 0.7}


def main() -> None:
    """Make the base in a folder; exit 1 with one sentence where that fails."""
    parser = argparse.ArgumentParser(description="Train iv3-tiny's base from nothing.")
    parser.add_argument("--out", type=Path, default=Path("build/tiny-base"))
    add_processes(parser)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    try:
        make_base(given.out, given.overrides, given.processes)
    except IvError as error:
        sys.exit(f"tiny-base: {error}")


def make_base(out: Path, overrides: list[str], processes: int = 1) -> Path:
    """The folder of the base, made by as many of the steps as are not done; overrides: of the recipes' values."""
    out.mkdir(parents=True, exist_ok=True)
    data = write_clips(out / "data")
    start, text, tower, run = write_start(out / "start"), out / "text", out / "tower", out / "sft"
    if not (text / "model/config.json").exists():
        _train("text", start, write_rows(data), text, overrides, processes)
    if not (out / "tower.json").exists():  # written last: a folder may have been left half-written
        with Bar("tower") as bar:
            found = train_tower(text / "model", tower, steps=TOWER_STEPS, on_progress=bar)
        write_beside(out / "tower.json", json.dumps(found, indent=1).encode())
        print("tower:", "  ".join(f"{name} {value:.3f}" for name, value in found.items()), file=sys.stderr)
    if not (out / "base.json").exists():
        held_out = "--held-out", str(data / "heldout.jsonl")
        _train("base", tower, write_rows(data), run, overrides, processes, *held_out)
    return _finish(out, run)


def write_clips(data: Path) -> Path:
    """The base's clips and the questions about them, in `data`, which is returned."""
    for split, clips, shares in (("train", TRAIN_CLIPS, None), ("heldout", HELDOUT_CLIPS, HELDOUT_SHARES)):
        if not (data / f"{split}.jsonl").exists():
            print(f"rendering {clips:,} {split} clips", file=sys.stderr)
            more = {"shares": shares, "all_kinds": True} if shares else {}
            write_dataset(data, split, 0, clips, workers=os.cpu_count() or 1, **more)  # type: ignore[arg-type]
    return data


def write_rows(data: Path) -> Path:
    """All rows beside those about clips, in `data`; returns the meta file that names every set."""
    for name, write, count in (
        ("stills", write_stills, STILLS),
        ("echoes", write_echoes, ECHOES),
        ("pairs", write_pairs, PAIRS),
        ("texts", write_texts, TEXTS),
    ):
        if not (data / name / "train.jsonl").exists():
            write(data / name, "train", 0, count)
    for kind, make in MADE.items():
        if not (file := data / f"{kind}.jsonl").exists():
            write_about(file, make, "train", 0, TRAIN_CLIPS, shares=BASE_SHARES, duration=SHORT_SECONDS)
    sets = ("stills", "echoes", "pairs", "texts")
    files = {"clips": data / "train.jsonl", **{kind: data / f"{kind}.jsonl" for kind in MADE}}
    files |= {name: data / name / "train.jsonl" for name in sets}
    files |= {f"{name}-talks": data / name / "talks.jsonl" for name in ("stills", "pairs")}
    meta = {
        name: {"annotation": str(file.resolve()), "media_root": str(file.resolve().parent)}
        for name, file in files.items()
    }
    write_beside(data / ROWS, json.dumps(meta).encode())
    return data / ROWS


def _train(recipe: str, model: Path, rows: Path, run: Path, overrides: list[str], processes: int, *more: str) -> None:
    changed = [argument for each in overrides for argument in ("--set", each)]
    arguments = (
        "train", "sft", "--recipe", f"tiny/{recipe}", "--model", str(model), "--data", str(rows), "--out", str(run),
        "--backend", "torch", "--dtype", DTYPES[recipe], *changed, *more,
    )  # fmt: skip
    resume = ("--resume",) if (run / RUN).exists() else ()
    run_module(f"The step {recipe}", "agent.cli", *arguments, *resume, processes=processes_for(arguments, processes))


def _finish(out: Path, run: Path) -> Path:
    """The result with its figures, and whether they reach the goals."""
    model = out / "model"
    shutil.copytree(run / "model", model, dirs_exist_ok=True)
    last = json.loads((run / EVALUATIONS).read_text(encoding="utf-8").splitlines()[-1])
    write_beside(out / "base.json", (json.dumps(last, indent=1) + "\n").encode())
    print(f"{'kind':<12}{'rows':>6}  {'measure':<10}{'value':>7}{'goal':>7}")
    for name, kind in sorted(last["kinds"].items()):
        goal = GOALS.get(name)
        print(f"{name:<12}{kind['rows']:>6}  {kind['measure']:<10}{kind['value']:>7.3f}{goal if goal else '':>7}")
    print(model)
    return model


if __name__ == "__main__":
    main()
