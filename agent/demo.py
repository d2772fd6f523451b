"""`make demo`: render a clip, ask it the same question on both backends, and say whether they agree token for token.

The checkpoint is a tiny random one, so the answer is noise; that both backends write the same noise is the point.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from agent.ask import Answer, Request
from agent.phases import Phases
from ivcore.backend import load
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).resolve().parents[1] / "tests/data/reference/iv3-micro"
QUESTION = "What happens, and when?"
SIZE, SECONDS, FPS = 160, 4, 10


def main() -> None:
    """Print question, the streamed answers and the verdict; exit 1 when the backends disagree."""
    if not CHECKPOINT.is_dir():
        sys.exit("The demo's checkpoint lies in tests/ of the repository: run it from a clone.")
    with tempfile.TemporaryDirectory() as scratch:
        clip = Path(scratch) / "clip.mp4"
        render(clip)
        print(f"clip:     {clip.name}, {SECONDS} s at {FPS} fps, {SIZE}x{SIZE}, H.264, {clip.stat().st_size:,} bytes")
        print(f"model:    {CHECKPOINT.name}, random weights (answers are noise), float32")
        print(f"question: {QUESTION}")
        answers = {name: ask(name, clip) for name in ("mlx", "torch") if importlib.util.find_spec(name) is not None}
    if len(answers) < 2:
        print(f"Only {', '.join(answers) or 'no backend'} is installed here: nothing to compare.")
        return
    first, second = answers.values()
    if first == second:
        print(f"The backends agree: all {len(first)} tokens are the same.")
        return
    same = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), len(first))
    sys.exit(f"The backends disagree from token {same + 1} on.")


def ask(backend: str, clip: Path) -> list[int]:
    """Stream one answer to stdout; returns its token ids."""
    request = Request([clip], QUESTION, str(CHECKPOINT), max_tokens=24)
    phases = Phases()
    phases.start("decode")
    inputs = build_inputs(CHECKPOINT, request.messages(), on_progress=phases.on_frames)
    model = load(CHECKPOINT, "mlx" if backend == "mlx" else "torch", "float32")
    answer = Answer(model, Tokenizer.from_dir(CHECKPOINT), inputs, request, phases)
    print(f"{backend + ':':10}", end="")
    for piece in answer:
        print(piece.replace("\n", " "), end="", flush=True)
    print(f"\n          {answer.summary()}")
    return answer.token_ids


def render(path: Path) -> None:
    """An mp4 of a bright square that crosses a dark frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(SECONDS * FPS):
            picture = np.full((SIZE, SIZE, 3), (20, 24, 40), np.uint8)
            left = index * (SIZE - 40) // (SECONDS * FPS)
            picture[60:100, left : left + 40] = (240, 180, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
