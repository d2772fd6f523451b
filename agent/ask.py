"""`iv3 ask`: videos, images and a question in, a streamed answer out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.packaged import say_if_packaged
from agent.phases import Phases
from agent.printable import printable
from agent.units import human_bytes
from ivcore.allocator import peak_resident_bytes
from ivcore.backend import Model, choose, load
from ivcore.hub import resolve
from ivcore.image import is_image
from ivcore.inputs import ModelInputs
from ivcore.prompt import build_inputs
from ivcore.sampling import Sampling
from ivcore.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class Request:
    """What `iv3 ask` was asked; None leaves a choice to the checkpoint."""

    media: Sequence[str | Path]
    question: str
    model: str
    backend: str = "auto"
    dtype: str | None = None
    fps: float | None = None
    max_frames: int | None = None
    frame_tokens: int | None = None
    system: str | None = None
    max_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation in Hugging Face's form."""
        content: list[dict[str, Any]] = []
        for path in self.media:
            kind = "image" if is_image(path) else "video"
            content.append({"type": kind, kind: str(path)})
        content.append({"type": "text", "text": self.question})
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": content}]


def run(request: Request, *, as_json: bool = False) -> None:
    """Answer on stdout; progress, warnings, speed and memory on stderr."""
    say_if_packaged(request.model)
    phases = Phases()
    with phases:
        backend = choose(request.backend)
        folder = resolve(request.model)
        with phases.phase("decode") as phase:
            tokenizer = Tokenizer.from_dir(folder)
            inputs = build_inputs(
                folder,
                request.messages(),
                fps=request.fps,
                max_frames=request.max_frames,
                frame_tokens=request.frame_tokens,
                on_progress=phases.on_frames,
            )
            phase.bytes = 0 if inputs.pixels is None else inputs.pixels.nbytes
        for warning in (warning for medium in inputs.media for warning in medium.warnings):
            print(f"iv3: {warning}", file=sys.stderr)
        with phases.phase("load") as phase:
            model = load(folder, backend, request.dtype)
            model.stop_ids |= tokenizer.stop_ids
            phase.bytes = model.weight_bytes
        answer = Answer(model, tokenizer, inputs, request, phases)
        for piece in answer:
            if not as_json:
                print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    if as_json:
        print(json.dumps(answer.to_dict(), ensure_ascii=False))
    else:
        print(flush=True)
        phases.say(answer.summary())


class Answer:
    """One answer while it is generated: iterate over it for the text, piece by piece."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, inputs: ModelInputs, request: Request, phases: Phases
    ) -> None:
        self.model, self.inputs, self.request, self.phases = model, inputs, request, phases
        self.token_ids: list[int] = []
        self.text = ""
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[str]:
        cache = self.model.new_cache()
        stream = TextStream(self._tokenizer)
        self.phases.start("prefill")
        tokens = self.model.generate(
            self.inputs,
            max_tokens=self.request.max_tokens,
            sampling=self.request.sampling,
            cache=cache,
            on_progress=self.phases.mark,
        )
        for token_id in tokens:
            if not self.token_ids:
                self.phases.mark("prefill", len(self.inputs.token_ids), len(self.inputs.token_ids))
                self.phases.close_display()
                self.phases.start("generate")
            self.token_ids.append(token_id)
            yield from self._emit(stream.push(token_id))
            self.phases.mark("generate", len(self.token_ids), self.request.max_tokens)
        yield from self._emit(stream.finish())
        spent = self.phases.spent
        spent["prefill"].bytes = cache.nbytes * len(self.inputs.token_ids) // max(1, cache.length)
        spent["generate"].bytes = cache.nbytes - spent["prefill"].bytes
        if "encode" in spent:
            config = self.model.config
            features = 1 + len(config.vision.deepstack_visual_indexes)
            itemsize = 4 if self.model.dtype == "float32" else 2
            spent["encode"].bytes = self.visual_tokens * features * config.text.hidden_size * itemsize

    def _emit(self, piece: str) -> Iterator[str]:
        self.text += piece
        if piece:
            yield piece

    @property
    def visual_tokens(self) -> int:
        config = self.model.config
        return int(sum(self.inputs.token_ids == kind for kind in (config.image_token_id, config.video_token_id)).sum())

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints. Seconds are wall time; bytes are those of the phase's result (frames held, weights,
        vision features, cache)."""
        stopped = bool(self.token_ids) and self.token_ids[-1] in self.model.stop_ids
        return {
            "answer": self.text,
            "token_ids": self.token_ids,
            "finish": "stop" if stopped else "length",
            "model": self.request.model,
            "backend": self.model.backend,
            "dtype": self.model.dtype,
            "prompt_tokens": len(self.inputs.token_ids),
            "visual_tokens": self.visual_tokens,
            "generated_tokens": len(self.token_ids),
            "phases": {
                name: {"seconds": round(phase.seconds, 4), "bytes": phase.bytes}
                for name, phase in self.phases.spent.items()
            },
            "peak_bytes": max(peak_resident_bytes(), self.model.peak_bytes()),
            "media": [
                {
                    "kind": medium.kind,
                    "source": medium.source,
                    "timestamps": list(medium.timestamps),
                    "warnings": list(medium.warnings),
                }
                for medium in self.inputs.media
            ],
        }

    def summary(self) -> str:
        """One line on speed and memory."""
        spent, frames = self.phases.spent, sum(len(medium.timestamps) or 1 for medium in self.inputs.media)
        reading = spent["prefill"].seconds + (spent["encode"].seconds if "encode" in spent else 0.0)
        count = len(self.token_ids)
        speed = (count - 1) / spent["generate"].seconds if count > 1 else 0.0
        return (
            f"{self.model.backend} {self.model.dtype} | {frames} frames in {spent['decode'].seconds:.1f} s | "
            f"{len(self.inputs.token_ids)} tokens read in {reading:.1f} s | {count} written at {speed:.1f}/s | "
            f"cache {human_bytes(spent['prefill'].bytes + spent['generate'].bytes)} | "
            f"peak {human_bytes(max(peak_resident_bytes(), self.model.peak_bytes()))}"
        )
