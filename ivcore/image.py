"""Image file -> RGB pixels, upright."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ivcore.errors import MediaError
from ivcore.media_file import readable_file


def load_image(source: str | Path | bytes | Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), RGB: turned as its EXIF says, transparency on white, 16-bit scaled to 8, first frame of several.

    source: a path, the bytes of an image file, or an image that Pillow has opened.
    Raises MediaError for what is no image, is damaged, or is larger than Pillow's limit against decompression bombs.
    """
    file = source if isinstance(source, bytes | Image.Image) else readable_file(source)
    name = file if isinstance(file, Path) else "The image data"
    try:
        if isinstance(file, Image.Image):
            return _to_rgb(ImageOps.exif_transpose(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = round((Image.MAX_IMAGE_PIXELS or 0) / 1e6)
        raise MediaError(f"{name} has more than {limit} million pixels; scale it down first.") from None
    except UnidentifiedImageError:
        raise MediaError(f"{name} is not an image that can be read; save it as PNG or JPEG.") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise MediaError(f"{name} is a damaged image ({error}); copy or download it again.") from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return _gray_to_rgb(np.asarray(image, dtype=np.float64), image.mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _gray_to_rgb(gray: np.ndarray, mode: str) -> np.ndarray:
    """16- and 32-bit integers span 0..65535, as PNG and TIFF write them; floats 0..1, or 0..255 where any exceeds 1."""
    gray = np.nan_to_num(gray)
    white = 65535.0 if mode.startswith("I") else 255.0 if gray.max(initial=0) > 1 else 1.0
    values = np.round(np.clip(gray / white, 0, 1) * 255).astype(np.uint8)
    return np.repeat(values[..., None], 3, axis=-1)


def is_image(path: str | Path) -> bool:
    """Whether a file is a still image; anything else, unreadable files too, is for the video decoder to judge."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return not getattr(image, "is_animated", False)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return isinstance(path, str | Path) and Path(path).suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}
