"""`iv3 parity`: compare runs of a model, show the report, draw it, and hold it against the gates."""

from __future__ import annotations

import json
from collections.abc import Sequence

from agent.display import Display
from convert.parity.compare import compare
from convert.parity.plot import check_plotting, draw
from convert.parity.report import ParityError


def run(
    a: str,
    b: str | None,
    *,
    backends: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    video: str | None,
    question: str | None,
    tokens: int,
    max_kl: float | None,
    min_agreement: float | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """The report on stdout; at the end raises a ParityError that names every bound that a comparison misses."""
    if plot:
        check_plotting(plot)
    with Display() as display:
        report = compare(
            a,
            b,
            backends=backends,
            dtypes=dtypes,
            video=video,
            question=question,
            tokens=tokens,
            on_progress=display.show,
        )
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False, indent=1))
    else:
        from agent.parity_view import show

        show(report)
    if plot:
        draw(report, plot)
    if missed := report.misses(max_kl, min_agreement):
        raise ParityError(f"{'; '.join(missed)}.")
