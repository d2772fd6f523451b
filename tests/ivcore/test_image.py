from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivcore.errors import MediaError
from ivcore.image import load_image

QUADRANTS = np.zeros((40, 60, 3), np.uint8)
QUADRANTS[:20, :30], QUADRANTS[:20, 30:], QUADRANTS[20:, :30] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def saved(folder: Path, image: Image.Image, name: str = "picture.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        # EXIF 2.3, tag 0x0112: where row 0 and column 0 of the stored picture are shown.
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, upright) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(QUADRANTS), exif=exif)
    np.testing.assert_array_equal(load_image(path), upright(QUADRANTS))


def test_transparency_becomes_white(tmp_path: Path) -> None:
    pixels = np.dstack([QUADRANTS, np.full((40, 60), 255, np.uint8)])
    pixels[:, 30:, 3] = 0
    loaded = load_image(saved(tmp_path, Image.fromarray(pixels)))
    np.testing.assert_array_equal(loaded[:, :30], QUADRANTS[:, :30])
    assert (loaded[:, 30:] == 255).all()


def test_a_palette_with_a_transparent_colour_becomes_white_there(tmp_path: Path) -> None:
    image = Image.fromarray(QUADRANTS).quantize(8)
    hidden = image.getpixel((0, 0))
    loaded = load_image(saved(tmp_path, image, "picture.gif", transparency=hidden))
    assert loaded[0, 0].tolist() == [255, 255, 255] and loaded[0, 59].tolist() == [0, 255, 0]


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    gray = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    loaded = load_image(saved(tmp_path, Image.fromarray(gray)))
    np.testing.assert_array_equal(loaded, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "YCbCr", "RGBA", "P"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    loaded = load_image(saved(tmp_path, image, "picture.jpg" if mode in ("CMYK", "YCbCr") else "picture.png"))
    assert loaded.shape == (8, 8, 3) and loaded.dtype == np.uint8 and (loaded >= 254).all()


def test_cmyk_colours_are_right(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(load_image(saved(tmp_path, image, "red.tif")).astype(int) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 4000)])
def test_extreme_sizes_load(tmp_path: Path, size: tuple[int, int]) -> None:
    assert load_image(saved(tmp_path, Image.new("RGB", size))).shape == (size[1], size[0], 3)


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def cut_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()[:1500]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "There is no file {}; check the path."),
        (b"", "{} is empty (0 bytes); copy or download it again."),
        (b"not an image at all", "{} is not an image that can be read; save it as PNG or JPEG."),
        (bomb(), "{} has more than 89 million pixels; scale it down first."),
    ],
)
def test_bad_images_are_one_sentence(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError) as caught:
        load_image(path)
    assert str(caught.value) == says.format(path)


def test_a_cut_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(cut_jpeg())
    with pytest.raises(MediaError, match=r"picture\.jpg is a damaged image \(.*\); copy or download it again\.$"):
        load_image(path)


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="is a folder; give a video or an image file inside it"):
        load_image(tmp_path)
