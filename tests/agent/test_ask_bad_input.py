"""`iv3 ask` on files, questions and checkpoints that cannot be used: one sentence on stderr, exit code 1."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MICRO = Path(__file__).resolve().parents[1] / "data/reference/iv3-micro"
MakeClip = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def set_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# Files.


def test_no_such_file(failure: Callable[..., str], tmp_path: Path) -> None:
    assert f"no file {tmp_path / 'nope.mp4'}" in failure("ask", tmp_path / "nope.mp4", "What?", "-m", MICRO)


def test_an_address_is_not_fetched(failure: Callable[..., str]) -> None:
    assert "'https://example.org/clip.mp4'; nothing is fetched" in failure(
        "ask", "https://example.org/clip.mp4", "What?", "-m", MICRO
    )


def test_a_folder(failure: Callable[..., str], tmp_path: Path) -> None:
    assert f"{tmp_path} is a folder" in failure("ask", tmp_path, "What?", "-m", MICRO)


@pytest.mark.parametrize("name", ["empty.mp4", "empty.png"])
def test_an_empty_file(failure: Callable[..., str], tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert f"{tmp_path / name} is empty" in failure("ask", tmp_path / name, "What?", "-m", MICRO)


def test_text_renamed_mp4(failure: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "text.mp4"
    file.write_text("This is not a video.\n" * 50)
    assert f"{file} is not a video" in failure("ask", file, "What?", "-m", MICRO)


def test_audio_only(failure: Callable[..., str], tmp_path: Path) -> None:
    import av

    file = tmp_path / "sound.m4a"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert str(file) in (words := failure("ask", file, "What?", "-m", MICRO)) and "no video" in words


def test_a_video_without_frames(failure: Callable[..., str], make_clip: MakeClip) -> None:
    clip = make_clip(frames=0)
    assert str(clip) in failure("ask", clip, "What?", "-m", MICRO)


def test_a_video_of_one_pixel_is_answered(run: Run, make_clip: MakeClip) -> None:
    clip = make_clip("dot.mov", frames=4, size=(1, 1), codec="png", pixel_format="rgb24")
    assert run("ask", clip, "What?", "-m", MICRO, "--max-tokens", 1)[0] == 0


def test_a_video_of_1x4000_pixels(failure: Callable[..., str], make_clip: MakeClip) -> None:
    clip = make_clip("line.mov", frames=4, size=(1, 4000), codec="png", pixel_format="rgb24")
    words = failure("ask", clip, "What?", "-m", MICRO)
    assert str(clip) in words and "1x4000" in words and "crop" in words


def test_more_frames_than_the_context_holds(failure: Callable[..., str], checkpoint: Path, make_clip: MakeClip) -> None:
    set_config(checkpoint, lambda config: config["text_config"].update(max_position_embeddings=60))
    words = failure("ask", make_clip(frames=60), "What?", "-m", checkpoint)
    assert "60" in words and all(option in words for option in ("--max-frames", "--fps", "--frame-tokens"))


# The question.


@pytest.mark.parametrize("question", ["", "  \n "])
def test_an_empty_question(failure: Callable[..., str], make_clip: MakeClip, question: str) -> None:
    assert "question is empty" in failure("ask", make_clip(), question, "-m", MICRO)


def test_a_question_of_200000_characters(failure: Callable[..., str], make_clip: MakeClip) -> None:
    words = failure("ask", make_clip(), "why? " * 40_000, "-m", MICRO)
    assert "32,768" in words or "32768" in words


# The checkpoint.


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda file: file.unlink(), "no weights"),
        (lambda file: file.write_bytes(file.read_bytes()[:100_000]), "model.safetensors is damaged"),
        (
            lambda file: file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:]),
            "model.safetensors is damaged",
        ),
        (lambda file: lie(file, "data_offsets", [0, 10**12]), "model.safetensors is damaged"),
        (lambda file: lie(file, "data_offsets", [0, 4]), "model.safetensors is damaged"),
        (lambda file: (file.unlink(), file.mkdir()), "model.safetensors"),
        (lambda file: fill(file, np.nan), "lm_head.weight holds NaN"),
        (lambda file: fill(file, np.inf), "lm_head.weight holds NaN or infinity"),
    ],
    ids=["missing", "cut", "absurd header", "past the end", "overlapping", "a folder", "nan", "inf"],
)
def test_damaged_weights(
    failure: Callable[..., str],
    checkpoint: Path,
    make_clip: MakeClip,
    backend: str,
    spoil: Callable[[Path], Any],
    says: str,
) -> None:
    spoil(checkpoint / "model.safetensors")
    words = failure("ask", make_clip(), "What?", "-m", checkpoint, "--backend", backend)
    assert str(checkpoint) in words and says in words


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def lie(file: Path, key: str, value: Any) -> None:
    """Change what the header says of its second tensor."""
    content, data = split(file)
    name = [name for name in content if name != "__metadata__"][1]
    content[name][key] = value
    head = json.dumps(content).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + data)


def fill(file: Path, value: float) -> None:
    """Put a number into the middle of lm_head.weight."""
    content, data = split(file)
    begin, end = content["lm_head.weight"]["data_offsets"]
    place = (begin + end) // 8 * 4
    head = json.dumps(content).encode()
    spoiled = data[:place] + struct.pack("<f", value) + data[place + 4 :]
    file.write_bytes(struct.pack("<Q", len(head)) + head + spoiled)


def test_a_missing_shard_is_named(failure: Callable[..., str], checkpoint: Path, make_clip: MakeClip) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    weight_map = {"lm_head.weight": "model-00002-of-00002.safetensors", "x": "model-00001-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    words = failure("ask", make_clip(), "What?", "-m", checkpoint)
    assert "model-00002-of-00002.safetensors" in words and "missing" in words


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: config["text_config"].pop("hidden_size"), "text_config.hidden_size is missing"),
        (lambda config: config["vision_config"].update(depth="four"), "vision_config.depth"),
        (lambda config: config.update(model_type="llava"), "model_type is 'llava'"),
    ],
)
def test_a_config_with_a_missing_or_wrong_field(
    failure: Callable[..., str],
    checkpoint: Path,
    make_clip: MakeClip,
    change: Callable[[dict[str, Any]], Any],
    says: str,
) -> None:
    set_config(checkpoint, change)
    words = failure("ask", make_clip(), "What?", "-m", checkpoint)
    assert str(checkpoint / "config.json") in words and says in words


def test_a_template_that_reaches_for_python_objects(
    failure: Callable[..., str], checkpoint: Path, make_clip: MakeClip
) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[-1].__subclasses__() }}")
    words = failure("ask", make_clip(), "What?", "-m", checkpoint)
    assert "chat template was stopped" in words and "__class__" in words


def test_a_model_id_without_network(
    failure: Callable[..., str], make_clip: MakeClip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    words = failure("ask", make_clip(), "What?", "-m", "someone/some-model")
    assert "someone/some-model" in words


def test_a_model_that_is_neither_folder_nor_id(failure: Callable[..., str], make_clip: MakeClip) -> None:
    assert "./no/such/model" in failure("ask", make_clip(), "What?", "-m", "./no/such/model")


def test_an_unknown_backend_or_dtype(failure: Callable[..., str], make_clip: MakeClip) -> None:
    clip = make_clip()
    assert "'jax'" in failure("ask", clip, "What?", "-m", MICRO, "--backend", "jax")
    assert "'int3'" in failure("ask", clip, "What?", "-m", MICRO, "--dtype", "int3")
