"""The picture of a conversion's report: its lines are the report's, its labels apart, and it is whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convert.m2la.plot import draw

matplotlib = pytest.importorskip("matplotlib")


def report(layers: int) -> dict[str, Any]:
    """Of a checkpoint with wide layers; the first shows no visual token."""
    return {
        "cache_bytes_per_token": {"source": 147_456, "converted": 73_728},
        "model": {"text": {"kl": 0.0123, "top1": 0.985}, "visual": None},
        "layers": [
            {
                "layer": layer, "rank": 1664 - layer, "rope_heads": 1 + layer % 4, "width": 1664 - layer + 128,
                "energy": 1 - layer * 1e-3, "output_error": {"text": layer * 1e-3, "visual": layer * 2e-3 or None},
            }
            for layer in range(layers)
        ],
    }  # fmt: skip


@pytest.mark.parametrize("layers", [2, 6, 36, 64])
def test_lines_are_the_reports_and_no_label_lies_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    from matplotlib.figure import Figure

    kept: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **named: (kept.append(self), save(self, *args, **named)))
    file = tmp_path / "cost.png"
    draw(report(layers), file, "a model's folder")
    with Image.open(file) as picture:
        assert picture.format == "PNG"
    assert [*tmp_path.iterdir()] == [file]
    (figure,) = kept
    errors, cache = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in errors.lines}
    assert drawn["text positions"] == [layer * 1e-3 for layer in range(layers)]
    assert drawn["visual positions"][1:] == [layer * 2e-3 for layer in range(1, layers)]
    assert drawn["visual positions"][0] != drawn["visual positions"][0]  # NaN: a gap
    assert drawn["energy that the latent leaves out"] == pytest.approx([layer * 1e-3 for layer in range(layers)])
    heights = [bar.get_height() for bar in cache.patches]
    assert heights == [1664 - layer for layer in range(layers)] + [128] * layers
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in cache.texts]
    assert len(boxes) == layers
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
    legend = cache.get_legend().get_window_extent(renderer)
    assert not any(box.overlaps(legend) for box in boxes)
    title = errors.get_title(loc="left")
    assert "KL 0.0123, top-1 98.5%" in title and "visual" not in title


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fail(self: Figure, part: Path, **named: Any) -> None:
        Path(part).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    file = tmp_path / "cost.png"
    file.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        draw(report(3), file, "a model")
    assert file.read_bytes() == b"old" and [*tmp_path.iterdir()] == [file]
