"""Running sums and judgement -> the report's comparison of one run with the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from convert.parity.measures import Distance, TokenDistance
from convert.parity.points import Point
from convert.parity.report import Comparison, Decode, LogitsError, PointError, Suspect
from convert.parity.run import FreeRun, Prompt, Run
from convert.parity.trend import Judged, judge


def comparison(
    reference: Run,
    run: Run,
    prompt: Prompt,
    points: Sequence[Point],
    free: FreeRun,
    forced: Mapping[str, Distance],
    ids: tuple[tuple[int, ...], tuple[int, ...]],
) -> Comparison:
    """Put together what was found. points: those that the prompt reaches; ids: greedy, of the reference and the run."""
    judged = own_errors(points, forced)
    suspect, limits = judge(judged, reference, run)
    errors = []
    for each, limit in zip(judged, limits, strict=True):
        found, rows = free.points[each.point.name], free.points[each.point.name].all
        errors.append(
            PointError(
                point=each.point.name,
                stack=each.point.stack,
                rows=rows.rows,
                relative_l2=rows.relative_l2,
                max_abs=rows.max_abs,
                cosine=rows.cosine,
                visual=found.visual.relative_l2 if found.visual.rows else None,
                text=found.text.relative_l2 if found.text.rows else None,
                own=each.own,
                limit=None if math.isinf(limit) else limit,
            )
        )
    visual, predicts = prompt.visual[prompt.positions], prompt.following >= 0
    return Comparison(
        run=run.name,
        points=tuple(errors),
        suspect=None if suspect is None else _suspect(judged[suspect], limits[suspect]),
        text=_logits_error(free.tokens, ~visual, int((~prompt.visual).sum()), predicts),
        visual=_logits_error(free.tokens, visual, int(prompt.visual.sum())),
        decode=Decode(_parted_at(*ids), *ids),
    )


def own_errors(points: Sequence[Point], forced: Mapping[str, Distance]) -> list[Judged]:
    """What is to be judged of a teacher-forced pass, in the order of `points`."""
    return [Judged(point, forced[point.name].relative_l2, forced[point.name].reference_norm) for point in points]


def _suspect(judged: Judged, limit: float) -> Suspect:
    name, own = judged.point.name, judged.own
    if math.isnan(own) or (math.isinf(own) and judged.norm):
        reason = "its numbers are not finite, in this run or in the reference"
    elif limit == 0.0:
        reason = f"by itself it is off by {own:.2g}, where both runs do the same arithmetic and should be equal"
    else:
        reason = f"by itself it is off by {own:.2g}, where {limit:.2g} is the most to be expected"
    return Suspect(name, own, limit, f"{name} leaves the trend: {reason}.")


def _logits_error(
    tokens: TokenDistance, chosen: np.ndarray, positions: int, predicts: np.ndarray | None = None
) -> LogitsError | None:
    """chosen: (K,) bool, the compared positions of a kind; positions: how many of that kind the prompt has; predicts:
    (K,) bool, those that a text token follows, None where no perplexity is wanted."""
    if not chosen.any():
        return None
    kl, agrees = tokens.kl[chosen], tokens.agrees[chosen]
    scored = np.zeros_like(chosen) if predicts is None else chosen & predicts
    perplexities = [
        float(np.exp(nll[scored].mean())) if scored.any() else None for nll in (tokens.reference_nll, tokens.other_nll)
    ]
    return LogitsError(len(kl), positions, float(kl.mean()), float(kl.max()), float(agrees.mean()), *perplexities)


def _parted_at(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """How many tokens are the same before two texts part; None where they do not."""
    if tuple(ours) == tuple(theirs):
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
