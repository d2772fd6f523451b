"""docs/results.md, from what bench/results.py has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from convert.record import Record
from ivcore.config import ModelConfig
from train.tiny.pipeline import CHAIN
from train.toyworld.dataset import BASE_SHARES

Answers = Mapping[str, Any]
"""By view: `kinds`, `answers` and `scores` of its rows."""

KNOWN = tuple(BASE_SHARES)
"""The kinds that the base was trained on; the mean is over these, each counting the same."""

HEAD = """\
# What iv3-tiny answers, step by step

```
make tiny                 # python -m train.tiny.pipeline --base build/tiny-base --out build/tiny
python bench/results.py   # measures, and writes this page
```

Asked greedily in float32 on PyTorch, at two frames a second; every clip with every question that it answers. Held out
are 500 clips of four seconds with the kinds of question that the base was trained on, 300 more with `said`, at which
the base only guesses (58 rows would rise and fall by more than there is to see), 200 with `before_after`, which is new
to it, and 200 of sixteen seconds. `when` is the mean temporal IoU, the others are shares of right answers; `mean` is
over the base's seven kinds, each counting the same. Rows that were trained are means over three seeds, in brackets the
largest less the least. A converted row is the base with nothing trained since; `cpt` reads a tenth of the base's tokens
again; the stages behind it go on from norm-2."""

RATIO_8 = """\
A ratio of 8 cannot be had of this base: it keeps 256 numbers a token and layer, an eighth of that is 32, and the one
RoPE key that every layer needs has 32 (`iv3 convert --cache-ratio 8` says so). A Qwen3-VL-8B, which keeps 2,048, has
128 left for its latent."""


def document(
    *,
    table: Mapping[str, Sequence[Answers]],
    ablated: Mapping[str, Sequence[Answers]],
    twins: Mapping[str, Sequence[Answers]],
    folders: Mapping[str, Path],
    speeds: Mapping[str, float],
) -> str:
    """The page.

    table, ablated: the answers of every entry's checkpoints, one a seed. twins: of the last stage's model and of the
    shipped one, on both backends. folders: a checkpoint of every entry. speeds: tokens a second of those in `table`.
    """
    blocks = [
        HEAD,
        "## Short clips",
        _short(table, folders, speeds),
        RATIO_8,
        "## Clips of sixteen seconds",
        _long(table),
        _ratio_of_long(table),
        "## Few frames",
        _few(table),
        "## Both backends",
        _agreement(twins),
        "## Conversion: each part of the method left out",
        _ablations(ablated, folders),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def by_kind(found: Answers) -> dict[str, float]:
    """The mean score of every kind, and `mean`, over the known ones."""
    scores: dict[str, list[float]] = {}
    for kind, score in zip(found["kinds"], found["scores"], strict=True):
        scores.setdefault(kind, []).append(score)
    means = {kind: mean(each) for kind, each in scores.items()}
    return means | {"mean": mean(means[kind] for kind in KNOWN)}


def _short(table: Mapping[str, Sequence[Answers]], folders: Mapping[str, Path], speeds: Mapping[str, float]) -> str:
    kinds = (*KNOWN, "mean", "before_after")
    lines = _head("", *kinds, "cache, bytes a token", "tokens/s")
    for name, answers in table.items():
        found = [by_kind(each["short"]) for each in answers]
        cells = [_spread([each[kind] for each in found]) for kind in kinds]
        lines.append(_row(name, *cells, f"{cache_bytes(folders[name]):,}", f"{speeds[name]:.0f}"))
    return "\n".join(lines)


def _long(table: Mapping[str, Sequence[Answers]]) -> str:
    kinds = (*KNOWN, "mean", "rare")
    lines = _head("", *kinds)
    for name, answers in table.items():
        found = [by_kind(each["long"]) for each in answers]
        lines.append(_row(name, *(_spread([each[kind] for each in found]) for kind in kinds)))
    return "\n".join(lines)


def _ratio_of_long(table: Mapping[str, Sequence[Answers]]) -> str:
    parts = []
    for name in (*CHAIN, "iv3-tiny, 8 bits"):
        if answers := table.get(name):
            ratios = [by_kind(each["long"])["mean"] / by_kind(each["short"])["mean"] for each in answers]
            parts.append(f"{name} {_spread(ratios)}")
    return f"The long clips' mean over the short ones': {', '.join(parts)}." if parts else ""


def _few(table: Mapping[str, Sequence[Answers]]) -> str:
    *_, before, after = CHAIN
    if before not in table or after not in table:
        return ""
    teachers = [each["many"] for each in table[before]]
    lines = _head("", "frames a second", "mean", "same answer as the teacher")
    lines.append(_row(f"{before}, the teacher", "4", _spread([by_kind(each)["mean"] for each in teachers]), "1"))
    for name in (before, after):
        found = [each["few"] for each in table[name]]
        same = [_same(student, teacher) for student, teacher in zip(found, teachers, strict=True)]
        lines.append(_row(name, "1", _spread([by_kind(each)["mean"] for each in found]), _spread(same)))
    return "\n".join(lines)


def _agreement(twins: Mapping[str, Sequence[Answers]]) -> str:
    lines = _head("computed in float32", "questions", "same answer on PyTorch and MLX")
    for name, (first, second) in twins.items():
        questions = sum(len(first[view]["answers"]) for view in second)
        same = sum(_same(first[view], second[view]) * len(first[view]["answers"]) for view in second)
        lines.append(_row(name, f"{questions:,}", f"{100 * same / questions:.2f} %"))
    return "\n".join(lines) if twins else ""


def _ablations(ablated: Mapping[str, Sequence[Answers]], folders: Mapping[str, Path]) -> str:
    """KL from the base on held-out prompts, and what is answered."""
    lines = _head("", "KL at text", "KL at visual positions", "mean, short clips", "cache, bytes a token")
    for name, answers in ablated.items():
        cost = Record.read(folders[name]).report["model"]
        kl = [f"{cost[kind]['kl']:.4f}" for kind in ("text", "visual")]
        right = _spread([by_kind(each["short"])["mean"] for each in answers])
        lines.append(_row(name, *kl, right, f"{cache_bytes(folders[name]):,}"))
    return "\n".join(lines)


def cache_bytes(folder: Path) -> int:
    """Of a token in the caches of all layers, in bfloat16."""
    text = ModelConfig.from_dir(folder).text
    return 2 * sum(text.geometry.cache_width(layer) for layer in range(text.num_hidden_layers))


def _same(first: Answers, second: Answers) -> float:
    """The share of rows with the same answer."""
    return mean(one == other for one, other in zip(first["answers"], second["answers"], strict=True))


def _spread(values: Sequence[float]) -> str:
    """The mean, and where there are several values the largest less the least."""
    return f"{mean(values):.3f}" + (f" ({max(values) - min(values):.3f})" if len(values) > 1 else "")


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
