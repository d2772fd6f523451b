"""`iv3 ask` as a user runs it: what goes to stdout, to stderr, and the exit code."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agent import cli
from agent.printable import printable
from ivcore.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "tests/data/reference/iv3-micro"
MakeClip = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


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
    # 4 frames are 2 temporal patches of the same number of tokens.
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


@pytest.mark.parametrize("kept", ["👨\u200d👩\u200d👧", "می\u200cخواهم", "क्\u200dष", "a\tb\nc", "naïve — 你好"])
def test_a_terminal_gets_no_escape_sequences_but_every_script_whole(kept: str) -> None:
    assert printable(kept) == kept
    assert printable(f"\x1b[2J{kept}\x07\x9b1m\r") == f"[2J{kept}1m"


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
    options = ("-m", MICRO, "--max-tokens", 10**6)  # goes on for long, while a sampled answer may end at once
    # A shell's background job, as these tests may be one, has its children ignore the signal.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = command("ask", make_clip(), "What?", *options, stdout=subprocess.PIPE, preexec_fn=heed)
    assert process.stdout is not None
    process.stdout.read(1)  # it has begun to answer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_traceback(make_clip: MakeClip) -> None:
    options = ("-m", MICRO, "--max-tokens", 10**6)  # goes on for long, while a sampled answer may end at once
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
