"""The picture of a parity report: whole or not written at all, for any numbers, and its labels apart."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convert.parity.plot import check_plotting, draw
from convert.parity.report import Comparison, Decode, PointError, PromptSize, Report, RunName, Suspect
from ivcore.errors import BackendError

matplotlib = pytest.importorskip("matplotlib")


def release_points(scale: float, fault: str | None = None) -> tuple[PointError, ...]:
    """As many points as the release has, their errors rising with depth."""
    names = [("visual.patch_embed", "patches")]
    for block in range(27):
        names.append((f"visual.blocks.{block}", "vision blocks"))
        if block in (8, 16, 24):
            names.append((f"visual.deepstack_merger_list.{block // 8 - 1}", "mergers"))
    names += [("visual.merger", "mergers"), ("embeddings", "embeddings")]
    names += [(f"layers.{layer}", "decoder layers") for layer in range(36)] + [("norm", "norm"), ("logits", "head")]
    return tuple(
        PointError(name, stack, 9, scale * (place + 1), 1.0, 1.0, None, None, scale * (100 if name == fault else 1), 1)
        for place, (name, stack) in enumerate(names)
    )


def make_report(*points: tuple[PointError, ...], suspect: str | None = None) -> Report:
    found = Suspect(suspect, 1.0, 0.1, "") if suspect else None
    runs = [RunName("model", backend, "float32") for backend in ("mlx", "torch", "mlx")]
    comparisons = [
        Comparison(run, each, found, None, None, Decode(None, (), ())) for run, each in zip(runs, points, strict=False)
    ]
    return Report(RunName("model", "torch", "float32"), PromptSize("probe", 9, 2), tuple(comparisons))


@pytest.fixture
def figure_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function (report) that gives the figure after it was laid out."""
    from matplotlib.figure import Figure

    def get(report: Report) -> Figure:
        kept: list[Figure] = []
        save = Figure.savefig

        def keep(self: Figure, *arguments: Any, **named: Any) -> None:
            kept.append(self)
            save(self, *arguments, **named)

        monkeypatch.setattr(Figure, "savefig", keep)
        draw(report, tmp_path / "figure.png")
        return kept[0]

    return get


@pytest.mark.parametrize("suspect", ["layers.0", "layers.34", "visual.blocks.26", "logits", "visual.patch_embed"])
def test_no_label_lies_on_another_at_the_release_s_depth(figure_of: Any, suspect: str) -> None:
    points = (release_points(1e-7, suspect), release_points(1e-3), release_points(1e-5))
    figure = figure_of(make_report(*points, suspect=suspect))
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    ticks = [label for label in axes.get_xticklabels() if label.get_text()]
    texts = [*ticks, *axes.texts[:2], *figure.legends[0].get_texts(), axes.xaxis.label]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert len(ticks) >= 20 and {"patches", "0", "deepstack 2", "merger", "embeddings", "norm", "logits"} <= {
        label.get_text() for label in ticks
    }
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    marks = [text for text in axes.texts if text.get_text() == f"suspect: {suspect}"]
    box = marks[0].get_window_extent(renderer)
    assert len(marks) == 3 and box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_lines_are_the_errors_and_mergers_are_no_part_of_them(figure_of: Any) -> None:
    points = release_points(1e-6, "layers.5")
    (axes,) = figure_of(make_report(points)).axes
    lines = {tuple(line.get_ydata()) for line in axes.lines}
    for vision in (True, False):
        tower = [p for p in points if p.point.startswith("visual.") == vision and p.stack != "mergers"]
        assert tuple(p.relative_l2 for p in tower) in lines and tuple(p.own for p in tower) in lines
    assert axes.get_yscale() == "log"


def test_equal_runs_and_numbers_that_are_not_finite_are_drawn(figure_of: Any) -> None:
    zero = tuple(replace(point, own=0.0, relative_l2=0.0) for point in release_points(0.0))
    broken = tuple(replace(point, own=math.nan, relative_l2=math.inf) for point in release_points(1e-3)[40:])
    (axes,) = figure_of(make_report(zero)).axes
    assert "0" in [label.get_text() for label in axes.get_yticklabels()]
    figure_of(make_report((*release_points(1e-3)[:40], *broken), suspect="layers.20"))


def test_a_prompt_of_text_has_the_decoder_alone(figure_of: Any) -> None:
    points = tuple(point for point in release_points(1e-6) if not point.point.startswith("visual."))
    (axes,) = figure_of(make_report(points)).axes
    assert [text.get_text() for text in axes.texts] == ["decoder"]


def test_the_file_is_a_png_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "error.png"
    file.write_bytes(b"old")
    draw(make_report(release_points(1e-6)), file)
    with Image.open(file) as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
        assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    assert [*tmp_path.iterdir()] == [file]


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    file = tmp_path / "error.png"
    file.write_bytes(b"old")

    def fail(self: Figure, part: Path, **named: Any) -> None:
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(make_report(release_points(1e-6)), file)
    assert [*tmp_path.iterdir()] == [file] and file.read_bytes() == b"old"


def test_what_would_fail_after_all_the_work_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_plotting(tmp_path / "a.png")
    with pytest.raises(BackendError, match="is no folder to write the plot to"):
        check_plotting(tmp_path / "absent" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match=r"needs matplotlib: run pip install 'ivmlx\[plot\]'"):
        check_plotting(tmp_path / "a.png")
