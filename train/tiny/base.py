"""`make tiny-base`: clips, an untrained checkpoint, its vision tower, then all of it; what is done is not done again.

OUT/data/      train.jsonl, heldout.jsonl and their clips
OUT/start/     the untrained checkpoint; OUT/tower/: with its vision tower trained
OUT/sft/       the run that trains all of it, as `iv3 train sft --recipe tiny/base` does
OUT/model/     the result, with what it was measured to answer in base.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from ivcore.errors import IvError
from ivcore.files import write_beside
from train.loop import Job
from train.loop import train as run_stage
from train.recipe_file import read_recipe
from train.run_folder import EVALUATIONS, RUN
from train.tiny.bar import Bar
from train.tiny.start import write_start
from train.tiny.tower import train_tower
from train.toyworld.dataset import write_dataset

TRAIN_CLIPS, HELDOUT_CLIPS = 30_000, 500
TOWER_STEPS = 1200
HELDOUT_SHARES = {"colour": 0.1, "shape": 0.1, "direction": 0.1, "when": 0.1, "count": 0.25, "order": 0.25, "said": 0.1}
GOALS = {"colour": 0.95, "shape": 0.95, "direction": 0.95, "count": 0.9, "order": 0.85, "when": 0.7}


def main() -> None:
    """Make the base in a folder; exit 1 with one sentence where that fails."""
    parser = argparse.ArgumentParser(description="Train iv3-tiny's base from nothing.")
    parser.add_argument("--out", type=Path, default=Path("build/tiny-base"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    try:
        make_base(given.out, given.overrides)
    except IvError as error:
        sys.exit(f"tiny-base: {error}")


def make_base(out: Path, overrides: list[str]) -> Path:
    """The folder of the base, made by as many of the steps as are not done; overrides: of the recipe's values."""
    out.mkdir(parents=True, exist_ok=True)
    workers = os.cpu_count() or 1
    data = out / "data"
    for split, clips, shares in (("train", TRAIN_CLIPS, None), ("heldout", HELDOUT_CLIPS, HELDOUT_SHARES)):
        if not (data / f"{split}.jsonl").exists():
            print(f"rendering {clips:,} {split} clips", file=sys.stderr)
            more = {"shares": shares, "all_kinds": True} if shares else {}
            write_dataset(data, split, 0, clips, workers=workers, **more)  # type: ignore[arg-type]
    start, tower, run = write_start(out / "start"), out / "tower", out / "sft"
    if not (out / "tower.json").exists():  # written last: a folder may have been left half-written
        with Bar("tower") as bar:
            found = train_tower(start, tower, steps=TOWER_STEPS, on_progress=bar)
        write_beside(out / "tower.json", json.dumps(found, indent=1).encode())
        print("tower:", "  ".join(f"{name} {value:.3f}" for name, value in found.items()), file=sys.stderr)
    if not (out / "model/base.json").exists():
        recipe = read_recipe("tiny/base", overrides, stage="sft")
        job = Job(
            recipe, str(tower), str(data / "train.jsonl"), run, "torch", "float32",
            cache=out / "cache", held_out=str(data / "heldout.jsonl"),
        )  # fmt: skip
        with Bar("sft") as bar:
            run_stage(job, resume=(run / RUN).exists(), on_progress=bar)
    return _finish(out, run)


def _finish(out: Path, run: Path) -> Path:
    """The result with its figures, and whether they reach the goals."""
    model = out / "model"
    shutil.copytree(run / "model", model, dirs_exist_ok=True)
    last = json.loads((run / EVALUATIONS).read_text(encoding="utf-8").splitlines()[-1])
    write_beside(model / "base.json", (json.dumps(last, indent=1) + "\n").encode())
    print(f"{'kind':<12}{'rows':>6}  {'measure':<10}{'value':>7}{'goal':>7}")
    for name, kind in sorted(last["kinds"].items()):
        goal = GOALS.get(name)
        print(f"{name:<12}{kind['rows']:>6}  {kind['measure']:<10}{kind['value']:>7.3f}{goal if goal else '':>7}")
    print(model)
    return model


if __name__ == "__main__":
    main()
