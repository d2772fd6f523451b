"""`iv3 ask` as a user runs it: what goes to stdout, to stderr, and the exit code; good input and bad."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agent import cli
from ivcore.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "tests/data/reference/iv3-micro"
MakeClip = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `iv3` with arguments; exit code, stdout, stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return call


@pytest.fixture
def failure(run: Run) -> Callable[..., str]:
    """Run `iv3`, which must fail with exit code 1, one sentence on stderr and nothing on stdout; the sentence."""

    def call(*arguments: Any) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (1, ""), err
        lines = err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("iv3: ") and lines[0].endswith("."), err
        assert "Traceback" not in err
        return lines[0]

    return call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the small checkpoint to spoil."""
    return Path(shutil.copytree(MICRO, tmp_path / "model"))


def set_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_json_has_the_answer_its_counts_phases_and_timestamps(run: Run, make_clip: MakeClip, backend: str) -> None:
    clip = make_clip(frames=40, fps=10)
    code, out, _ = run("ask", clip, "What?", "-m", MICRO, "--backend", backend, "--max-tokens", 6, "--fps", 1, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["backend"] == backend and report["dtype"] == "float32"
    assert len(report["token_ids"]) == report["generated_tokens"] <= 6
    assert report["finish"] in ("stop", "length")
    assert report["answer"] == Tokenizer.from_dir(MICRO).decode(report["token_ids"])
    # 4 frames are 2 temporal patches of 64x64 pixels, the least that 4,096 pixels a clip and 32 a token allow.
    assert report["visual_tokens"] % 2 == 0 and 0 < report["visual_tokens"] < report["prompt_tokens"]
    assert list(report["phases"]) == ["decode", "load", "prefill", "encode", "generate"]
    assert all(phase["seconds"] >= 0 for phase in report["phases"].values())
    assert report["phases"]["load"]["bytes"] == (MICRO / "model.safetensors").stat().st_size // 4 * 4 - header(MICRO)
    # 88 numbers a token and layer, 5 layers, float32.
    assert report["phases"]["prefill"]["bytes"] == report["prompt_tokens"] * 88 * 5 * 4
    assert report["media"][0]["timestamps"] == [0.0, 1.3, 2.6, 3.9]


def header(folder: Path) -> int:
    """Bytes of a safetensors file before its data."""
    with (folder / "model.safetensors").open("rb") as stream:
        return 8 + int(struct.unpack("<Q", stream.read(8))[0])


def test_both_backends_give_the_same_answer_and_a_pipe_stays_quiet(run: Run, make_clip: MakeClip) -> None:
    clip = make_clip()
    answers = [
        run("ask", clip, "What happens?", "-m", MICRO, "--backend", name, "--max-tokens", 16)
        for name in ("mlx", "torch")
    ]
    assert answers[0] == answers[1]
    code, out, err = answers[0]
    assert (code, err) == (0, "") and out.endswith("\n")


def test_a_sampled_answer_is_repeatable_by_its_seed(run: Run, make_clip: MakeClip) -> None:
    clip = make_clip()
    arguments = ("ask", clip, "What?", "-m", MICRO, "--max-tokens", 12, "--temperature", 1, "--top-p", 0.95, "--json")
    ids = [json.loads(run(*arguments, "--seed", seed)[1])["token_ids"] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_images_and_videos_go_in_the_order_of_the_arguments(run: Run, make_clip: MakeClip, tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    Image.fromarray(np.full((70, 90, 3), 120, np.uint8)).save(picture)
    clip = make_clip()
    code, out, _ = run("ask", picture, clip, picture, "?", "-m", MICRO, "--max-tokens", 1, "--json")
    assert code == 0
    assert [medium["kind"] for medium in json.loads(out)["media"]] == ["image", "video", "image"]


def test_fewer_frames_and_tokens_a_frame_make_a_shorter_prompt(run: Run, make_clip: MakeClip) -> None:
    clip = make_clip(frames=60, size=(256, 192))
    base = ("ask", clip, "?", "-m", MICRO, "--max-tokens", 1, "--json", "--fps", 2)

    def visual(*options: Any) -> int:
        return int(json.loads(run(*base, *options)[1])["visual_tokens"])

    assert visual("--max-frames", 4) < visual()
    assert visual("--frame-tokens", 4) <= 6 * 4 < visual()


def test_a_system_message_is_part_of_the_prompt(run: Run, make_clip: MakeClip) -> None:
    clip = make_clip()
    base = ("ask", clip, "?", "-m", MICRO, "--max-tokens", 1, "--json")
    shorter, longer = (json.loads(run(*base, *extra)[1]) for extra in ((), ("--system", "Be brief.")))
    assert longer["prompt_tokens"] > shorter["prompt_tokens"]


def test_a_cut_off_video_is_answered_with_a_warning(run: Run, make_clip: MakeClip) -> None:
    clip = make_clip(frames=200, gop=10, container_options={"movflags": "faststart"})
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    code, out, err = run("ask", clip, "What?", "-m", MICRO, "--max-tokens", 2)
    assert code == 0 and out
    assert str(clip) in err and "cut off" in err and " s of " in err


# Bad input: files.


def test_no_such_file(failure: Callable[..., str], tmp_path: Path) -> None:
    assert f"no file {tmp_path / 'nope.mp4'}" in failure("ask", tmp_path / "nope.mp4", "What?", "-m", MICRO)


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


# Bad input: the question.


@pytest.mark.parametrize("question", ["", "  \n "])
def test_an_empty_question(failure: Callable[..., str], make_clip: MakeClip, question: str) -> None:
    assert "question is empty" in failure("ask", make_clip(), question, "-m", MICRO)


def test_a_question_of_200000_characters(failure: Callable[..., str], make_clip: MakeClip) -> None:
    words = failure("ask", make_clip(), "why? " * 40_000, "-m", MICRO)
    assert "32,768" in words or "32768" in words


# Bad input: the checkpoint.


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


# The command line itself.


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask"],
        ["ask", "clip.mp4"],
        ["ask", "a.mp4", "q", "-m", "x", "--nope"],
        ["ask", "a.mp4", "q", "-m", "x", "--fps", "0"],
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "iv3 ask --help" in err


def test_a_traceback_comes_only_with_debug(run: Run, tmp_path: Path) -> None:
    from ivcore.errors import MediaError

    with pytest.raises(MediaError):
        cli.main(["ask", str(tmp_path / "nope.mp4"), "What?", "-m", str(MICRO), "--debug"])
    assert run("ask", tmp_path / "nope.mp4", "What?", "-m", MICRO)[0] == 1


def command(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "agent.cli", *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_an_answer_that_cannot_be_written_is_a_failed_job(make_clip: MakeClip) -> None:
    with Path("/dev/full").open("wb") as full:
        process = command("ask", make_clip(), "What?", "-m", MICRO, "--max-tokens", 2, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"No space left" in err and err.count(b"\n") == 1


def test_ctrl_c_stops_with_exit_code_130(make_clip: MakeClip) -> None:
    options = ("-m", MICRO, "--max-tokens", 10**6, "--temperature", 1)
    process = command("ask", make_clip(), "What?", *options, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)  # it has begun to answer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_traceback(make_clip: MakeClip) -> None:
    options = ("-m", MICRO, "--max-tokens", 10**6, "--temperature", 1)
    process = command("ask", make_clip(), "What?", *options, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(timeout=60) == 1


def test_help_and_the_core_import_neither_torch_nor_mlx_nor_transformers() -> None:
    code = (
        "import sys, ivcore, agent.cli\n"
        "try: agent.cli.main(['ask', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'mlx', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


def test_the_core_imports_no_framework_when_used() -> None:
    code = (
        "import sys, importlib, pathlib\n"
        "for file in pathlib.Path('ivcore').glob('*.py'): importlib.import_module(f'ivcore.{file.stem}')\n"
        "assert not {'torch', 'mlx', 'transformers', 'jax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
