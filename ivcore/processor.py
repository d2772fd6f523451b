"""The processor's settings: how a checkpoint wants its images and videos sampled, resized, normalised and cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ivcore.errors import ConfigError
from ivcore.files import read_json

# Steps that are always taken here; a checkpoint that was trained without one cannot be honoured.
_ALWAYS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class ProcessorConfig:
    """How frames become patches. The defaults are the Qwen3-VL release's.

    image_mean, image_std: per channel, in units of the 0..1 image. *_pixels: least and most pixels after resizing, of
    one image (H x W) or of a whole clip (T x H x W). fps: frames sampled per second of video.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_min_pixels: int = 65_536
    image_max_pixels: int = 16_777_216
    video_min_pixels: int = 4_096
    video_max_pixels: int = 25_165_824
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_dir(cls, path: str | Path) -> Self:
        """Read preprocessor_config.json and video_preprocessor_config.json; what neither says keeps its default.

        Transformers 5 writes both into processor_config.json, which is read where one of them is absent.
        Raises ConfigError that names the file and the field.
        """
        image = _Fields.read(Path(path) / "preprocessor_config.json", "image_processor")
        video = _Fields.read(Path(path) / "video_preprocessor_config.json", "video_processor")
        values: dict[str, Any] = {}
        for name, kind in _SHARED.items():
            given = [value for fields in (image, video) if (value := kind(fields, name)) is not None]
            if len(given) == 2 and given[0] != given[1]:
                raise ConfigError(
                    f"{video.file}: {name} is {given[1]!r}, but {image.file.name} beside it says {given[0]!r}; "
                    "images and videos share one patch embedding, so they must be equal."
                )
            values[name] = given[0] if given else None
        image_least, image_most = image.pixels(cls.image_min_pixels, cls.image_max_pixels)
        video_least, video_most = video.pixels(cls.video_min_pixels, cls.video_max_pixels)
        values |= {
            "image_min_pixels": image_least,
            "image_max_pixels": image_most,
            "video_min_pixels": video_least,
            "video_max_pixels": video_most,
            "fps": video.positive("fps"),
            "min_frames": video.whole("min_frames"),
            "max_frames": video.whole("max_frames"),
        }
        config = cls(**{name: value for name, value in values.items() if value is not None})
        if config.min_frames > config.max_frames:
            raise ConfigError(
                f"{video.file}: min_frames is {config.min_frames}, more than max_frames, {config.max_frames}."
            )
        return config


@dataclass(frozen=True)
class _Fields:
    """One processor config, read field by field with errors that name it."""

    file: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path, section: str) -> _Fields:
        combined = file.with_name("processor_config.json")
        if file.exists():
            fields = cls(file, read_json(file))
        elif combined.exists() and isinstance(content := read_json(combined).get(section), dict):
            fields = cls(combined, content)
        else:
            fields = cls(file, {})
        for name in _ALWAYS:
            if fields.content.get(name, True) is not True:
                raise fields.error(name, "true; other preprocessing is not supported")
        rescale = fields.positive("rescale_factor")
        if rescale is not None and not math.isclose(rescale, 1 / 255, rel_tol=1e-3):
            raise fields.error("rescale_factor", "1/255; other preprocessing is not supported")
        return fields

    def error(self, name: str, expected: str, value: Any = None) -> ConfigError:
        value = self.content.get(name) if value is None else value
        return ConfigError(f"{self.file}: {name} is {value!r} but must be {expected}.")

    def whole(self, name: str) -> int | None:
        return self._checked_whole(name, self.content.get(name))

    def _checked_whole(self, name: str, value: Any) -> int | None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise self.error(name, "a whole number of at least 1", value)
        return value

    def positive(self, name: str) -> float | None:
        value = self.content.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise self.error(name, "a number above 0")
        return float(value)

    def channels(self, name: str) -> tuple[float, ...] | None:
        value = self.content.get(name)
        if value is None:
            return None
        numbers = isinstance(value, list) and all(
            isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each) for each in value
        )
        if not numbers or len(value) != 3 or (name == "image_std" and min(value) <= 0):
            raise self.error(name, "three numbers" + (" above 0" if name == "image_std" else ""))
        return tuple(float(each) for each in value)

    def pixels(self, least: int, most: int) -> tuple[int, int]:
        """The size limits: `size`'s shortest_edge and longest_edge count pixels, as min_pixels and max_pixels do."""
        size = self.content.get("size")
        if size is not None and not isinstance(size, dict):
            raise self.error("size", "an object with shortest_edge and longest_edge")
        limits = []
        for flat, nested, default in (("min_pixels", "shortest_edge", least), ("max_pixels", "longest_edge", most)):
            value = self.whole(flat)
            for name in (nested, flat):
                if value is None and size:
                    value = self._checked_whole(f"size.{name}", size.get(name))
            limits.append(default if value is None else value)
        if limits[0] > limits[1]:
            raise self.error("size", f"from least to most pixels, not {limits[0]} to {limits[1]}")
        return limits[0], limits[1]


_SHARED: dict[str, Callable[[_Fields, str], Any]] = {
    "patch_size": _Fields.whole,
    "temporal_patch_size": _Fields.whole,
    "merge_size": _Fields.whole,
    "image_mean": _Fields.channels,
    "image_std": _Fields.channels,
}
