"""Sampling a long video: this package against decord, in seconds and peak memory.

Makes a 1280x720 H.264 clip (25 fps, a keyframe every 250 frames, three B-frames) once, then samples 256 frames at
448x256 from it. Every row is the median of `--runs` fresh processes on the same cores, taken in turns; the frames are
compared with those of a plain sequential decode.

    python bench/video_sampling.py --minutes 30
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, FPS, KEYFRAME_INTERVAL = 1280, 720, 25, 250
FRAMES, OUT_WIDTH, OUT_HEIGHT = 256, 448, 256
CHECKED_FRAMES = 40


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """RGB uint8 (height, width, 3): smooth noise of seven octaves, about as busy as a real scene."""
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(7):
        coarse = rng.normal(size=(4 << octave, 8 << octave, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(plane) * (40 / 1.6**octave)
    return np.clip(total + 128, 0, 255).astype(np.uint8)


def write_clip(path: Path, minutes: int) -> None:
    """One minute of a panned scene with a moving object and sensor noise, encoded once and repeated `minutes` times."""
    rng = np.random.default_rng(0)
    scene, thing = texture(rng, 900, 1600), texture(rng, 200, 200)
    noise = rng.integers(-4, 5, (HEIGHT, WIDTH + 64, 1), dtype=np.int16)
    settings = f"keyint={KEYFRAME_INTERVAL}:min-keyint={KEYFRAME_INTERVAL}:scenecut=0:bframes=3"
    frames = 60 * FPS
    unfinished = path.with_suffix(".part.mp4")
    with av.open(str(unfinished), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "23", "x264-params": settings}
        packets = []
        for number in range(frames):
            turn = 2 * np.pi * number / frames
            left, top = int(160 + 150 * np.cos(3 * turn)), int(90 + 80 * np.sin(2 * turn))
            picture = scene[top : top + HEIGHT, left : left + WIDTH].copy()
            x = int((WIDTH - 200) * (0.5 + 0.5 * np.sin(7 * turn)))
            y = int((HEIGHT - 200) * (0.5 + 0.5 * np.cos(5 * turn)))
            picture[y : y + 200, x : x + 200] = thing
            shift = int(rng.integers(0, 64))
            picture = np.clip(picture + noise[:, shift : shift + WIDTH], 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        minute = [(bytes(each), each.pts or 0, each.dts or 0, each.is_keyframe, each.time_base) for each in packets]
        for repeat in range(minutes):
            for content, pts, dts, is_keyframe, time_base in minute:
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.is_keyframe = stream, time_base, is_keyframe
                shift = int(repeat * 60 / time_base)
                packet.pts, packet.dts = pts + shift, dts + shift
                container.mux(packet)
    os.replace(unfinished, path)


def sample(way: Any, path: Path, kept: Path) -> dict[str, float]:
    """Run one way of sampling in this process; saves some of its frames and returns seconds, peak bytes and frames."""
    if way == "decord":
        import decord

        begun = time.perf_counter()
        reader = decord.VideoReader(str(path), width=OUT_WIDTH, height=OUT_HEIGHT)
        indices = np.linspace(0, len(reader) - 1, FRAMES).round().astype(int)
        frames = reader.get_batch(indices).asnumpy()
    else:
        sys.path.insert(0, str(ROOT))
        from ivcore.video import decode

        begun = time.perf_counter()
        clip = decode(path, max_frames=FRAMES, size=lambda *_: (OUT_HEIGHT, OUT_WIDTH), mode=way)
        frames, indices = clip.frames, np.array(clip.indices)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    np.savez(kept, frames=frames[:CHECKED_FRAMES], indices=indices[:CHECKED_FRAMES])
    return {"seconds": seconds, "peak": peak, "frames": len(frames)}


def sequential(path: Path, indices: np.ndarray) -> np.ndarray:
    """The frames `indices` as PyAV's plain decoding gives them, resized by Pillow's bicubic."""
    wanted, frames = set(indices.tolist()), []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
                frames.append(np.asarray(picture.resize((OUT_WIDTH, OUT_HEIGHT), Image.Resampling.BICUBIC)))
            if len(frames) == len(wanted):
                break
    return np.stack(frames)


def measure(way: str, path: Path, kept: Path) -> dict[str, float]:
    """`sample` in a fresh process."""
    command = [sys.executable, __file__, "--way", way, "--clip", str(path), "--kept", str(kept)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=30, help="length of the clip")
    parser.add_argument("--runs", type=int, default=3, help="runs of each row")
    parser.add_argument("--out", type=Path, default=None, help="folder for the clip (default: the temporary folder)")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--clip", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kept", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(sample(options.way, options.clip, options.kept)))
        return

    folder = options.out or Path(tempfile.gettempdir()) / "ivmlx-bench"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sampling-{options.minutes}min.mp4"
    if not path.exists():
        print(f"writing {path} ...", file=sys.stderr)
        write_clip(path, options.minutes)
    ways = ["decord", "uniform", "keyframes"]
    try:
        import decord  # noqa: F401
    except ImportError:
        print("decord is not installed (pip install decord): its row and the speed-ups are left out.", file=sys.stderr)
        ways.remove("decord")
    with tempfile.TemporaryDirectory() as scratch:
        kept = {way: Path(scratch) / f"{way}.npz" for way in ways}
        rounds = [{way: measure(way, path, kept[way]) for way in ways} for _ in range(options.runs)]
        results = {
            way: {name: statistics.median(run[way][name] for run in rounds) for name in rounds[0][way]} for way in ways
        }
        size = path.stat().st_size / 1e6
        print(f"{options.minutes} min of {WIDTH}x{HEIGHT} H.264, {size:.0f} MB, to {OUT_WIDTH}x{OUT_HEIGHT}")
        print(f"{'way':<12}{'frames':>8}{'seconds':>10}{'x decord':>10}{'peak MB':>9}   against a sequential decode")
        for way, result in results.items():
            saved = np.load(kept[way])
            error = np.abs(saved["frames"].astype(int) - sequential(path, saved["indices"]))
            against = results["decord"]["seconds"] / result["seconds"] if "decord" in results else float("nan")
            print(
                f"{way:<12}{result['frames']:>8.0f}{result['seconds']:>10.2f}{against:>10.1f}"
                f"{result['peak'] / 1e6:>9.0f}   differs by {error.mean():.2f} on average, {error.max()} at most"
                f" (first {len(error)} frames)"
            )


if __name__ == "__main__":
    main()
