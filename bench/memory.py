"""Does memory grow with the video? Peak of the vision tower for 64 and 512 frames, and of prefill for 4k to 32k tokens.

    python bench/memory.py [--backends mlx,torch] [--attention m2la,gqa] [--tokens 4096,32768]

Every row is a process of its own on a random model of about 100M parameters in float32. "working" is the peak resident
memory while it runs, less what was resident before (weights, pixels as uint8) and less the cache that it leaves behind.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FRAME = (224, 224)
TOKENS_PER_PATCH_GRID = (FRAME[0] // 32) * (FRAME[1] // 32)
VISION_LIMIT, PREFILL_LIMIT = 1.2, 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="mlx,torch")
    parser.add_argument("--attention", default="m2la,gqa")
    parser.add_argument("--frames", default="64,512")
    parser.add_argument("--tokens", default="4096,32768")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        backend, folder, what, size, visual = options.measure
        print(json.dumps(measure(backend, Path(folder), what, int(size), visual == "visual")))
        return
    frames, tokens = ([int(n) for n in each.split(",")] for each in (options.frames, options.tokens))
    held = True
    with tempfile.TemporaryDirectory() as scratch:
        for attention in options.attention.split(","):
            from bench.synthetic import medium_config, write_random

            folder = Path(scratch) / attention
            parameters = write_random(folder, medium_config(attention))
            print(f"\n{attention}, {parameters / 1e6:.0f}M parameters, float32")
            print(
                f"{'backend':8} {'what':24} {'seconds':>8} {'before MB':>10} {'cache MB':>9} {'working MB':>11}  ratio"
            )
            for backend in options.backends.split(","):
                if attention == "m2la" or "m2la" not in options.attention:
                    held &= rows(backend, folder, "vision", "frames", frames, VISION_LIMIT)
                held &= rows(backend, folder, "prefill", "text tokens", tokens, PREFILL_LIMIT)
                held &= rows(backend, folder, "prefill", "video tokens", tokens, PREFILL_LIMIT, visual=True)
    print(f"\nvision within {VISION_LIMIT}x and prefill within {PREFILL_LIMIT}x: {'yes' if held else 'NO'}")
    sys.exit(0 if held else 1)


def rows(
    backend: str, folder: Path, what: str, unit: str, sizes: list[int], limit: float, visual: bool = False
) -> bool:
    """Measure each size in its own process and print its row; whether the last stays within `limit` of the first."""
    first = ratio = 0.0
    for size in sizes:
        command = [sys.executable, "-m", "bench.memory", "--measure", backend, str(folder), what, str(size),
                   "visual" if visual else "text"]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, env=environment(backend))
        result = json.loads(done.stdout)
        working = result["peak"] - result["before"] - result["kept"]
        first = first or working
        ratio = working / first
        print(
            f"{backend:8} {f'{what} {size} {unit}':24} {result['seconds']:8.1f} {result['before'] / 1e6:10.0f} "
            f"{result['kept'] / 1e6:9.0f} {working / 1e6:11.0f} {ratio:6.2f}",
            flush=True,
        )
    return ratio <= limit


def measure(backend: str, folder: Path, what: str, size: int, visual: bool) -> dict[str, float]:
    """Bytes before, at the peak of, and in the cache after one run; and its seconds."""
    from ivcore.backend import load
    from ivcore.inputs import ModelInputs

    model = load(folder, backend="mlx" if backend == "mlx" else "torch")
    config = model.config
    # Threads, buffers and kernels that a first run sets up are not what the length of a video costs.
    warm_up = ModelInputs(np.zeros(32, np.int32), None, None)
    model.prefill(warm_up, model.new_cache())
    if what == "vision" or visual:
        frames = size if what == "vision" else 2 * (size // (TOKENS_PER_PATCH_GRID + 2))
        inputs = video_inputs(config, frames)
    else:
        ids = np.random.default_rng(0).integers(0, 7000, size).astype(np.int32)
        inputs = ModelInputs(ids, None, None)
    cache = model.new_cache()
    before = reset_peak()
    start = time.perf_counter()
    if what == "vision":
        # As prefill does it: a group's features are used and dropped.
        for _ in model.encode_groups(inputs.pixels, inputs.grid_thw):
            pass
        kept = 0
    else:
        model.prefill(inputs, cache)
        kept = cache.nbytes
    return {"seconds": time.perf_counter() - start, "before": before, "peak": peak(), "kept": kept}


def video_inputs(config, frames: int):  # type: ignore[no-untyped-def]
    """A prompt that is one random video of `frames` frames."""
    from ivcore.inputs import ModelInputs
    from ivcore.vision import Patches, ProcessorConfig

    clip = np.random.default_rng(0).integers(0, 256, (frames, *FRAME, 3), dtype=np.uint8)
    patches = Patches([clip], ProcessorConfig())
    run = [7, *[config.video_token_id] * TOKENS_PER_PATCH_GRID, 8]
    return ModelInputs(np.array(run * (frames // 2), np.int32), patches, patches.grid_thw)


def environment(side: str) -> dict[str, str]:
    """Of a process that runs `side`: OpenBLAS is preloaded for MLX alone.

    PyTorch would take its matrix products from it, too, and its threads and those of OpenMP wait for each other: on two
    cores a step of training then takes ten times as long.
    """
    return {name: value for name, value in os.environ.items() if side == "mlx" or name != "LD_PRELOAD"}


def reset_peak() -> float:
    """Bytes resident now; the peak starts anew from here."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> float:
    """Most bytes resident since `reset_peak`, or since the start where the system cannot say."""
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
