"""How well a model answers: greedy answers to held-out rows, judged by kind of question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ivcore.backend import Model
from ivcore.tokenizer import Tokenizer
from train.processes import ALONE, Processes, agreed
from train.rewards import Judge
from train.rows import Rows
from train.samples import SampleBuilder

JUDGE = Judge({"choice": 1.0, "iou": 1.0})


@dataclass(frozen=True)
class Kind:
    """One kind of question: how many rows, and the mean of their measure (share of right choices, or mean IoU)."""

    rows: int
    measure: str
    value: float


@dataclass(frozen=True)
class Evaluation:
    """By the rows' `kind`; mean: over kinds, each counting the same."""

    kinds: dict[str, Kind]

    @property
    def mean(self) -> float:
        return sum(kind.value for kind in self.kinds.values()) / max(len(self.kinds), 1)

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "kinds": {name: asdict(kind) for name, kind in self.kinds.items()}}


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    rows: Rows,
    builder: SampleBuilder,
    *,
    max_tokens: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Ask every row that has a right choice or a span, and judge the answers; on_progress(done, total) counts rows.

    Each of several processes asks every world-th row, and all of them get the whole evaluation.
    """
    judged: list[tuple[int, str, str, float]] = []
    with agreed(processes):
        for number in range(processes.rank, len(rows), processes.world):
            row = rows[number]
            if rows.is_usable(number) and (row.answer is not None or row.span is not None):
                ids = list(model.generate(builder.prompt(row), max_tokens=max_tokens))
                measure = "accuracy" if row.answer is not None else "mean IoU"
                judged.append((number, row.kind or "all", measure, float(JUDGE(row, tokenizer.decode(ids)).total)))
            if on_progress:
                on_progress(number + 1, len(rows))
    found: dict[str, list[float]] = {}
    measures: dict[str, str] = {}
    for _, kind, measure, value in sorted(each for part in processes.gather(judged) for each in part):
        found.setdefault(kind, []).append(value)
        measures[kind] = measure
    return Evaluation({kind: Kind(len(each), measures[kind], sum(each) / len(each)) for kind, each in found.items()})
