"""A sheet of hits: each with the picture of its own time, whatever the text, and without what cannot be drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agent.sheet import MARGIN, PICTURE, Thumb, draw_sheet
from ivcore.errors import MediaError

MakeClip = Callable[..., Path]
COLOURS = ((220, 30, 30), (30, 200, 40), (40, 60, 220))


def three_colours(index: int, width: int, height: int) -> np.ndarray:
    """A second of red, of green and of blue, at ten frames a second."""
    return np.full((height, width, 3), COLOURS[min(index // 10, 2)], np.uint8)


def picture_centres(sheet: Image.Image, columns: int, count: int) -> list[tuple[int, ...]]:
    """The pixels in the middle of the thumbnails; the sheet's height tells how high a row is."""
    rows = -(-count // columns)
    top = 2 * MARGIN + 18
    height = (sheet.height - top) // rows
    places = [(MARGIN + n % columns * (PICTURE[0] + MARGIN), top + n // columns * height) for n in range(count)]
    return [tuple(sheet.getpixel((x + PICTURE[0] // 2, y + PICTURE[1] // 2)))[:3] for x, y in places]  # type: ignore[arg-type]


def test_every_hit_has_the_picture_of_the_middle_of_its_span(make_clip: MakeClip, tmp_path: Path) -> None:
    clip = str(make_clip(frames=30, picture=three_colours))
    spans = [(2.0, 3.0), (0.0, 1.0), (1.2, 1.2), (0.0, 3.0)]
    problems = draw_sheet([Thumb(clip, span, "text") for span in spans], "query", tmp_path / "sheet.png")
    assert problems == []
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width == MARGIN + 2 * (PICTURE[0] + MARGIN)
    for found, wanted in zip(picture_centres(sheet, 2, 4), (2, 0, 1, 1), strict=True):
        assert np.abs(np.array(found) - COLOURS[wanted]).max() < 30


@pytest.mark.parametrize("text", ["", "word " * 200, "x" * 5000, "犬 🐕 ä\x00\ud800 \x1b[31m"])
def test_any_text_stays_in_its_card(make_clip: MakeClip, tmp_path: Path, text: str) -> None:
    """Cards end where paper begins: no pixel of the gaps between them is anything else."""
    clip = str(make_clip(frames=10))
    draw_sheet([Thumb(clip, (0.0, 1.0), text)] * 3, text or " ", tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    for column in range(1, 2):
        gap = pixels[2 * MARGIN + 18 :, column * (PICTURE[0] + MARGIN) : column * (PICTURE[0] + MARGIN) + MARGIN]
        assert (gap == gap[-1, -1]).all()
    assert (pixels[-MARGIN:] == pixels[-1, -1]).all()


def test_a_hit_whose_video_is_gone_is_drawn_without_a_picture(make_clip: MakeClip, tmp_path: Path) -> None:
    clip = make_clip(frames=10)
    thumbs = [Thumb(str(tmp_path / "gone.mp4"), (0.0, 1.0), "lost"), Thumb(str(clip), (0.0, 1.0), "kept")]
    [problem] = draw_sheet(thumbs, "query", tmp_path / "sheet.png")
    assert "gone.mp4" in problem
    assert Image.open(tmp_path / "sheet.png").width == MARGIN + 2 * (PICTURE[0] + MARGIN)


@pytest.mark.parametrize("name", ["nowhere/sheet.png", "sheet.xyz", "sheet"])
def test_a_sheet_that_cannot_be_written_is_said_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(MediaError, match=r"cannot be written .*; name a \.png file"):
        draw_sheet([Thumb(str(tmp_path / "gone.mp4"), (0.0, 1.0), "text")], "query", tmp_path / name)
