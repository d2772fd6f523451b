"""One video -> entries of the library: what is said as passages, every scene with a caption and its vector.

- A video is known by its content, and skipped where the library holds it with the same settings.
- What took time before a kill (speech, cuts, captions, vectors) is not made again: a journal beside the library keeps
  it until the video is stored, in one commit. Another process that is at the same video is not waited for until
  everything else is done.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agent.content import content_hash
from agent.embedding import Embedder, clip_part
from agent.index_journal import IndexJournal, JournalBusyError
from agent.library import Collection, Entry, Library
from agent.library.place import Place
from agent.prompts import CAPTION
from agent.scenes import scenes
from agent.spans import Span
from agent.transcript.cues import plain
from agent.transcript.transcript import transcript
from ivcore.backend import Model
from ivcore.errors import MediaError
from ivcore.files import read_json
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from ivcore.video import decode
from ivcore.vision import smart_resize_video

METHOD = 2
"""Raised when a video would be indexed differently: what was indexed before is then indexed again."""

CAPTION_TOKENS = 48
FRAME_TOKENS = 128
"""The most tokens that a pair of frames costs: enough for a sentence, and a film has hundreds of shots."""

MAX_SCENE_SECONDS = 30.0
"""A longer scene is several records, or one caption would stand for an hour of a talk filmed in one shot."""

FALLBACK_FOLDER = "~/.cache/ivmlx/index"
"""Where journals are of a library that is in no folder."""

Progress = Callable[[str, int, int], None]
Status = Literal["indexed", "already there", "failed"]


@dataclass(frozen=True)
class IndexOptions:
    """How videos are looked at. fps: frames of a scene sampled a second, None is what the checkpoint says; max_frames:
    the most of them; speech_model: a Whisper model for videos without subtitles, None leaves their speech out."""

    fps: float | None = None
    max_frames: int = 8
    caption_tokens: int = CAPTION_TOKENS
    speech_model: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a file. passages, scenes: records; shots: that the scenes are made of; origin: of what is said;
    notes: what was looked for in vain there; warnings: what could not be decoded or heard; error: why a file failed."""

    path: str
    status: Status
    video: str = ""
    passages: int = 0
    scenes: int = 0
    shots: int = 0
    origin: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""


class Indexer:
    """Indexes videos into a library with a model; `name`: what the library calls the model (see `agent.embedding`).

    Raises MediaError for a file that is no video, LibraryError for the library, and what the model does.
    """

    def __init__(
        self,
        library: Library,
        location: str | Path,
        name: str,
        model: Model,
        tokenizer: Tokenizer,
        options: IndexOptions | None = None,
        *,
        weights: str = "",
        on_progress: Progress | None = None,
    ) -> None:
        """location: of the library; weights: a digest of the model's weights, part of what a video was indexed with;
        on_progress: called with (what is being done, steps done, steps in all)."""
        self.options = options or IndexOptions()
        self.embedder = Embedder(model, tokenizer)
        self.collection: Collection = library.collection(name, self.embedder.texts)
        self.settings = {"method": METHOD, "weights": weights, **asdict(self.options)}
        self._say = on_progress or (lambda what, done, total: None)
        self._paths = {video.video: video.path for video in self.collection.videos()}
        folder = Place(location).folder
        self._journals = Path(FALLBACK_FOLDER).expanduser() if folder is None else folder / ".index"
        said = json.dumps([str(location) if folder is None else "", name, self.settings], sort_keys=True)
        self._journal_ending = f"-{hashlib.sha256(said.encode()).hexdigest()[:16]}.jsonl"

    def index_all(self, files: Sequence[Path]) -> Iterator[Outcome]:
        """Index files one after the other; those that another process is working on come last."""
        busy: list[Path] = []
        for wait, these in ((False, files), (True, busy)):
            for file in these:
                try:
                    yield self.index(file, wait=wait)
                except JournalBusyError:
                    busy.append(file)
                except MediaError as error:
                    yield Outcome(str(file), "failed", error=str(error))

    def index(self, file: Path, *, wait: bool = True) -> Outcome:
        """Index one file, unless the library holds its content with these settings.

        wait: for a process that is working on the same video; else JournalBusyError says that there is one.
        """
        self._say(f"reading {file.name}", 0, 1)
        video = content_hash(file)
        self._say(f"reading {file.name}", 1, 1)
        if self._is_there(video, file):
            return Outcome(str(file), "already there", video)
        with IndexJournal(self._journals / f"{video}{self._journal_ending}", wait=wait) as journal:
            if self._is_there(video, file):  # another process has just finished it
                journal.remove()
                return Outcome(str(file), "already there", video)
            outcome, entries = self._entries(file, video, journal)
            self.collection.replace(video, file, self.settings, entries)
            journal.remove()
        self._paths[video] = str(file)
        return outcome

    def _is_there(self, video: str, file: Path) -> bool:
        if not self.collection.is_complete(video, self.settings):
            return False
        known = self._paths.setdefault(video, str(file))
        if known != str(file) and not Path(known).exists():  # else it is a copy, and the first one stays its place
            self.collection.moved(video, file)
            self._paths[video] = str(file)
        return True

    def _entries(self, file: Path, video: str, journal: IndexJournal) -> tuple[Outcome, list[Entry]]:
        cut = journal.get("cuts", lambda: self._cut(file))
        spans = [(float(start), float(end)) for start, end in cut["scenes"]]
        said = journal.get("transcript", lambda: self._transcript(file))
        entries: list[Entry] = []
        for row, (start, end, text, source) in enumerate(said["lines"]):
            self._say(f"passages of {file.name}", row, len(said["lines"]))
            vector = journal.get(f"passage {row}", lambda text=text: _written(self.embedder.texts([text])[0]))  # type: ignore[misc]
            entries.append(Entry("passage", (start, end), text, source, _read(vector)))
        self._say(f"passages of {file.name}", len(said["lines"]), len(said["lines"]))
        # Who has named a Whisper model wants to know why nothing came of it.
        warnings = [] if said["lines"] or self.options.speech_model is None else [said["notes"][-1]]
        for row, span in enumerate(spans):
            self._say(f"scenes of {file.name}", row, len(spans))
            scene = journal.get(f"scene {row}", lambda span=span: self._scene(file, span))  # type: ignore[misc]
            warnings += scene["warnings"]
            if scene["vector"]:
                entries.append(Entry("scene", span, scene["caption"], "caption", _read(scene["vector"])))
        self._say(f"scenes of {file.name}", len(spans), len(spans))
        kinds = Counter(entry.kind for entry in entries)
        outcome = Outcome(
            str(file),
            "indexed",
            video,
            passages=kinds["passage"],
            scenes=kinds["scene"],
            shots=cut["shots"],
            origin=said["origin"],
            notes=tuple(said["notes"]),
            warnings=tuple(dict.fromkeys(warnings)),
        )
        return outcome, entries

    def _cut(self, file: Path) -> dict[str, Any]:
        found = scenes(file, on_progress=lambda done, total: self._say(f"cuts of {file.name}", done, total))
        return {"shots": sum(map(len, found)), "scenes": [part for scene in found for part in _parts(scene)]}

    def _transcript(self, file: Path) -> dict[str, Any]:
        def heard(done: float, total: float) -> None:
            self._say(f"speech of {file.name}", int(done), int(total))

        said = transcript(file, speech_model=self.options.speech_model, on_progress=heard)
        lines = [(*line.span, line.text, line.source) for line in said.lines]
        return {"lines": lines, "origin": said.origin, "notes": said.notes}

    def _scene(self, file: Path, span: Span) -> dict[str, Any]:
        """Caption, vector and warnings of a scene; no vector where none of its frames can be decoded."""
        processor = self.embedder.tokenizer.processor
        try:
            clip = decode(
                file,
                span=span,
                fps=self.options.fps or processor.fps,
                min_frames=min(processor.temporal_patch_size, self.options.max_frames),
                max_frames=self.options.max_frames,
                size=lambda frames, height, width: smart_resize_video(frames, height, width, processor, FRAME_TOKENS),
            )
        except MediaError as error:
            if not file.exists():
                raise
            return {"caption": "", "vector": "", "warnings": [f"From {span[0]:.1f} to {span[1]:.1f} s: {error}"]}
        caption = self._caption(clip.frames, clip.timestamps)
        vector = self.embedder.clip(clip.frames, clip.timestamps, FRAME_TOKENS)
        return {"caption": caption, "vector": _written(vector), "warnings": list(clip.warnings)}

    def _caption(self, frames: np.ndarray, times: Sequence[float]) -> str:
        model, tokenizer = self.embedder.model, self.embedder.tokenizer
        content = [clip_part(frames, times), {"type": "text", "text": CAPTION}]
        inputs = build_inputs(tokenizer, [{"role": "user", "content": content}], frame_tokens=FRAME_TOKENS)
        return plain(tokenizer.decode(model.generate(inputs, max_tokens=self.options.caption_tokens)))


def weights_digest(folder: Path) -> str:
    """16 hexadecimal digits of a checkpoint's config and weights, of which some blocks are read, not all.

    Training again changes nearly every number, so blocks that are spread over a file tell, at the cost of megabytes.
    """
    digest = hashlib.sha256(json.dumps(read_json(folder / "config.json"), sort_keys=True).encode())
    for shard in sorted(folder.glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}".encode())
        with shard.open("rb") as stream:
            for place in np.linspace(0, max(size - _BLOCK, 0), _BLOCKS).astype(int).tolist():
                stream.seek(place)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]


_BLOCK, _BLOCKS = 1 << 16, 64


def _parts(scene: Sequence[Span]) -> list[Span]:
    """A scene's shots in as few records as may be, none of them too long: as many shots as fit, or part of one."""
    parts: list[Span] = []
    for start, end in scene:
        if parts and end - parts[-1][0] <= MAX_SCENE_SECONDS:
            parts[-1] = parts[-1][0], end
            continue
        count = max(1, math.ceil((end - start) / MAX_SCENE_SECONDS))
        parts += pairwise([*(start + (end - start) * part / count for part in range(count)), end])
    return parts


def _written(vector: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()


def _read(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
