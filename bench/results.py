"""What iv3-tiny answers at every step of its making, into docs/results.md; what was measured is not measured again.

    python -m bench.results [--base build/tiny-base] [--tiny build/tiny] [--jobs 2]

Every checkpoint's answers and its speed are kept in docs/results, with the digest of its weights: the page is written
from those files, so a checkpoint need not be there any more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from agent.calibration import mixture
from bench.memory import environment
from bench.results_page import Findings, document
from convert.m2la.options import PLAIN_SVD, Method, Options
from convert.m2la.run import convert_attention
from convert.record import RECORD, Record
from ivcore.backend import BackendName, load
from ivcore.config import ModelConfig
from ivcore.files import write_beside
from ivcore.inputs import ModelInputs
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from train.clips import ClipCache
from train.evaluate import JUDGE
from train.rows import read_rows
from train.samples import Framing, SampleBuilder
from train.tiny.pipeline import CHAIN, LAYOUTS, RATIOS, SEEDS, TINY, result_of

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
METHODS: Mapping[str, Method] = {"the whole method": Method(), **ABLATIONS}

VIEWS = ("short", "long")
"""Held-out rows, by the length of their clips."""

BACKENDS: tuple[BackendName, ...] = ("torch", "mlx")
DTYPES = ("float32", "float16")
"""What iv3-tiny is run in on both; the second is what it is stored in beside its 8 bits."""

PROMPT, DECODED, RUNS = 1024, 64, 5
"""Tokens of the prompt and of the answer whose speed is measured, and how often."""


@dataclass(frozen=True)
class Entry:
    """A row of a table; folders: its checkpoints, one a seed where it was trained."""

    name: str
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Run:
    """What a checkpoint is run by, and what that computes in."""

    backend: BackendName = "torch"
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.backend}-{self.dtype}"


_USUAL_RUN = Run()


@dataclass(frozen=True)
class Task:
    """A checkpoint and what it is asked, in one process."""

    folder: Path
    views: tuple[str, ...]
    run: Run = _USUAL_RUN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("build/tiny-base"))
    parser.add_argument("--tiny", type=Path, default=Path("build/tiny"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results.md")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args()
    kept, scratch = given.page.with_suffix(""), given.tiny / "results"
    if given.task:
        folder, views, backend, dtype = json.loads(given.task)
        work(kept, scratch, Task(Path(folder), tuple(views), Run(backend, dtype)))
        return
    write_rows(given.base, given.tiny, scratch)
    convert_ablations(given.base / "model", scratch)
    table, ablated = entries(given.base, given.tiny), ablations(scratch)
    tasks = [Task(folder, VIEWS) for entry in table for folder in entry.folders]
    tasks += [Task(folder, ("short",)) for entry in ablated for folder in entry.folders]
    tasks += [Task(given.tiny / TINY, VIEWS, Run(name, dtype)) for dtype in DTYPES for name in BACKENDS]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(partial(start, given, kept), [task for task in dict.fromkeys(tasks) if task.folder.exists()]))
    for entry in table:
        measure_speed(kept, entry.folders[0])
    write_page(given.page, given.base, given.tiny)
    print(given.page)


def write_page(page: Path, base: Path, tiny: Path) -> None:
    """The page, from what is kept beside it."""
    kept = page.with_suffix("")

    def of(entries: Sequence[Entry], *views: str) -> dict[str, list[Findings]]:
        found = {entry.name: [findings(kept, folder) for folder in entry.folders] for entry in entries}
        asked = {name: [one for one in each if set(views) <= set(one.get("views", {}))] for name, each in found.items()}
        return {name: there for name, there in asked.items() if there}

    both = {dtype: [findings(kept, tiny / TINY, Run(name, dtype)) for name in BACKENDS] for dtype in DTYPES}
    twins = {dtype: each for dtype, each in both.items() if all(each) and each[0]["weights"] == each[1]["weights"]}
    write_beside(
        page,
        document(of(entries(base, tiny), *VIEWS), of(ablations(tiny / "results"), "short"), twins).encode(),
    )


def entries(base: Path, tiny: Path) -> list[Entry]:
    """The rows of the table, in the order of the recipe."""
    variants = [f"{layout}-{ratio}" for layout in LAYOUTS for ratio in RATIOS]
    return [
        Entry("base", (base / "model",)),
        *(Entry(f"{variant}, converted", (tiny / variant,)) for variant in variants),
        *(
            Entry(f"{variant}, cpt", tuple(tiny / f"{variant}-cpt-{seed}/model" for seed in SEEDS))
            for variant in variants
        ),
        *(Entry(stage, tuple(result_of(tiny, stage, seed) for seed in SEEDS)) for stage in CHAIN),
        Entry("iv3-tiny, 8 bits", (tiny / TINY,)),
    ]


def ablations(scratch: Path) -> list[Entry]:
    """The whole method and each part left out, at every ratio."""
    return [
        Entry(f"ratio {ratio}, {name}", (scratch / f"ablation-{ratio}-{name.replace(' ', '-')}",))
        for ratio in RATIOS
        for name in METHODS
    ]


def write_rows(base: Path, tiny: Path, scratch: Path) -> None:
    """The held-out rows as meta files."""
    known = base / "data/heldout.jsonl"
    others = {name: tiny / f"data/{name}/heldout.jsonl" for name in ("said", "new", "long")}
    sets = {"short": ("known", "said", "new"), "long": ("long",)}
    files = {"known": known, **others}
    (scratch / "rows").mkdir(parents=True, exist_ok=True)
    for name, parts in sets.items():
        meta = {
            part: {"annotation": str(files[part].resolve()), "media_root": str(files[part].resolve().parent)}
            for part in parts
        }
        write_beside(scratch / f"rows/{name}.json", json.dumps(meta).encode())


def convert_ablations(model: Path, scratch: Path) -> None:
    """Convert the base by each method, at every ratio, in the norm layout."""
    prompts: list[list[ModelInputs]] = []
    wanted = [(ratio, method) for ratio in RATIOS for method in METHODS.values()]
    for (ratio, method), entry in zip(wanted, ablations(scratch), strict=True):
        if not (target := entry.folders[0]).exists():
            prompts = prompts or list(mixture(model, CALIBRATION))
            options = Options(cache_ratio=ratio, method=method)
            convert_attention(model, target, options, *prompts, backend="torch", force=True)


def start(given: argparse.Namespace, kept: Path, task: Task) -> None:
    """Run a task in a process of its own, unless its answers are there."""
    known = findings(kept, task.folder, task.run)
    if known.get("weights") == digest(task.folder) and set(task.views) <= set(known["views"]):
        return
    what = json.dumps([str(task.folder), task.views, task.run.backend, task.run.dtype])
    command = [
        sys.executable,
        "-m",
        "bench.results",
        "--tiny",
        str(given.tiny),
        "--page",
        str(given.page),
        "--task",
        what,
    ]
    print(f"{task.folder} on {task.run}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env={**environment(task.run.backend), "OMP_NUM_THREADS": "1"})


def work(kept: Path, scratch: Path, task: Task) -> None:
    """Ask a checkpoint everything that it has not answered yet."""
    tokenizer = Tokenizer.from_dir(task.folder)
    model = load(task.folder, task.run.backend, task.run.dtype)
    clips = ClipCache(scratch / "clips", 4 << 30)
    known = findings(kept, task.folder, task.run)
    if known.get("weights") != digest(task.folder):
        known = {"weights": digest(task.folder), "cache_bytes": cache_bytes(model.config), "views": {}}
        if (task.folder / RECORD).exists():
            known["cost"] = Record.read(task.folder).report.get("model")
    for view in task.views:
        if view in known["views"]:
            continue
        builder = SampleBuilder(tokenizer, Framing(fps=2.0), partial(build_inputs, videos=clips))
        kinds: dict[str, dict[str, list[Any]]] = {}
        for row in read_rows(scratch / f"rows/{view}.json", "rl"):
            text = tokenizer.decode(list(model.generate(builder.prompt(row), max_tokens=32)))
            kind = kinds.setdefault(str(row.kind), {"answers": [], "scores": []})
            kind["answers"].append(text)
            kind["scores"].append(round(float(JUDGE(row, text).total), 4))
        known["views"][view] = kinds
        keep(kept, task.folder, known, task.run)


def findings(kept: Path, folder: Path, run: Run = _USUAL_RUN) -> Findings:
    """What is known of a checkpoint, empty where nothing is."""
    file = _file(kept, folder, run)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def keep(kept: Path, folder: Path, found: Findings, run: Run = _USUAL_RUN) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    write_beside(_file(kept, folder, run), (json.dumps(found, separators=(",", ":")) + "\n").encode())


def _file(kept: Path, folder: Path, run: Run) -> Path:
    """A run's or the base's result lies in a folder `model`; the others are named themselves."""
    return kept / f"{folder.parent.name if folder.name == 'model' else folder.name}--{run}.json"


def digest(folder: Path) -> str:
    """sha256 of the checkpoint's weights."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def cache_bytes(config: ModelConfig) -> int:
    """Of a token in the caches of all layers, in bfloat16."""
    text = config.text
    return 2 * sum(text.geometry.cache_width(layer) for layer in range(text.num_hidden_layers))


def measure_speed(kept: Path, folder: Path) -> None:
    """Tokens a second in decoding, after a prompt of PROMPT tokens, where they are not known."""
    found = findings(kept, folder)
    if not found or not folder.exists() or "tokens_per_second" in found:
        return
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
    keep(kept, folder, found | {"tokens_per_second": round(median(rates), 1)})


if __name__ == "__main__":
    main()
