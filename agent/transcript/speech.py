"""Speech recognition with Whisper: what is said in a video's sound.

- faster-whisper computes on CUDA and CPUs, mlx-whisper on Apple silicon; both are optional, imported where used.
- The sound is decoded here, for both: 16 kHz, mono, in pieces that end where it is quiet, whose times are those of the
  picture. Memory does not grow with the video's length.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Discard, Disposition

from agent.spans import Span
from agent.transcript.cues import Line, Track, plain
from agent.transcript.subtitles import first_seconds
from ivcore.demux import DAMAGE, PacketIndex, open_video
from ivcore.errors import BackendError, CheckpointError

# float32 (samples,) and a language such as "en", or None to detect it -> (start, end, text), in seconds of the sound.
Recogniser = Callable[[np.ndarray, str | None], Iterator[tuple[float, float, str]]]

SAMPLE_RATE = 16_000  # what Whisper hears
PIECE_SECONDS = 600
QUIET_SECONDS = 10  # a piece ends at the quietest moment of its last ten seconds
GAP_SECONDS = 0.2  # sound that is this far from where the last sample ended begins a new piece
SEEK_SECONDS = 1.0  # decoding begins this much before a span: a codec needs a few frames to be itself

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def speech_track(
    path: Path,
    index: PacketIndex,
    span: Span,
    model: str | Path,
    *,
    language: str | None = None,
    on_progress: Callable[[float, float], None] | None = None,
) -> Track:
    """What a Whisper model hears in a span of a video; no lines, and a note, where there is no sound or no speech.

    model: a folder or an id, in the format of the package that is installed. on_progress: called with (seconds of sound
    that are done, seconds in the span). Raises BackendError without faster-whisper or mlx-whisper or where they fail,
    CheckpointError for a model that cannot be loaded.
    """
    start, end = span
    lines: list[Line] = []
    heard = False
    recognise: Recogniser | None = None
    for begin, samples in sound(path, index, span):
        heard = True
        # Only now, so that a video without sound costs no model.
        recognise = recognise or load_recogniser(str(model))
        last = min(begin + len(samples) / SAMPLE_RATE, end)
        try:
            for first, after, text in recognise(samples, language):
                line = Line((begin + first, min(begin + after, last)), plain(text), "speech")
                if line.text and line.span[0] < line.span[1]:
                    lines.append(line)
                    if on_progress is not None:
                        on_progress(line.span[1] - start, end - start)
        # A library of CUDA that is missing, no memory; a language that Whisper does not know, float32 in mlx-whisper.
        except (RuntimeError, ValueError, TypeError) as error:
            raise BackendError(f"Speech recognition failed ({plain(str(error))[:200].rstrip('.')}).") from None
        if on_progress is not None:
            on_progress(last - start, end - start)
    where = "" if (start, end) == (0.0, index.seconds) else f" from {start:g} to {end:g} s"
    notes = []
    if not heard:
        notes.append(f"{path.name} has no sound{where}.")
    elif not lines:
        notes.append(f"No speech was recognised in {path.name}{where}.")
    return Track(tuple(lines), f"speech recognised in {path.name} with {model}", tuple(notes))


def sound(path: Path, index: PacketIndex, span: Span) -> Iterator[tuple[float, np.ndarray]]:
    """The sound of a span in pieces of about PIECE_SECONDS: (seconds of the first sample, float32 (samples,)).

    16 kHz, mono. Nothing where there is no audio stream; damaged packets are left out.
    """
    start, end = span
    container, video = open_video(path)
    with container:
        stream = next(
            (audio for audio in container.streams.audio if audio.disposition & Disposition.default),
            next(iter(container.streams.audio), None),
        )
        if stream is None or stream.codec_context is None:
            return
        video.discard, stream.discard = Discard.all, Discard.default
        begin, parts, length = start, list[np.ndarray](), 0
        for time, samples in _blocks(container, stream, float(first_seconds(index)), start):
            if time >= end:
                break
            if abs(time - (begin + length / SAMPLE_RATE)) > GAP_SECONDS or not length:
                yield from _cropped(begin, parts, span)
                begin, parts, length = time, [], 0
            parts.append(samples)
            length += len(samples)
            if length >= PIECE_SECONDS * SAMPLE_RATE:
                whole = np.concatenate(parts)
                cut = _quietest(whole)
                yield from _cropped(begin, [whole[:cut]], span)
                begin, parts, length = begin + cut / SAMPLE_RATE, [whole[cut:]], len(whole) - cut
        yield from _cropped(begin, parts, span)


def _blocks(
    container: InputContainer, stream: AudioStream, zero: float, start: float
) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds after `zero`, float32 (samples,)) of the decoded frames, from a little before `start` on."""
    resampler, form = AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE), None
    with suppress(*DAMAGE):
        if start > SEEK_SECONDS and stream.time_base:
            container.seek(int((start + zero - SEEK_SECONDS) / stream.time_base), stream=stream)
        for packet in container.demux(stream):
            frames: list[AudioFrame] = []
            with suppress(*DAMAGE):
                frames = packet.decode()
            for frame in frames:
                if frame.time is None:
                    continue
                time, frame.pts = frame.time - zero, None
                if form != (frame.format.name, frame.layout.name, frame.sample_rate):
                    resampler = AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
                    form = frame.format.name, frame.layout.name, frame.sample_rate
                for block in resampler.resample(frame):
                    yield time, block.to_ndarray()[0]
                    time += block.samples / SAMPLE_RATE


def _cropped(begin: float, parts: list[np.ndarray], span: Span) -> Iterator[tuple[float, np.ndarray]]:
    """The part of a piece that lies in the span, unless there is none."""
    if parts:
        samples = np.concatenate(parts)
        first = max(0, round((span[0] - begin) * SAMPLE_RATE))
        samples = samples[first : max(first, round((span[1] - begin) * SAMPLE_RATE))]
        if len(samples):
            yield begin + first / SAMPLE_RATE, samples


def _quietest(samples: np.ndarray) -> int:
    """The place of the quietest tenth of a second in the last QUIET_SECONDS."""
    window = SAMPLE_RATE // 10
    tail = samples[-QUIET_SECONDS * SAMPLE_RATE :]
    power = np.square(tail[: len(tail) // window * window].reshape(-1, window)).sum(axis=1)
    return len(samples) - len(tail) + int(power.argmin()) * window + window // 2


@lru_cache(maxsize=1)
def load_recogniser(model: str) -> Recogniser:
    """The Whisper model of a folder or an id, which is downloaded where it is not cached; the last one stays loaded.

    On Apple silicon mlx-whisper comes first, elsewhere faster-whisper; a folder goes to the one that can read it.
    """
    engines = {"faster_whisper": _load_faster_whisper, "mlx_whisper": _load_mlx_whisper}
    names = list(engines)
    if (sys.platform, platform.machine()) == ("darwin", "arm64"):
        names.reverse()
    folder = Path(model).expanduser()
    if folder.is_dir():
        model = str(folder)
        holds = {"faster_whisper": ("model.bin",), "mlx_whisper": ("weights.safetensors", "weights.npz")}
        names = [name for name in names if any((folder / file).is_file() for file in holds[name])]
        if not names:
            raise CheckpointError(
                f"{model} holds no Whisper model of faster-whisper (model.bin) or mlx-whisper (weights.safetensors); "
                "name such a folder, or an id such as small."
            )
    elif not _MODEL_ID.fullmatch(model):
        raise CheckpointError(f"There is no folder {model}; name one with a Whisper model, or an id such as small.")
    present = [name for name in names if find_spec(name)]
    if not present:
        package = " or ".join(name.replace("_", "-") for name in names)
        raise BackendError(f"Speech recognition needs {package}: run pip install 'ivmlx[speech]'.")
    try:
        return engines[present[0]](model)
    # Beside their own, the packages let errors through of CTranslate2, MLX, the hub's client and an HTTP library.
    except Exception as error:
        package, reason = present[0].replace("_", "-"), plain(str(error))[:200].rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"{package} cannot load {model} ({reason}); name a folder or an id with a Whisper model in its format."
        ) from None


def _load_faster_whisper(model: str) -> Recogniser:
    from faster_whisper import WhisperModel

    whisper = WhisperModel(model)

    def recognise(samples: np.ndarray, language: str | None) -> Iterator[tuple[float, float, str]]:
        # Where nobody speaks Whisper invents sentences; and one invented sentence leads to the next.
        segments, _ = whisper.transcribe(samples, language=language, vad_filter=True, condition_on_previous_text=False)
        return ((segment.start, segment.end, segment.text) for segment in segments)

    return recognise


def _load_mlx_whisper(model: str) -> Recogniser:
    import mlx.core as mx
    from mlx_whisper.transcribe import ModelHolder, transcribe

    ModelHolder.get_model(model, mx.float16)

    def recognise(samples: np.ndarray, language: str | None) -> Iterator[tuple[float, float, str]]:
        result = transcribe(samples, path_or_hf_repo=model, language=language, condition_on_previous_text=False)
        return ((segment["start"], segment["end"], segment["text"]) for segment in result["segments"])

    return recognise
