"""The prompt that runs are compared on when the user gives none: a clip, an image and text in two languages.

All of it is drawn or written here, so that everyone's report is about the same input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivcore.errors import PromptError
from ivcore.image import is_image
from ivcore.inputs import ModelInputs
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer

FRAMES, FPS = 8, 2.0
CLIP_SIZE, PICTURE_SIZE = (160, 224), (192, 256)  # (height, width)

ENGLISH = (
    "A bright disc moves from left to right across a striped background while the light slowly fades. Describe what "
    "happens in the clip, second by second, then say how the picture after it differs in colour and in shape. "
    "Answer in two short paragraphs, and name the moment at which the disc is in the middle of the frame."
)
CHINESE = (
    "请再用中文回答一次：视频里的圆盘朝哪个方向移动？背景的亮度怎样变化？最后那张图片里有几种颜色，它们各在什么位置？"
)


def probe_messages() -> list[dict[str, Any]]:
    """The built-in conversation, in Hugging Face's form."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": _clip(), "fps": FPS},
                {"type": "image", "image": _picture()},
                {"type": "text", "text": f"{ENGLISH}\n\n{CHINESE}"},
            ],
        }
    ]


def file_messages(file: str | Path, question: str) -> list[dict[str, Any]]:
    """A conversation about one video or image file."""
    kind = "image" if is_image(file) else "video"
    content = [{"type": kind, kind: str(file)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def build(folder: Path, video: str | Path | None, question: str | None) -> tuple[ModelInputs, list[dict[str, Any]]]:
    """The prompt of the probe, or of a file and a question, which are given together; and its messages."""
    if (video is None) != (question is None):
        raise PromptError("A video and a question go together; give both, or neither for the built-in probe.")
    if video is None or question is None:
        messages = probe_messages()
        sampling = {"fps": FPS, "min_frames": FRAMES, "max_frames": FRAMES}
        return build_inputs(folder, messages, **sampling), messages  # type: ignore[arg-type]
    messages = file_messages(video, question)
    return build_inputs(folder, messages), messages


def same_text(folder: Path, other: Path, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the tokenizers and templates of two folders make the same ids of a conversation, media left out."""
    plain = []
    for message in messages:
        parts = [{key: part[key] for key in ("type", "text") if key in part} for part in message["content"]]
        plain.append({**message, "content": parts})
    ids = [
        tokenizer.encode_pieces(tokenizer.template_pieces(plain))
        for tokenizer in (Tokenizer.from_dir(each) for each in (folder, other))
    ]
    return ids[0] == ids[1]


def _clip() -> np.ndarray:
    """uint8 (FRAMES, H, W, 3): a disc that crosses a striped ground from left to right while the light fades."""
    height, width = CLIP_SIZE
    y, x = np.mgrid[0:height, 0:width]
    stripes = np.stack([90 + 60 * np.sin(x / 9), 80 + 50 * np.sin((x + y) / 23), 70 + 60 * np.cos(y / 14)], axis=-1)
    frames = []
    for index in range(FRAMES):
        progress = index / (FRAMES - 1)
        disc = (x - width * (0.1 + 0.8 * progress)) ** 2 + (y - height * 0.5) ** 2 < 26**2
        frame = np.where(disc[..., None], (240.0, 190.0 - 90 * progress, 60.0), stripes * (1 - 0.5 * progress))
        frames.append(frame)
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def _picture() -> np.ndarray:
    """uint8 (H, W, 3): four coloured fields, each with a shade of its own, and a dark ring over them."""
    height, width = PICTURE_SIZE
    y, x = np.mgrid[0:height, 0:width]
    colours = np.array([[(200, 60, 50), (60, 160, 80)], [(50, 90, 190), (220, 200, 70)]], np.float64)
    picture = colours[(y * 2 // height), (x * 2 // width)] * (0.7 + 0.3 * np.sin((x - y) / 17))[..., None]
    distance = np.hypot(x - width / 2, y - height / 2)
    picture[np.abs(distance - 60) < 9] = (25, 25, 30)
    return np.clip(picture, 0, 255).astype(np.uint8)
