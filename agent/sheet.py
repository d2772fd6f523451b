"""A sheet of thumbnails: what a search found, a picture each with its film, its time and its text under it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from agent.clock import span_text
from agent.spans import Span
from ivcore.errors import MediaError
from ivcore.video import decode_at

PICTURE = (320, 180)
"""Pixels that a thumbnail may fill: (width, height)."""
MARGIN, TEXT_SIZE, TEXT_LINES = 16, 14, 3
PAPER, CARD, INK, FAINT, TIME = "#f4f4f2", "#ffffff", "#222222", "#77777a", "#b4430f"


@dataclass(frozen=True)
class Thumb:
    """What a sheet shows of a hit: a frame from the middle of its span (seconds), its text, and what kind it is of."""

    path: str
    span: Span
    text: str
    kind: str = ""


def draw_sheet(thumbs: Sequence[Thumb], heading: str, target: Path) -> list[str]:
    """Draw thumbnails in rows, the first one top left, to a picture file; a sentence for each that has no picture.

    Raises MediaError where the file cannot be written.
    """
    columns = min(4, max(1, math.ceil(math.sqrt(len(thumbs)))))
    rows = max(1, math.ceil(len(thumbs) / columns))
    font, bold = _font(TEXT_SIZE), _font(TEXT_SIZE + 4)
    line, width = TEXT_SIZE + 5, PICTURE[0] - MARGIN
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [_fitted(measure, thumb.text, font, width, TEXT_LINES) for thumb in thumbs]
    cell = PICTURE[0] + MARGIN, PICTURE[1] + (2 + max(map(len, texts), default=0)) * line + 2 * MARGIN
    top = 2 * MARGIN + TEXT_SIZE + 4
    sheet = Image.new("RGB", (MARGIN + columns * cell[0], top + rows * cell[1]), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), _fitted(pen, heading, bold, sheet.width - 2 * MARGIN, 1)[0], INK, bold)
    problems = []
    for place, thumb in enumerate(thumbs):
        x, y = MARGIN + place % columns * cell[0], top + place // columns * cell[1]
        pen.rounded_rectangle((x, y, x + PICTURE[0] - 1, y + cell[1] - MARGIN - 1), 6, CARD)
        try:
            picture = _picture(thumb)
            corner = x + (PICTURE[0] - picture.width) // 2, y + (PICTURE[1] - picture.height) // 2
            pen.rectangle((x, y, x + PICTURE[0] - 1, y + PICTURE[1] - 1), "#1c1c1e")
            sheet.paste(picture, corner)
        except MediaError as error:
            problems.append(str(error))
            pen.rectangle((x, y, x + PICTURE[0] - 1, y + PICTURE[1] - 1), "#d8d8d6")
            pen.text((x + PICTURE[0] / 2, y + PICTURE[1] / 2), "no picture", FAINT, font, anchor="mm")
        left, y = x + MARGIN // 2, y + PICTURE[1] + MARGIN // 2
        pen.text((left, y), span_text(thumb.span), TIME, font)
        pen.text((left + width, y), thumb.kind, FAINT, font, anchor="ra")
        name = _fitted(pen, Path(thumb.path).name, font, width, 1)[0]
        pen.text((left, y + line), name, FAINT, font)
        for number, words in enumerate(texts[place]):
            pen.text((left, y + (2 + number) * line), words, INK, font)
    try:
        sheet.save(target)
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{target} cannot be written ({reason}); name a .png file in a folder that exists.") from None
    return problems


def _picture(thumb: Thumb) -> Image.Image:
    """One frame of the middle of a span, as large as fits."""
    start, end = thumb.span

    def size(_frames: int, height: int, width: int) -> tuple[int, int]:
        scale = min(PICTURE[0] / width, PICTURE[1] / height)
        return max(1, round(height * scale)), max(1, round(width * scale))

    frames = decode_at(thumb.path, [(start + end) / 2], size=size).frames
    return Image.fromarray(np.ascontiguousarray(frames[0]))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of the system with many scripts where there is one, else Pillow's own."""
    for name in ("DejaVuSans.ttf", "Arial Unicode.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _fitted(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int,
            lines: int) -> list[str]:  # fmt: skip
    """The text in at most so many lines of a width in pixels, cut with an ellipsis; at least one, perhaps empty."""
    words, out = text.split(), [""]
    while words:
        longer = f"{out[-1]} {words[0]}".strip()
        if pen.textlength(longer, font) <= width:
            out[-1] = longer
            words.pop(0)
        elif out[-1] and len(out) < lines:
            out.append("")
        else:  # the last line is full, or one word is wider than a line
            ends = range(len(longer))
            fitting = bisect_right(ends, width, key=lambda end: math.ceil(pen.textlength(f"{longer[:end]}…", font))) - 1
            out[-1] = f"{longer[: max(fitting, 0)]}…"
            break
    return out
