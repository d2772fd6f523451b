"""Error against depth as a picture: a line a comparison, its own errors dashed, both towers side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.parity.report import Comparison, PointError, Report
from ivcore.errors import BackendError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart with colour-blind eyes too (Okabe and Ito, jfly.uni-koeln.de/color, 2002)."""

SUSPECT_COLOUR = "#b00020"
NUMBERED_TICKS = 12
"""About so many layers of a tower have their number written below the axis."""

LEGEND_CHARACTERS = 140
"""What one line below the axis holds."""

EQUAL_BELOW = 1e-7
"""Lowest power of ten on the axis when all runs are equal."""


def check_plotting(file: str | Path) -> None:
    """Raise BackendError where `draw` would fail only after all the work: no matplotlib, or no such folder."""
    if not Path(file).absolute().parent.is_dir():
        raise BackendError(f"{Path(file).parent} is no folder to write the plot to; make it, or name another.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BackendError("Drawing the plot needs matplotlib: run pip install 'ivmlx[plot]'.") from None


def draw(report: Report, file: str | Path) -> None:
    """Write a PNG of all comparisons; it is written beside and renamed, so `file` is whole or as it was."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    floor = _label_errors(axes, report.comparisons)
    _label_points(axes, report.comparisons[0].points)
    for index, comparison in enumerate(report.comparisons):
        _draw_comparison(axes, comparison, report.title(comparison.run), COLOURS[index % len(COLOURS)], floor)
    axes.set_title(f"Error against depth; reference: {report.reference}", loc="left", fontsize=12)
    _legend(figure, axes)
    save(figure, file)


def save(figure: Any, file: str | Path) -> None:
    """Write a figure as a PNG, beside and renamed, so that `file` is whole or as it was."""
    target = Path(file)
    part = target.with_name(f"{target.name}.part")
    try:
        figure.savefig(part, format="png")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _draw_comparison(axes: Any, comparison: Comparison, title: str, colour: str, floor: float) -> None:
    points = comparison.points
    inherited = [_height(point.relative_l2, floor) for point in points]
    own = [_height(point.own, floor) for point in points]
    for vision in (True, False):
        tower = [p for p, point in enumerate(points) if point.stack != "mergers" and _vision(point) == vision]
        label = None if vision else title
        axes.plot(tower, [inherited[p] for p in tower], "-o", color=colour, markersize=3, linewidth=1.6, label=label)
        axes.plot(tower, [own[p] for p in tower], "--", color=colour, linewidth=1.1)
    # A merger hangs on the block before it; the next block does not depend on it.
    mergers = [p for p, point in enumerate(points) if point.stack == "mergers"]
    axes.plot(mergers, [inherited[p] for p in mergers], "D", color=colour, markersize=5)
    axes.plot(mergers, [own[p] for p in mergers], "D", color=colour, markersize=5, markerfacecolor="white")
    if comparison.suspect:
        place = next(p for p, point in enumerate(points) if point.point == comparison.suspect.point)
        height = own[place] if math.isfinite(own[place]) else floor
        axes.plot(place, height, "o", color=SUSPECT_COLOUR, markersize=13, markerfacecolor="none", markeredgewidth=2)
        late = place > 0.7 * len(points)
        axes.annotate(
            f"suspect: {comparison.suspect.point}",
            (place, height),
            textcoords="offset points",
            xytext=(-12 if late else 12, 12),
            ha="right" if late else "left",
            color=SUSPECT_COLOUR,
            fontweight="bold",
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5},
        )


def _label_errors(axes: Any, comparisons: Sequence[Comparison]) -> float:
    """A logarithmic axis over all errors, with a place for zero below them, which is returned."""
    values = [value for each in comparisons for point in each.points for value in (point.own, point.relative_l2)]
    shown = [value for value in values if 0 < value < math.inf] or [EQUAL_BELOW]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    floor = 10.0 ** (low - 1)
    ticks = {10.0**power: f"$10^{{{power}}}$" for power in range(low, high + 1)}
    if 0.0 in values:
        ticks[floor] = "0"
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_yticks([], minor=True)
    # Half a decade below, and one above for the towers' names.
    axes.set_ylim(min(ticks) / 3, 10.0 ** (high + 0.8))
    axes.set_ylabel("relative L2 error")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return floor


def _label_points(axes: Any, points: Sequence[PointError]) -> None:
    """Numbers of some layers and the names of all other points; a divider and the towers' names."""
    places, labels = [], []
    for stack in ("vision blocks", "decoder layers"):
        members = [place for place, point in enumerate(points) if point.stack == stack]
        step = max(1, round(len(members) / NUMBERED_TICKS))
        places += members[::step]
        labels += [str(number) for number in range(0, len(members), step)]
    for place, point in enumerate(points):
        if point.stack not in ("vision blocks", "decoder layers"):
            places.append(place)
            labels.append(_word(point.point))
    axes.set_xticks(places, labels, fontsize=8)
    for text in axes.get_xticklabels():
        text.set_rotation(0 if text.get_text().isdigit() else 90)
    axes.set_xlim(-1, len(points))
    visual = sum(_vision(point) for point in points)
    if visual:
        axes.axvline(visual - 0.5, color="#888888", linewidth=1)
    for name, start, stop in (("vision tower", 0, visual), ("decoder", visual, len(points))):
        if stop > start:
            style: dict[str, Any] = {"ha": "center", "va": "top", "color": "#555555", "fontsize": 11}
            axes.text((start + stop - 1) / 2, 0.985, name, transform=axes.get_xaxis_transform(), **style)


def _legend(figure: Any, axes: Any) -> None:
    from matplotlib.lines import Line2D

    handles, _ = axes.get_legend_handles_labels()
    grey: dict[str, Any] = {"color": "#555555"}
    keys = [
        Line2D([], [], linestyle="-", marker="o", markersize=3, label="with what it inherits", **grey),
        Line2D([], [], linestyle="--", label="own error, fed with the reference", **grey),
        Line2D([], [], linestyle="", marker="D", markersize=5, label="merger (hollow: own error)", **grey),
    ]
    entries = [*handles, *keys]
    short = sum(len(str(entry.get_label())) for entry in entries) < LEGEND_CHARACTERS
    figure.legend(
        handles=entries, loc="outside lower center", ncols=len(entries) if short else 2, frameon=False, fontsize=9
    )


def _vision(point: PointError) -> bool:
    return point.point.startswith("visual.")


def _word(name: str) -> str:
    """A point's name short enough for a tick."""
    if name.startswith("visual.deepstack_merger_list."):
        return f"deepstack {name.rpartition('.')[2]}"
    return name.removeprefix("visual.").replace("_embed", "es")


def _height(value: float, floor: float) -> float:
    """Where an error is drawn: zero on the floor, and what is not finite not at all."""
    return max(value, floor) if math.isfinite(value) else math.nan
