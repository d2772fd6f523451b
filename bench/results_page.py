"""docs/results.md, from what bench/results.py has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from train.tiny.pipeline import CHAIN
from train.toyworld.dataset import BASE_SHARES

Answers = Mapping[str, Mapping[str, Any]]
"""Of one view, by kind: the `answers` and `scores` of its rows."""

Findings = dict[str, Any]
"""Of a checkpoint: `views`, each with its Answers; `cache_bytes` of a token; `tokens_per_second`; and `cost`, what its
conversion reported of the whole model."""

KNOWN = tuple(BASE_SHARES)
"""The kinds that the base was trained on; the mean is over these, each counting the same."""

HEAD = """\
# What iv3-tiny answers, step by step

```
make tiny                 # python -m train.tiny.pipeline --base build/tiny-base --out build/tiny
python -m bench.results   # measures, and writes this page
```

Asked greedily in float32 on PyTorch, at two frames a second; every clip with every question that it answers. Held out
are 500 clips of four seconds with the kinds of question that the base was trained on, 300 more with `said`, of which
those have few, 200 with `before_after`, which is new to it, and 200 of sixteen seconds. `when` is the mean temporal
IoU, the others are shares of right answers; `mean` is over the base's seven kinds, each counting the same. Trained rows
are means over as many seeds as the first column says, in brackets the largest less the least. A converted row is the
base with nothing trained since; `cpt` reads a tenth of the base's tokens again; the stages behind it go on from norm-2.
iv3-tiny is the first seed's after `distill` and the stages in which it learned to act.
Every answer is in docs/results."""

RATIO_8 = """\
A ratio of 8 cannot be had of this base: it keeps 256 numbers a token and layer, an eighth of that is 32, and the one
RoPE key that every layer needs has 32 (`iv3 convert --cache-ratio 8` says so). A Qwen3-VL-8B, which keeps 2,048, has
128 left for its latent."""


TEACHER, TEACHER_OF_NEW = "norm-2, cpt", "sft-short"
"""Rows of the models that teach the base's kinds of question, and others (`train.tiny.pipeline.TEACHERS`)."""

TAUGHT_BY = f"""\
The teachers are the models of the same seed from before the long clips: that of `{TEACHER}` for the base's kinds of
question, that of `{TEACHER_OF_NEW}` for `before_after`. The same answer is counted over the kinds that they teach:
about short clips, all but `when`."""


def document(
    table: Mapping[str, Sequence[Findings]],
    ablated: Mapping[str, Sequence[Findings]],
    twins: Mapping[str, Sequence[Findings]],
) -> str:
    """The page.

    table, ablated: the findings about every entry's checkpoints, one a seed. twins: about the shipped one by
    what it is computed in, on both backends.
    """
    sections = {
        "Short clips": f"{_short(table)}\n\n{RATIO_8}",
        "Clips of sixteen seconds": "\n\n".join(block for block in (_long(table), _ratio_of_long(table)) if block),
        "Rewards and distillation": _gains(table),
        "Both backends": _agreement(twins),
        "Conversion: each part of the method left out": _ablations(ablated),
    }
    return "\n\n".join([HEAD, *(f"## {title}\n\n{body}" for title, body in sections.items() if body)]) + "\n"


def by_kind(found: Answers) -> dict[str, float]:
    """The mean score of every kind, and `mean`, over the known ones."""
    means = {kind: mean(each["scores"]) for kind, each in found.items()}
    return means | {"mean": mean(means[kind] for kind in KNOWN)}


def _means(findings: Sequence[Findings], view: str) -> list[dict[str, float]]:
    return [by_kind(each["views"][view]) for each in findings]


def _short(table: Mapping[str, Sequence[Findings]]) -> str:
    kinds = (*KNOWN, "mean", "before_after")
    lines = _head("", "seeds", *kinds, "cache, bytes a token", "tokens/s")
    for name, found in table.items():
        cells = [_spread([each[kind] for each in _means(found, "short")]) for kind in kinds]
        first = found[0]
        speed = f"{first['tokens_per_second']:.0f}" if "tokens_per_second" in first else ""
        lines.append(_row(name, str(len(found)), *cells, f"{first['cache_bytes']:,}", speed))
    return "\n".join(lines)


def _long(table: Mapping[str, Sequence[Findings]]) -> str:
    kinds = (*KNOWN, "mean", "rare")
    lines = _head("", *kinds)
    for name, found in table.items():
        lines.append(_row(name, *(_spread([each[kind] for each in _means(found, "long")]) for kind in kinds)))
    return "\n".join(lines)


def _ratio_of_long(table: Mapping[str, Sequence[Findings]]) -> str:
    parts = []
    for name in (*CHAIN, "iv3-tiny, 8 bits"):
        if found := table.get(name):
            both = zip(_means(found, "long"), _means(found, "short"), strict=True)
            parts.append(f"{name} {_spread([long['mean'] / short['mean'] for long, short in both])}")
    return f"The long clips' mean over the short ones': {', '.join(parts)}." if parts else ""


def _gains(table: Mapping[str, Sequence[Findings]]) -> str:
    """What the last two stages aim at, before and after them."""
    *_, long, rl, distill = CHAIN
    if distill not in table:
        return ""
    scores = {name: _means(table[name], "short") for name in (long, rl, distill)}
    whole, when = (
        {name: [each[kind] for each in found] for name, found in scores.items()} for kind in ("mean", "when")
    )
    same = {name: _as_the_teacher(table, name) for name in (rl, distill)}
    lines = _head("short clips", "before", "after", "gain of each seed")
    for what, values, before, after in (
        (f"{rl}: `when`", when, long, rl),
        (f"{distill}: mean", whole, rl, distill),
        (f"{distill}: same answer as the teacher", same, rl, distill),
    ):
        gained = [f"{new - old:+.3f}" for old, new in zip(values[before], values[after], strict=False)]
        lines.append(_row(what, _spread(values[before]), _spread(values[after]), ", ".join(gained)))
    return "\n".join([*lines, "", TAUGHT_BY])


def _as_the_teacher(table: Mapping[str, Sequence[Findings]], name: str) -> list[float]:
    """The share of answers that are those of the teacher of their kind, of each seed."""
    found_by = [table[each] for each in (name, TEACHER, TEACHER_OF_NEW)]
    shares = []  # of the seeds that all have: the last may not be there yet
    for student, *teachers in ([each["views"]["short"] for each in found] for found in zip(*found_by, strict=False)):
        taught = {kind: each for kind, each in student.items() if kind != "when"}
        shares.append(_same(taught, {kind: teachers[kind not in KNOWN][kind] for kind in taught}))
    return shares


def _agreement(twins: Mapping[str, Sequence[Findings]]) -> str:
    lines = _head("iv3-tiny, 8 bits, computed in", "questions", "same answer on PyTorch and MLX")
    for name, found in twins.items():
        first, second = ([each["views"][view] for view in found[1]["views"]] for each in found)
        questions = [sum(len(each["answers"]) for each in view.values()) for view in first]
        same = sum(_same(one, other) * count for one, other, count in zip(first, second, questions, strict=True))
        lines.append(_row(name, f"{sum(questions):,}", f"{100 * same / sum(questions):.2f} %"))
    return "\n".join(lines) if twins else ""


def _ablations(ablated: Mapping[str, Sequence[Findings]]) -> str:
    """KL from the base on held-out prompts, and what is answered."""
    lines = _head("", "KL at text", "KL at visual positions", "mean, short clips", "cache, bytes a token")
    for name, found in ablated.items():
        cost = found[0]["cost"]
        kl = [f"{cost[kind]['kl']:.4f}" for kind in ("text", "visual")]
        right = _spread([each["mean"] for each in _means(found, "short")])
        lines.append(_row(name, *kl, right, f"{found[0]['cache_bytes']:,}"))
    return "\n".join(lines) if ablated else ""


def _same(first: Answers, second: Answers) -> float:
    """The share of rows with the same answer."""
    pairs = [zip(first[kind]["answers"], second[kind]["answers"], strict=True) for kind in first]
    return mean(one == other for pair in pairs for one, other in pair)


def _spread(values: Sequence[float]) -> str:
    """The mean, and where there are several values the largest less the least."""
    return f"{mean(values):.3f}" + (f" ({max(values) - min(values):.3f})" if len(values) > 1 else "")


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
