"""The picture of runs' curves: it shows what the runs wrote, its labels are apart, and it is whole or as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ivcore.errors import TrainingError
from train.curves import read_run, short_names, smooth
from train.plot import draw, number_text, spread

pytest.importorskip("matplotlib")
KINDS = ("colour", "shape", "count", "direction", "order", "when", "before", "after", "rare", "subtitle")
Figures = Callable[..., Any]


@pytest.fixture(scope="module")
def runs(tools: Any) -> Any:
    return tools.neighbour("train", "runs")


@pytest.fixture
def figure_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figures:
    """Function (folders) that gives the figure after it was laid out."""
    from matplotlib.figure import Figure

    def get(*folders: Path) -> Any:
        kept: list[Any] = []
        save = Figure.savefig
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda self, *given, **how: (kept.append(self), save(self, *given, **how)))
            draw(folders, tmp_path / "picture.png")
        return kept[0]

    return get


def write_run(
    folder: Path, metrics: Sequence[Mapping[str, Any]], evaluations: Mapping[int, Mapping[str, float]] | None = None
) -> Path:
    """A run's folder with a line for each step, and by step the held-out values of kinds."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "phase": "all", **each}) for step, each in enumerate(metrics, start=1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for step, kinds in (evaluations or {}).items():
        values = {kind: {"rows": 9, "measure": "accuracy", "value": value} for kind, value in kinds.items()}
        mean = sum(kinds.values()) / len(kinds)
        with (folder / "evaluations.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step, "phase": "all", "mean": mean, "kinds": values}) + "\n")
    return folder


def panel(figure: Any, title: str) -> Any:
    (axes,) = (each for each in figure.axes if each.get_title(loc="left") == title)
    return axes


def titles(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def points(line: Any) -> list[tuple[float, float]]:
    return list(zip(*(np.asarray(each, float).tolist() for each in line.get_data()), strict=True))


def curves(axes: Any) -> list[Any]:
    """The lines of values, without those that mark phases."""
    return [line for line in axes.get_lines() if line.get_linestyle() != ":"]


# What is shown.


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_real_run_has_a_panel_for_all_that_it_measured_with_its_very_values(
    runs: Any, tmp_path: Path, backend: str, stage: str, figure_of: Figures
) -> None:
    choices = {"choices": ["red", "blue"], "answer": 0}
    rows = [row | choices for row in runs.text_rows(5)]
    data = runs.write_rows(tmp_path / "rows.jsonl", rows)
    how: dict[str, Any] = {"steps": 3}
    if stage == "rl":
        how |= {"stage": "rl", "rollout": {"rollouts": 2, "max_tokens": 3}, "kl_weight": 0.1}
    out = runs.run(runs.job(tmp_path / "run", data, backend, **how)).path
    figure, logged = figure_of(out), runs.lines(out / "metrics.jsonl")
    expected = {"learning rate": "learning_rate", "tokens a step": "tokens", "tokens a second": "tokens_per_second"}
    if stage == "sft":
        expected |= {"loss": "loss", "gradient norm": "gradient_norm"}
        assert set(titles(figure)) == {*expected, "peak memory (GiB)"}
    else:
        assert {"reward", "tokens of an answer", "groups without spread", "peak memory (GiB)"} <= set(titles(figure))
    for title, key in expected.items():
        (line,) = curves(panel(figure, title))
        assert points(line) == [(each["step"], each[key]) for each in logged], title
    (memory,) = curves(panel(figure, "peak memory (GiB)"))
    assert [value * 2**30 for _, value in points(memory)] == [each["peak_bytes"] for each in logged]
    assert all(value > 0 for _, value in points(memory))


def test_of_one_run_kinds_share_a_panel_and_of_several_each_has_its_own(tmp_path: Path, figure_of: Figures) -> None:
    metrics = [{"reward": 0.5, "reward_choice": 0.25, "reward_iou": step / 9} for step in range(1, 9)]
    a, b = (
        write_run(tmp_path / name, metrics, {4: {"colour": 0.5, "span": 0.25}, 8: {"colour": 1.0, "span": 0.75}})
        for name in "ab"
    )
    one, two = figure_of(a), figure_of(a, b)
    assert titles(one) == ["reward", "held out"]
    assert [points(line) for line in curves(panel(one, "held out"))] == [
        [(4, 0.375), (8, 0.875)], [(4, 0.5), (8, 1.0)], [(4, 0.25), (8, 0.75)]
    ]  # fmt: skip
    assert [text.get_text() for text in panel(one, "held out").texts] == ["mean", "colour", "span"]
    held_out = [f"held out: {name}" for name in ("mean", "colour", "span")]
    assert titles(two) == ["reward: all", "reward: choice", "reward: iou", *held_out]
    (legend,) = two.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    colours = [line.get_color() for line in legend.get_lines()]
    for axes in two.axes:
        assert [line.get_color() for line in curves(axes)] == colours and len(set(colours)) == 2


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path, figure_of: Figures) -> None:
    folders = [write_run(tmp_path / place / "run", [{"loss": 1.0}]) for place in ("here", "there")]
    for folder, backend in zip(folders, ("mlx", "torch"), strict=True):
        (folder / "run.json").write_text(json.dumps({"stage": "sft", "model": "/a/base", "backend": backend}))
    names = [text.get_text() for text in figure_of(*folders).legends[0].get_texts()]
    assert names == ["here/run (mlx)", "there/run (torch)"]
    assert figure_of(folders[0]).get_suptitle() == "run (sft, base, mlx)"
    assert short_names([Path("/x/a/run"), Path("/y/a/run"), Path("/y/b/run")]) == ["x/a/run", "y/a/run", "y/b/run"]


def test_the_same_run_given_twice_is_one_run(tmp_path: Path, figure_of: Figures, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run", [{"loss": 1.0}])
    assert not figure_of(folder, Path("run")).legends


def test_missing_values_and_a_line_that_is_still_being_written_are_left_out(tmp_path: Path, figure_of: Figures) -> None:
    folder = write_run(tmp_path / "run", [{"loss": 1.0}, {"loss": None}, {"loss": 3.0}])
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "loss": 7')
    (line,) = curves(panel(figure_of(folder), "loss"))
    assert points(line) == [(1, 1.0), (3, 3.0)]


@pytest.mark.parametrize(
    ("values", "scale"),
    [([5.0, 0.4, 0.02], "log"), ([1.0, 0.9, 1.1], "linear"), ([5.0, 0.1, 0.0], "linear"), ([5.0, 0.1, -1], "linear")],
)
def test_an_axis_is_logarithmic_where_values_are_positive_and_spread(
    tmp_path: Path, figure_of: Figures, values: list[float], scale: str
) -> None:
    folder = write_run(tmp_path / "run", [{"loss": value} for value in values])
    axes = panel(figure_of(folder), "loss")
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low < min(values) and high > max(values)


# Smoothing.


def test_a_smoothed_curve_does_not_reach_over_phases_which_are_marked_and_named(
    tmp_path: Path, figure_of: Figures
) -> None:
    lengths = {"short": 50, "long": 70, "short again": 60}
    values = [
        {"loss": 2.0 + index, "phase": phase} for index, phase in enumerate(lengths) for _ in range(lengths[phase])
    ]
    axes = panel(figure_of(write_run(tmp_path / "run", values)), "loss")
    raw, *smoothed = curves(axes)
    assert [value for _, value in points(raw)] == [each["loss"] for each in values]
    assert len(smoothed) == 3 and raw.get_alpha() < 0.5
    for line, level, first, last in zip(smoothed, (2, 3, 4), (1, 51, 121), (50, 120, 180), strict=True):
        steps, heights = zip(*points(line), strict=True)
        assert (steps[0], steps[-1]) == (first, last) and np.allclose(heights, level)
    marks = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert marks == [50.5, 120.5]
    assert [text.get_text().strip() for text in axes.texts] == list(lengths)


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(30, 300), st.integers(1, 9))
def test_the_mean_over_neighbours_of_a_line_is_the_line_without_lag(
    slope: float, start: float, count: int, width: int
) -> None:
    steps = np.arange(1, count + 1)
    places, means = smooth(steps, start + slope * steps, width)
    inside = (places > 3 * width) & (places <= count - 3 * width)
    assert np.allclose(means[inside], (start + slope * places)[inside], rtol=0, atol=1e-8)
    assert (places[0], places[-1]) == (1, count) and (np.diff(places) > 0).all()


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60, unique=True), st.floats(0.5, 200), st.data())
def test_means_stay_within_the_values_whatever_gaps_there_are(
    raw: list[int], width: float, data: st.DataObject
) -> None:
    steps = np.array(sorted(raw))
    values = np.array(data.draw(st.lists(st.floats(-9, 9), min_size=len(raw), max_size=len(raw))))
    places, means = smooth(steps, values, width)
    assert set(places) <= set(steps) and means.min() >= values.min() - 1e-9 and means.max() <= values.max() + 1e-9


# Labels.


def overlapping(texts: Sequence[Any], figure: Any) -> list[tuple[str, str]]:
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text().strip()]
    return [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.shrunk(0.95, 0.8).overlaps(other)]


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_no_label_lies_on_another_and_all_are_inside_the_picture(
    tmp_path: Path, figure_of: Figures, close: bool, count: int
) -> None:
    random = np.random.default_rng(0)
    phases = ["short"] * 200 + ["a phase of a very long name indeed"] * 20 + ["long"] * 100
    metrics = [
        {
            "loss": float(np.exp(random.normal() - place / 90)), "gradient_norm": 1e-7 * (1 + place), "kl": 1e-5,
            "learning_rate": 1e-5 * place / 320, "tokens": 250_000, "tokens_per_second": 12_345.6, "peak_bytes": 10**10,
            "reward": 0.5, "reward_choice": 0.5, "reward_iou": 0.5, "cut_off": 0.0, "clipped": 0.0, "phase": phase,
        }
        for place, phase in enumerate(phases)
    ]  # fmt: skip
    evaluations = {
        step: {kind: 1.0 if close else number / 9 for number, kind in enumerate(KINDS)} for step in (100, 200, 320)
    }
    folders = [write_run(tmp_path / f"run-{number}", metrics, evaluations) for number in range(count)]
    figure = figure_of(*folders)
    texts = [text for axes in figure.axes for text in (*axes.texts, axes._left_title)]
    for axes in figure.axes:
        low, high = axes.get_ylim()
        ticks = [tick for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        texts += [tick.label1 for tick in ticks] + [axes.xaxis.label]
        assert len(ticks) >= 2 or axes.get_yscale() == "log", axes.get_title(loc="left")
    texts += [figure._suptitle] if count == 1 else figure.legends[0].get_texts()
    assert not overlapping(texts, figure)
    width, height = figure.canvas.get_width_height()
    for text in texts:
        box = text.get_window_extent(figure.canvas.get_renderer())
        assert not text.get_text() or (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height), text


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.08))
def test_places_are_spread_in_order_within_the_panel_and_no_further_than_needed(
    places: list[float], apart: float
) -> None:
    found = spread(places, apart)
    assert min(found) >= min(0, *places) - 1e-9 and max(found) <= max(1, *places) + 1e-9
    order = sorted(range(len(places)), key=lambda number: found[number])
    assert [places[number] for number in order] == sorted(places)
    gaps = [found[b] - found[a] for a, b in pairwise(order)]
    assert all(gap >= apart - 1e-9 for gap in gaps)
    if all(b - a >= apart for a, b in pairwise(sorted(places))):
        assert found == pytest.approx(places)


def test_numbers_at_ticks_are_short() -> None:
    shown = {0: "0", 1e-5: "1e-5", 0.00025: "2.5e-4", 0.25: "0.25", -0.05: "-0.05", 20_000: "20,000", 12.5: "12.5"}
    assert {value: number_text(value) for value in shown} == shown
    assert [number_text(value, 0.02) for value in (0.005, 0.01)] == ["0.005", "0.01"]


# The file.


def test_the_picture_is_beside_the_run_unless_told_otherwise(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{"loss": 1.0}])
    assert draw([folder]) == folder / "curves.png"
    assert draw([folder], tmp_path / "other.png") == tmp_path / "other.png"
    for file in (folder / "curves.png", tmp_path / "other.png"):
        with Image.open(file) as picture:
            assert picture.format == "PNG" and picture.width > 1000
    assert sorted(file.name for file in folder.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_run_of_one_step_and_one_of_very_many_are_drawn(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    one = write_run(tmp_path / "one", [{"loss": 0.0, "tokens": 0}], {1: {"all": 0.0}})
    many = write_run(tmp_path / "many", [{"loss": float(value)} for value in random.random(30_000)])
    draw([one])
    draw([one, many], tmp_path / "both.png")


def refused(runs: Any, folders: Sequence[Path], out: Path | None = None) -> str:
    with pytest.raises(TrainingError) as caught:
        draw(folders, out)
    return str(runs.one_sentence(str(caught.value)))


def test_what_cannot_be_drawn_is_one_sentence(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = (write_run(tmp_path / name, [{"loss": 1.0}]) for name in ("run", "other"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    assert str(empty) in refused(runs, [empty])
    assert str(tmp_path / "absent") in refused(runs, [folder, tmp_path / "absent"], tmp_path / "a.png")
    assert "--out" in refused(runs, [folder, other])
    assert "a.pdf" in refused(runs, [folder], tmp_path / "a.pdf")
    assert "nowhere" in refused(runs, [folder], tmp_path / "nowhere" / "a.png")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert "pip install 'ivmlx[plot]'" in refused(runs, [folder])
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.part"))


def test_a_full_disk_leaves_the_picture_that_was_there(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    folder = write_run(tmp_path / "run", [{"loss": 1.0}])
    before = draw([folder]).read_bytes()

    def half(self: Figure, file: Path, **how: Any) -> None:
        file.write_bytes(before[:99])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", half)
    assert "No space left on device" in refused(runs, [folder])
    assert (folder / "curves.png").read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_damaged_run_json_costs_the_title_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{"loss": 1.0}])
    for content in ("{", "[]"):
        (folder / "run.json").write_text(content)
        assert read_run(folder, "run").about == {}
    shutil.rmtree(folder)
