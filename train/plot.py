"""`iv3 train plot`: the curves of runs as one picture, several runs over each other.

- Of one run every curve of a panel has a colour, of several runs every run. Where curves are equal, the one below is
  wider and shows.
- A thick curve is a mean over neighbouring steps, the values are faint behind it. It does not reach from one phase of a
  curriculum into the next.
- Steps are on the same axis in all panels. An axis is logarithmic where values are all positive and spread enough.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ivcore.errors import TrainingError
from train.curves import HELD_OUT, Panel, Run, panels_of, read_run, short_names, smooth

CURVES = "curves.png"
ABOUT = ("stage", "model", "backend", "dtype")
"""What of run.json is said."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart with colour-blind eyes too (Okabe and Ito, jfly.uni-koeln.de/color, 2002); then again, dashed."""

TOTALS = ("reward", f"{HELD_OUT}: mean")
"""What sums up the other curves of its panel, and is black."""

GREY = "#666666"
WIDTHS = 1.4, 1.0
"""Points: of the last curve, and by how much the first is wider."""

COLUMNS = 3
PANEL_INCHES = 4.5, 2.75
AXES_SHARE = 0.8
"""About so much of a panel lies between its axes."""

LABEL_POINTS, CHARACTER_POINTS, LEGEND_CHARACTERS = 10.0, 4.5, 170
"""Height of the name of a curve, a character of a phase's name, and what one line of the legend holds."""

TICKS = (1, 2, 2.5, 5, 10)
"""What may lie between two of them, but for a power of ten."""

SMOOTHED = 40
"""Neighbours are weighed over the run's steps divided by this; fewer values are not smoothed."""

LOGARITHMIC = 10.0
"""A panel that may have a logarithmic axis has one from this ratio of the largest to the smallest value."""


def draw(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the curves of runs to a PNG, beside and renamed; returns its path, RUN/curves.png of one run unless given.

    Raises TrainingError in one sentence: no matplotlib, a folder without metrics, several runs without `out`.
    """
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    target = _target(paths, out)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise TrainingError("Drawing curves needs matplotlib: run pip install 'ivmlx[plot]'.") from None
    runs = [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]
    panels = list(panels_of(runs))
    rows = -(-len(panels) // COLUMNS)
    width, height = PANEL_INCHES
    figure = Figure((COLUMNS * width, rows * height + 0.5), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, runs)
    for axes in grid[: len(panels)][-COLUMNS:]:
        axes.set_xlabel("step", fontsize=8)
    for axes in grid[len(panels) :]:
        axes.remove()
    _head(figure, runs)
    part = target.with_name(f"{target.name}.part")
    try:
        figure.savefig(part, format="png")
        os.replace(part, target)
    except OSError as error:
        raise TrainingError(f"{target} cannot be written ({error.strerror}).") from None
    finally:
        part.unlink(missing_ok=True)
    return target


def _target(paths: Sequence[Path], out: str | Path | None) -> Path:
    if out is None and len(paths) > 1:
        raise TrainingError("Several runs have no one place for their picture: add --out FILE.png.")
    target = paths[0] / CURVES if out is None else Path(out)
    if target.suffix.lower() != ".png":
        raise TrainingError(f"{target} is not the name of a PNG, which is what is drawn; name a FILE.png.")
    if out is not None and not target.absolute().parent.is_dir():
        raise TrainingError(f"{target.parent} is no folder to write to; make it, or name another.")
    return target


def _draw_panel(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    drawn = [(run, key) for run in runs for key in panel.curves if key in run.curves]
    values = np.concatenate([run.curves[key][1] for run, key in drawn]) * panel.scale
    logarithmic = panel.log and values.min() > 0 and values.max() >= LOGARITHMIC * values.min()
    _set_axes(axes, panel, values, max(run.last for run in runs), logarithmic)
    names_above = len(runs[0].phases) > 1
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=14 if names_above else 6)
    looks = [_look(panel, runs, run, key) for run, key in drawn]
    ends = [_draw_curve(axes, panel, run, key, look) for (run, key), look in zip(drawn, looks, strict=True)]
    _mark_phases(axes, runs)
    if len(panel.curves) > 1:
        names = [(panel.curves[key], look["color"]) for (_, key), look in zip(drawn, looks, strict=True)]
        _name_ends(axes, ends, names)


def _look(panel: Panel, runs: Sequence[Run], run: Run, key: str) -> dict[str, Any]:
    """How a curve is drawn: as its run, or where there is only one, as its key."""
    parts = [each for each in panel.curves if each not in TOTALS] if len(panel.curves) > 1 else []
    if parts and key not in parts:
        return {"color": "#000000", "linestyle": "-", "linewidth": sum(WIDTHS)}
    number, count = (parts.index(key), len(parts)) if parts else (runs.index(run), len(runs))
    width = WIDTHS[0] + WIDTHS[1] * (1 - (number + 1) / count)
    return {"color": _colour(number), "linestyle": _line(number), "linewidth": width}


def _draw_curve(axes: Any, panel: Panel, run: Run, key: str, look: dict[str, Any]) -> float:
    """A run's values of a key, smoothed phase by phase; returns the height at which the curve ends."""
    steps, values = run.curves[key]
    values = values * panel.scale
    if not panel.smooth or len(steps) < SMOOTHED:
        marker = "o" if panel.dots or len(steps) == 1 else None
        axes.plot(steps, values, marker=marker, markersize=2 + look["linewidth"], clip_on=False, **look)
        return float(values[-1])
    axes.plot(steps, values, color=look["color"], linewidth=0.8, alpha=0.22, zorder=1)
    # What is drawn on a logarithmic axis is smoothed there too: a spike weighs what it looks like.
    there, back = (np.log, np.exp) if axes.get_yscale() == "log" else (np.asarray, np.asarray)
    first = 0
    for _, last in run.phases:
        inside = slice(first, int(np.searchsorted(steps, last, side="right")))
        first = inside.stop
        if len(steps[inside]):
            places, means = smooth(steps[inside], there(values[inside]), run.last / SMOOTHED)
            axes.plot(places, back(means), zorder=2, **look)
    return float(back(means[-1]))


def _set_axes(axes: Any, panel: Panel, values: np.ndarray, last: int, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = float(values.min()), float(values.max())
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        high = high or float(panel.zero)  # all values 0, on an axis from 0
        room = 0.06 * ((high if panel.zero else high - low) or abs(high) or 1)
        axes.set_ylim(0 if panel.zero else low - room, 1.03 * panel.top if panel.top else high + room)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    largest = None if logarithmic else max(high, -low)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value, largest)))
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.tick_params(labelsize=8, color=GREY, labelcolor="#333333", length=3)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def number_text(value: float, largest: float | None = None) -> str:
    """A number at a tick, short: 1e-5, 0.25, 20,000. largest: on the axis, whose form all have where it is given."""
    if value and abs(value if largest is None else largest) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _mark_phases(axes: Any, runs: Sequence[Run]) -> None:
    """A line where a phase begins, and its name above where there is room; runs that differ have lines in colours."""
    same = all(run.phases == runs[0].phases for run in runs)
    for number, run in enumerate(runs[:1] if same else runs):
        first, points = 0, PANEL_INCHES[0] * AXES_SHARE * 72 / run.last
        for name, last in run.phases if len(run.phases) > 1 else ():
            if first:
                colour = GREY if same else _colour(number)
                axes.axvline(first + 0.5, color=colour, linewidth=0.8, linestyle=":", zorder=0)
            if same and len(name) * CHARACTER_POINTS < (last - first) * points:
                above = axes.get_xaxis_transform()
                axes.text(first, 1.01, f" {name}", transform=above, fontsize=7, color=GREY, va="bottom")
            first = last


def _name_ends(axes: Any, ends: Sequence[float], names: Sequence[tuple[str, str]]) -> None:
    """Names, each with its colour, right of the panel where the curves end, apart from each other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [float(to_axes.transform((0, end))[1]) for end in ends]
    apart = LABEL_POINTS / (PANEL_INCHES[1] * AXES_SHARE * 72)
    for (name, colour), place in zip(names, spread(places, apart), strict=True):
        axes.text(1.02, place, name, transform=axes.transAxes, fontsize=8, va="center", color=colour)


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Places between 0 and 1 moved to be at least `apart`, in the same order, and as near as that allows."""
    groups: list[tuple[float, list[int]]] = []  # of neighbours that touch: the middle, the members from below
    for number in sorted(range(len(places)), key=places.__getitem__):
        middle, members = places[number], [number]
        while groups and middle - groups[-1][0] < apart * (len(members) + len(groups[-1][1])) / 2:
            other, others = groups.pop()
            middle = (other * len(others) + middle * len(members)) / (len(others) + len(members))
            members = others + members
            room = apart * (len(members) - 1) / 2
            middle = max(min(middle, 1 - room), room)
        groups.append((middle, members))
    found = list(places)
    for middle, members in groups:
        for index, number in enumerate(members):
            found[number] = middle + apart * (index - (len(members) - 1) / 2)
    return found


def _head(figure: Any, runs: Sequence[Run]) -> None:
    """What the run is, or which colour each has and in what they differ."""
    if len(runs) == 1:
        figure.suptitle(_title(runs[0], ABOUT), x=0.01, ha="left", fontsize=11)
        return
    from matplotlib.lines import Line2D

    differing = [key for key in ABOUT if len({run.about.get(key) for run in runs}) > 1]
    titles = [_title(run, differing) for run in runs]
    handles = [
        Line2D([], [], color=_colour(number), linestyle=_line(number), linewidth=2.5, label=title)
        for number, title in enumerate(titles)
    ]
    columns = max(1, LEGEND_CHARACTERS // (max(map(len, titles)) + 6))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=10)


def _title(run: Run, keys: Sequence[str]) -> str:
    told = ", ".join(Path(run.about[key]).name for key in keys if key in run.about)
    return f"{run.name} ({told})" if told else run.name


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _line(number: int) -> Literal["-", "--"]:
    return "-" if number < len(COLOURS) else "--"
