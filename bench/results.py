"""What iv3-tiny answers at every step of its making, into docs/results.md; what was measured is not measured again.

    python bench/results.py [--base build/tiny-base] [--tiny build/tiny] [--jobs 2]

Every checkpoint's answers, its speed and what it was measured from are kept in TINY/results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from agent.calibration import mixture
from bench.memory import environment
from bench.results_page import document
from convert.m2la.options import PLAIN_SVD, Method, Options
from convert.m2la.run import convert_attention
from ivcore.backend import BackendName, load
from ivcore.files import write_beside
from ivcore.inputs import ModelInputs
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from train.clips import ClipCache
from train.evaluate import JUDGE
from train.rows import read_rows
from train.samples import Framing, SampleBuilder
from train.tiny.pipeline import CHAIN, LAYOUTS, RATIOS, SEEDS, TINY

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = 64
ABLATIONS: Mapping[str, Method] = {
    "no rotation of heads": Method(rotation=False),
    "no turn within a frequency": Method(turns=False),
    "no balance": Method(balance=False),
    "not attention-aware": Method(attention_aware=False),
    "all layers alike": Method(per_layer=False),
    "joint SVD of the weights": PLAIN_SVD,
}
USUAL, FEW, MANY = Framing(fps=2.0), Framing(fps=1.0, min_frames=4), Framing(fps=4.0)
"""How clips are seen: as the processor's config says; as the student of the last stage sees them, and its teacher."""

VIEWS: Mapping[str, tuple[str, Framing]] = {
    "short": ("short", USUAL),
    "long": ("long", USUAL),
    "few": ("known", FEW),
    "many": ("known", MANY),
}
"""Held-out rows, and how their clips are seen."""

BACKENDS: tuple[BackendName, ...] = ("torch", "mlx")

PROMPT, DECODED, RUNS = 1024, 64, 5
"""Tokens of the prompt and of the answer whose speed is measured, and how often."""


@dataclass(frozen=True)
class Entry:
    """A row of a table; folders: its checkpoints, one a seed where it was trained."""

    name: str
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Task:
    """A checkpoint and what it is asked, in one process."""

    folder: Path
    views: tuple[str, ...]
    backend: BackendName = "torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("build/tiny-base"))
    parser.add_argument("--tiny", type=Path, default=Path("build/tiny"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results.md")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args()
    out = given.tiny / "results"
    if given.task:
        folder, views, backend = json.loads(given.task)
        work(out, Task(Path(folder), tuple(views), backend))
        return
    write_rows(given.base, given.tiny, out)
    ablated = convert_ablations(given.base / "model", out)
    table = list(entries(given.base, given.tiny))
    tasks = [Task(folder, tuple(views_of(entry.name))) for entry in table for folder in entry.folders]
    tasks += [Task(folder, ("short",)) for entry in ablated for folder in entry.folders]
    twins = [folder for folder in (given.tiny / f"final-{SEEDS[0]}", given.tiny / TINY) if folder.exists()]
    tasks += [Task(folder, ("short", "long"), "mlx") for folder in twins]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(partial(start, given, out), tasks))
    speeds = {entry.name: speed(out, entry.folders[0]) for entry in table}
    page = document(
        table={entry.name: [kept(out, folder) for folder in entry.folders] for entry in table},
        ablated={entry.name: [kept(out, folder) for folder in entry.folders] for entry in ablated},
        twins={folder.name: [kept(out, folder, backend) for backend in BACKENDS] for folder in twins},
        folders={entry.name: entry.folders[0] for entry in [*table, *ablated]},
        speeds=speeds,
    )
    write_beside(given.out, page.encode())
    print(given.out)


def entries(base: Path, tiny: Path) -> Iterator[Entry]:
    """The rows of the table that there are, in the order of the recipe."""
    variants = [f"{layout}-{ratio}" for layout in LAYOUTS for ratio in RATIOS]
    all_of_them = [Entry("base", (base / "model",))]
    all_of_them += [Entry(f"{variant}, converted", (tiny / variant,)) for variant in variants]
    all_of_them += [
        Entry(f"{variant}, cpt", tuple(tiny / f"{variant}-cpt-{seed}/model" for seed in SEEDS)) for variant in variants
    ]
    for stage in CHAIN[:-1]:
        all_of_them.append(Entry(stage, tuple(tiny / f"{stage}-{seed}/model" for seed in SEEDS)))
    all_of_them.append(Entry(CHAIN[-1], tuple(tiny / f"final-{seed}" for seed in SEEDS)))
    all_of_them.append(Entry("iv3-tiny, 8 bits", (tiny / TINY,)))
    for entry in all_of_them:
        there = tuple(folder for folder in entry.folders if (folder / "config.json").exists())
        if there:
            yield replace(entry, folders=there)


def views_of(entry: str) -> Iterator[str]:
    """What an entry of the table is asked."""
    yield from ("short", "long")
    if entry in ("base", *CHAIN[-2:]):
        yield "few"
    if entry == CHAIN[-2]:
        yield "many"


def write_rows(base: Path, tiny: Path, out: Path) -> None:
    """The held-out rows as meta files: those of the base's kinds, all short ones, the long ones."""
    known = base / "data/heldout.jsonl"
    others = {name: tiny / f"data/{name}/heldout.jsonl" for name in ("said", "new", "long")}
    sets = {"known": ("known",), "short": ("known", "said", "new"), "long": ("long",)}
    files = {"known": known, **others}
    (out / "rows").mkdir(parents=True, exist_ok=True)
    for name, parts in sets.items():
        meta = {
            part: {"annotation": str(files[part].resolve()), "media_root": str(files[part].resolve().parent)}
            for part in parts
        }
        write_beside(out / f"rows/{name}.json", json.dumps(meta).encode())


def convert_ablations(model: Path, out: Path) -> list[Entry]:
    """The base converted with the whole method and with each part left out, at every ratio, in the norm layout."""
    made = []
    prompts: list[list[ModelInputs]] = []
    for ratio in RATIOS:
        for name, method in {"the whole method": Method(), **ABLATIONS}.items():
            target = out / "ablations" / f"{ratio}-{name.replace(' ', '-')}"
            if not target.exists():
                prompts = prompts or list(mixture(model, CALIBRATION))
                options = Options(cache_ratio=ratio, method=method)
                convert_attention(model, target, options, *prompts, backend="torch", force=True)
            made.append(Entry(f"ratio {ratio}, {name}", (target,)))
    return made


def start(given: argparse.Namespace, out: Path, task: Task) -> None:
    """Run a task in a process of its own, unless its answers are there."""
    known = kept(out, task.folder, task.backend)
    if all(known.get(view, {}).get("stamp") == stamp(task.folder) for view in task.views):
        return
    what = json.dumps([str(task.folder), task.views, task.backend])
    command = [sys.executable, __file__, "--tiny", str(given.tiny), "--task", what]
    print(f"{task.folder} on {task.backend}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env={**environment(task.backend), "OMP_NUM_THREADS": "1"})


def work(out: Path, task: Task) -> None:
    """Ask a checkpoint everything that it has not answered yet."""
    tokenizer = Tokenizer.from_dir(task.folder)
    model = load(task.folder, task.backend, "float32")
    clips = ClipCache(out / "clips", 4 << 30)
    for view in task.views:
        if kept(out, task.folder, task.backend).get(view, {}).get("stamp") == stamp(task.folder):
            continue
        rows, framing = VIEWS[view]
        builder = SampleBuilder(tokenizer, framing, partial(build_inputs, videos=clips))
        found: dict[str, Any] = {"stamp": stamp(task.folder), "kinds": [], "answers": [], "scores": []}
        for row in read_rows(out / f"rows/{rows}.json", "rl"):
            text = tokenizer.decode(list(model.generate(builder.prompt(row), max_tokens=32)))
            found["kinds"].append(row.kind)
            found["answers"].append(text)
            found["scores"].append(float(JUDGE(row, text).total))
        file = _file(out, task.folder, task.backend)
        file.parent.mkdir(parents=True, exist_ok=True)
        all_of_them = kept(out, task.folder, task.backend) | {view: found}
        write_beside(file, json.dumps(all_of_them).encode())


def kept(out: Path, folder: Path, backend: str = "torch") -> dict[str, Any]:
    """What a checkpoint has answered, by view."""
    file = _file(out, folder, backend)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def stamp(folder: Path) -> int:
    """When the checkpoint was written."""
    return max(file.stat().st_mtime_ns for file in folder.glob("*.safetensors"))


def _file(out: Path, folder: Path, backend: str) -> Path:
    return out / "answers" / f"{'-'.join(folder.resolve().parts[-3:])}--{backend}.json"


def speed(out: Path, folder: Path) -> float:
    """Tokens a second in decoding, after a prompt of PROMPT tokens; kept in `out`."""
    file = out / "speed" / f"{'-'.join(folder.resolve().parts[-3:])}.json"
    if file.exists():
        return float(json.loads(file.read_text(encoding="utf-8")))
    model = load(folder, "torch", "float32")
    ids = np.random.default_rng(0).integers(0, 256, PROMPT).astype(np.int32)
    rates = []
    for _ in range(RUNS):
        cache = model.new_cache()
        model.prefill(ModelInputs(ids, None, None), cache)
        started = time.perf_counter()
        for token_id in range(DECODED):
            model.decode(token_id, cache)
        rates.append(DECODED / (time.perf_counter() - started))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_beside(file, json.dumps(median(rates)).encode())
    return median(rates)


if __name__ == "__main__":
    main()
