"""`make tiny`: from iv3-tiny's base to iv3-tiny, every step a command of `iv3`; what is done is not done again.

It goes on from the models that the repository keeps (train/tiny/kept); without that folder, from `make tiny-base`.

The base's attention becomes M2LA; continued pretraining takes back what that cost; short clips, then long ones teach
new kinds of question; rewards sharpen spans; the models from before the long clips teach back what these cost. The
first seed's model learns to act from an oracle's runs, which is iv3-tiny, and then from rewards for its own.

OUT/data/                     rows and clips
OUT/<layout>-<ratio>/         the base, converted
OUT/<layout>-<ratio>-cpt-<seed>/, OUT/sft-short-<seed>/ ... OUT/distill-<seed>/   runs; each goes on from the one before
OUT/distill-<seed>-merged/    the adapter of a stage that trains one, in its model's weights
OUT/sft-looks-0/, OUT/sft-act-0/, OUT/sft-longest-0/, OUT/rl-act-0/ the first seed's model learns to act
OUT/iv3-tiny/                 what SHIPPED comes to, in 8 bits beside float16
OUT/steps.jsonl               what was run, and the seconds it took; OUT/iv3-tiny/provenance.json has what led there
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ivcore.errors import IvError
from ivcore.files import write_beside
from train.run_folder import RUN
from train.tiny.base import HELDOUT_CLIPS, MADE, ROWS, TRAIN_CLIPS, write_clips, write_rows
from train.tiny.commands import add_processes, processes_for, run_module
from train.tiny.kept import lines as kept_lines
from train.tiny.kept import restore
from train.toyworld.dataset import BASE_SHARES, LONG_SHARES, write_about, write_dataset
from train.toyworld.echoes import write_echoes
from train.toyworld.moves import write_moves
from train.toyworld.pairs import write_pairs
from train.toyworld.script import LONG_SECONDS, SHORT_SECONDS, WORLD_VERSION
from train.toyworld.stills import write_stills
from train.toyworld.texts import write_texts

TINY, PROVENANCE = "iv3-tiny", "provenance.json"
SEEDS = (0, 1, 2)
LAYOUTS, RATIOS = ("norm", "release"), (2, 4)
CHAIN = ("sft-short", "sft-long", "rl", "distill")
"""The stages behind continued pretraining, which only the first layout at the first ratio goes through."""

KNOWS = f"{LAYOUTS[0]}-{RATIOS[0]}-cpt"
TEACHERS: Mapping[str, str] = {"short-lost": KNOWS, "short-kept": KNOWS, "short-new": "sft-short"}
"""Who teaches the last of them what: the kinds of the base, whose model knows them best, and the one that is new to it.
The rest it is taught by the model that it goes on from."""

LORAS, MERGED = ("distill",), "-merged"
"""Those that train a LoRA, and what the model's name ends in that it is merged into."""

ACTING = ("sft-looks", "sft-act", "sft-longest", "rl-act")
SHIPPED = "sft-longest"
"""Those behind the chain, which only the first seed's model goes through, and the one whose result ships."""

DTYPES: Mapping[str, str] = {"rl": "float32", "rl-act": "float32"}
"""What a stage computes in, where not in bfloat16: the small steps of rl are taken on unrounded likelihoods."""

SHORT_SHARES: Mapping[str, float] = {
    **{kind: 0.62 * share for kind, share in BASE_SHARES.items() if kind != "said"},
    "said": 0.1,
    "before_after": 0.3,
}
CLIPS = {"short": (12_000, SHORT_SHARES), "spans": (2_000, {"when": 1.0})}
"""Training clips that the base has not seen, of four seconds."""

CHOSEN = ("lost", "kept", "new")
"""Files of the questions about short clips that have choices: of the base's kinds those of LOST and the rest, and of
others."""

LOST = frozenset({"count", "order"})
"""The base's kinds that long clips cost."""

LONG_CLIPS = 4_000
"""Of LONG_SECONDS."""

STILLS, MOVES, PAIRS, TEXTS, ECHOES = 20_000, 6_000, 12_000, 12_000, 20_000
"""Pictures and clips of several figures at once; lists of pairs; transcripts, each asked about in all of its lines;
lists of words and times."""

HELDOUT: Mapping[str, tuple[int, Mapping[str, float], float]] = {
    "long": (200, LONG_SHARES, LONG_SECONDS),
    "new": (200, {"before_after": 1.0}, SHORT_SECONDS),
    "said": (300, {"said": 1.0}, SHORT_SECONDS),
}
"""Clips, shares and seconds of held-out sets beside the base's, which has few rows of `said`, none of the new kind."""

ACT_SETS = ("runs", "windows", "claims", "spans", "short-talks", "long-talks", "texts", "echoes")
"""Of the stages that learn from the oracle; their recipes say how often."""

LONGEST = ("longest-runs", "longest-windows", "longest-claims")
"""Of the last of them: what `agent.oracle.dataset` makes of the longest films."""

SETS: Mapping[str, tuple[str, ...]] = {
    "sft-short": (
        "short", "short-talks", "short-descriptions", "base-talks", "stills-talks", "moves", "moves-talks",
        "pairs-talks", "texts", "echoes",
    ),
    "sft-long": (
        "long", "long-talks", "long-descriptions", "short-talks", "stills-talks", "moves-talks", "pairs-talks", "texts",
        "echoes",
    ),
    "rl": ("spans", "short", "long"),
    "distill": (*TEACHERS, "spans", "long"),
    "sft-looks": ACT_SETS,
    "sft-act": ACT_SETS,
    "sft-longest": (*ACT_SETS, *LONGEST),
    "rl-act": ("questions",),
}  # fmt: skip
"""What each stage's rows are from."""

ACTS = ("runs", "windows", "claims", "questions")
"""Sets that `agent.oracle.dataset` makes, of films."""


@dataclass(frozen=True)
class Step:
    """arguments: of `iv3`. made: the folder that is there when it is done."""

    name: str
    arguments: tuple[str, ...]
    made: Path


def main() -> None:
    """Run what is not done; exit 1 with one sentence where that fails."""
    parser = argparse.ArgumentParser(description="Make iv3-tiny of its base.")
    parser.add_argument("--base", type=Path, default=Path("build/tiny-base"), help="the folder of make tiny-base")
    parser.add_argument("--out", type=Path, default=Path("build/tiny"))
    parser.add_argument("--only", action="append", help="steps whose names begin with this; may be repeated")
    add_processes(parser)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    try:
        make_tiny(given.base, given.out, given.overrides, tuple(given.only or ("",)), given.processes)
    except IvError as error:
        sys.exit(f"tiny: {error}")


def make_tiny(base: Path, out: Path, overrides: list[str], only: tuple[str, ...] = ("",), processes: int = 1) -> None:
    """Write the data and run the steps, but for those that are kept; overrides: of the recipes' values."""
    restore("base", base / "model")
    write_rows(write_clips(base / "data"))
    write_data(base / "data", out / "data")
    log, was_done = out / "steps.jsonl", kept_lines()
    done = {json.loads(line)["step"] for line in log.read_text().splitlines()} if log.exists() else set()
    with log.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for name, line in was_done.items() if name not in done)
    for step in steps(base, out, overrides):
        if step.name in was_done:
            restore(step.name, step.made / "model" if step.arguments[0] == "train" else step.made)
        if not step.name.startswith(only) or step.name in was_done or (step.name in done and step.made.exists()):
            continue
        if step.name.startswith(ACTING) and not (out / f"data/acts/longest/{ACTS[-1]}.jsonl").exists():
            run_module("The films to act on", "agent.oracle.dataset", str(out / "data/acts"))
        arguments = [*step.arguments, *(["--resume"] if _begun(step) else [])]
        print(f"iv3 {shlex.join(arguments)}", file=sys.stderr, flush=True)
        _forget(log, step.name)
        started = time.monotonic()
        together = processes_for(step.arguments, processes)
        run_module(f"The step {step.name}", "agent.cli", *arguments, processes=together)
        seconds = round(time.monotonic() - started, 1)
        with log.open("a", encoding="utf-8") as file:
            entry = {"step": step.name, "seconds": seconds, "processes": together, "arguments": arguments}
            file.write(json.dumps(entry) + "\n")
    if (tiny := out / TINY).exists() and not (tiny / PROVENANCE).exists():
        write_beside(tiny / PROVENANCE, (json.dumps(provenance(log), indent=1) + "\n").encode())


def provenance(log: Path) -> dict[str, Any]:
    """What led to iv3-tiny: the world its data is from, and the commands of its seed's steps, in their order.

    Of a step that was neither run here nor kept (`--only`) nothing is known, and it is left out.
    """
    seed = SEEDS[0]
    first = f"{LAYOUTS[0]}-{RATIOS[0]}"
    chain = [f"{stage}-{seed}{end}" for stage in CHAIN for end in ("", MERGED) if not end or stage in LORAS]
    acting = [f"{stage}-{seed}" for stage in ACTING[: ACTING.index(SHIPPED) + 1]]
    names = [first, f"{first}-cpt-{seed}", *chain, *acting, TINY]
    lines = {entry["step"]: entry for entry in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
    return {
        "toy world": WORLD_VERSION,
        "base": "make tiny-base",
        "steps": [lines[name] for name in names if name in lines],
    }


def _forget(log: Path, name: str) -> None:
    """A step whose folder was taken away and that is stopped while it makes it anew is not done."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    write_beside(log, "".join(line for line in lines if json.loads(line)["step"] != name).encode())


def _begun(step: Step) -> bool:
    """Whether there is something to go on with: a run's folder has nothing before its run.json is there."""
    if step.arguments[0] == "train":
        return (step.made / RUN).exists()
    return step.made.exists() or step.made.with_name(f"{step.made.name}.part").exists()


def write_data(base: Path, data: Path) -> None:
    """The rows and clips of all stages, and a file for each that names its sets; base: the folder of the base's."""
    workers = os.cpu_count() or 1
    for name, (clips, shares) in CLIPS.items():
        if not (data / name / "train.jsonl").exists():
            write_dataset(data / name, "train", TRAIN_CLIPS, clips, shares=shares, workers=workers)
    if not (data / "long/train.jsonl").exists():
        write_dataset(
            data / "long", "train", TRAIN_CLIPS, LONG_CLIPS,
            shares=LONG_SHARES, duration=LONG_SECONDS, workers=workers,
        )  # fmt: skip
    for name in CHOSEN:
        if not (file := data / f"short/{name}.jsonl").exists():
            lines = (data / "short/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            write_beside(file, "".join(line for line in lines if _chosen(json.loads(line)) == name).encode())
    for folder, (clips, shares), duration in (
        (data / "short", CLIPS["short"], SHORT_SECONDS),
        (data / "long", (LONG_CLIPS, LONG_SHARES), LONG_SECONDS),
    ):
        for kind, make in MADE.items():
            if not (file := folder / f"{kind}.jsonl").exists():
                write_about(file, make, "train", TRAIN_CLIPS, clips, shares=shares, duration=duration)
    for name, write, count in (
        ("stills", write_stills, STILLS),
        ("moves", partial(write_moves, workers=workers), MOVES),
        ("pairs", write_pairs, PAIRS),
        ("texts", write_texts, TEXTS),
        ("echoes", write_echoes, ECHOES),
    ):
        if not (data / name / "train.jsonl").exists():
            write(data / name, "train", TRAIN_CLIPS, count)
    for name, (clips, shares, duration) in HELDOUT.items():
        if not (data / name / "heldout.jsonl").exists():
            write_dataset(
                data / name, "heldout", HELDOUT_CLIPS, clips,
                shares=shares, duration=duration, all_kinds=True, workers=workers,
            )  # fmt: skip
    for stage, names in SETS.items():
        files = {name: _file(base, data, name).resolve() for name in names}
        meta = {name: {"annotation": str(file), "media_root": str(file.parent)} for name, file in files.items()}
        file, content = data / f"{stage}.json", json.dumps(meta)
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            write_beside(file, content.encode())


def _chosen(row: Mapping[str, Any]) -> str | None:
    """Which of CHOSEN a row is of: none has those without choices, which are spans."""
    if "choices" not in row:
        return None
    if row["kind"] in LOST:
        return "lost"
    return "kept" if row["kind"] in BASE_SHARES else "new"


def _file(base: Path, data: Path, name: str) -> Path:
    clips, _, kind = name.partition("-")
    if name in ACTS:
        return data / f"acts/{name}.jsonl"
    if name in LONGEST:
        return data / f"acts/longest/{kind}.jsonl"
    if kind not in (*MADE, *CHOSEN):
        return data / name / "train.jsonl"
    return (base if clips == "base" else data / clips) / f"{kind}.jsonl"


def steps(base: Path, out: Path, overrides: list[str]) -> Iterator[Step]:
    """All of it, in an order in which each finds what it needs."""
    variants = [f"{layout}-{ratio}" for layout in LAYOUTS for ratio in RATIOS]
    for variant in variants:
        layout, ratio = variant.split("-")
        yield Step(
            variant,
            ("convert", str(base / "model"), str(out / variant), "--attention", "m2la", "--cache-ratio", ratio,
             "--layout", layout, "--backend", "torch"),
            out / variant,
        )  # fmt: skip
    for seed in SEEDS:
        for variant in variants:
            rows = base / "data" / ROWS
            yield _training("cpt", f"{variant}-cpt-{seed}", out / variant, rows, out, seed, overrides)
        before = out / f"{variants[0]}-cpt-{seed}/model"
        taught = [
            f"teacher.by_dataset.{name}={json.dumps(str(result_of(out, stage, seed)))}"
            for name, stage in TEACHERS.items()
        ]
        for stage in CHAIN:
            name, after = f"{stage}-{seed}", result_of(out, stage, seed)
            changed = [*(taught if stage == "distill" else []), *overrides]
            yield _training(stage, name, before, out / f"data/{stage}.json", out, seed, changed)
            if stage in LORAS:
                adapter = out / name / "adapter"
                yield Step(after.name, ("convert", str(before), str(after), "--adapter", str(adapter)), after)
            before = after
    before, tiny = result_of(out, CHAIN[-1], SEEDS[0]), out / TINY
    quantised = ("--bits", "8", "--group-size", "32", "--dtype", "fp16")
    for stage in ACTING:
        name = f"{stage}-{SEEDS[0]}"
        yield _training(stage, name, before, out / f"data/{stage}.json", out, SEEDS[0], overrides)
        before = out / name / "model"
        if stage == SHIPPED:
            yield Step(tiny.name, ("convert", str(before), str(tiny), *quantised), tiny)


def result_of(out: Path, stage: str, seed: int) -> Path:
    """The checkpoint that a stage of the chain comes to."""
    return out / (f"{stage}-{seed}{MERGED}" if stage in LORAS else f"{stage}-{seed}/model")


def _training(stage: str, name: str, model: Path, rows: Path, out: Path, seed: int, overrides: list[str]) -> Step:
    command, *_ = stage.split("-")
    changed = [argument for each in (f"seed={seed}", *overrides) for argument in ("--set", each)]
    return Step(
        name,
        ("train", command, "--recipe", f"tiny/{stage}", "--model", str(model), "--data", str(rows),
         "--out", str(out / name), "--backend", "torch", "--dtype", DTYPES.get(stage, "bfloat16"), *changed),
        out / name,
    )  # fmt: skip


if __name__ == "__main__":
    main()
