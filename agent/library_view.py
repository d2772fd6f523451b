"""What `iv3 index`, `iv3 search` and `iv3 library` do, and how they say it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.clock import span_text
from agent.content import content_hash
from agent.display import Display
from agent.embedding import Embedder, collection_name
from agent.indexing import Indexer, IndexOptions, Outcome, weights_digest
from agent.library import (
    Collection,
    Kind,
    Library,
    LibraryError,
    LibraryFailureError,
    Mode,
    Record,
    Video,
    rebuild,
)
from agent.packaged import say_if_packaged
from agent.sheet import Thumb, draw_sheet
from agent.transcript.cues import plain
from agent.video_files import video_files
from ivcore.backend import choose, load
from ivcore.errors import MediaError
from ivcore.hub import resolve
from ivcore.tokenizer import Tokenizer

HASH_DIGITS = 12
"""Of a content hash, what is shown, and the fewest that name a video."""


def index(
    paths: Sequence[str], location: str, model: str, *, backend: str, dtype: str | None, options: IndexOptions,
    as_json: bool,
) -> int:  # fmt: skip
    """Index the videos that paths name, a line each as it is done; how many of them failed."""
    files = video_files(paths)
    if not files:
        raise MediaError(f"{', '.join(paths)}: there is no video here; name video files, or folders that hold some.")
    say_if_packaged(model)
    library = Library(location, create=True)
    backend, folder = choose(backend), resolve(model)
    if options.speech_model is not None:
        from agent.transcript.speech import load_recogniser

        # Now, or a missing package would be found out after the first film, which would count as done without speech.
        load_recogniser(options.speech_model)
    with Display() as bars:
        bars.show("loading weights", 0, 1)
        loaded = load(folder, backend, dtype)
    tokenizer = Tokenizer.from_dir(folder)
    loaded.stop_ids |= tokenizer.stop_ids
    name, outcomes = collection_name(model), list[Outcome]()

    def show(words: str, done: int, total: int) -> None:
        bars.show(f"{len(outcomes) + 1}/{len(files)} {words}", done, total)

    indexer = Indexer(
        library, location, name, loaded, tokenizer, options, weights=weights_digest(folder), on_progress=show
    )
    coming = indexer.index_all(files)
    while True:
        with (bars := Display()):  # one a video: its bars go when its line comes
            outcome = next(coming, None)
        if outcome is None:
            break
        outcomes.append(outcome)
        for warning in (*outcome.warnings, *([outcome.error] if outcome.error else [])):
            _say(warning)
        if not as_json and outcome.status != "failed":
            print(_line(outcome), flush=True)
    if any(outcome.status == "indexed" for outcome in outcomes):
        indexer.collection.build_indices()
    if as_json:
        report = {"library": location, "model": name, "videos": [asdict(each) for each in outcomes]}
        print(json.dumps(report, ensure_ascii=False))
    return sum(outcome.status == "failed" for outcome in outcomes)


def search(
    query: str, location: str, *, mode: Mode, count: int, kinds: Sequence[Kind], video: str | None, model: str | None,
    backend: str, dtype: str | None, sheet: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the best records for a query, and draw a sheet of them where one is wanted."""
    library = Library(location)
    if not query.strip():
        raise LibraryError("The query is empty; say what to look for.")
    of_video = None if video is None else _known(library, video).video
    found: list[Record] = []
    for collection in _collections(library, location, mode, model, backend, dtype):
        found += collection.search(query, mode, count, video=of_video, kinds=kinds or None)
    # Two models may have indexed one video, and what is said in it is the same for both.
    best = {(each.video, each.kind, each.span, each.text): each for each in sorted(found, key=lambda each: each.score)}
    hits = sorted(best.values(), key=lambda each: -each.score)[:count]
    if sheet is not None and hits:
        thumbs = [Thumb(hit.path, hit.span, hit.text, hit.kind) for hit in hits]
        for problem in dict.fromkeys(draw_sheet(thumbs, query, Path(sheet))):
            _say(problem)
    if as_json:
        print(json.dumps([_hit(hit) for hit in hits], ensure_ascii=False))
        return
    for hit in hits:
        print(f"{span_text(hit.span)} {hit.path}\n    {hit.kind}: {plain(hit.text)}")
    if not hits:
        _say("Nothing was found." + (" --mode both looks for the meaning as well." if mode == "text" else ""))
    elif sheet is not None:
        print(sheet)


def show_list(location: str, as_json: bool) -> None:
    """Print what a library holds of each video."""
    library = Library(location)
    videos = library.videos()
    if as_json:
        print(json.dumps([asdict(video) for video in videos], ensure_ascii=False))
        return
    for model in dict.fromkeys(video.model for video in videos):
        print(model)
        for video in (each for each in videos if each.model == model):
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(video.time))
            held = (video.scenes, "scene", 11), (video.passages, "passage", 15), (video.notes, "note", 9)
            counts = "".join(f"{_counted(number, what):>{width}}" for number, what, width in held)
            gone = "" if Path(video.path).exists() else "  (not there any more)"
            print(f"  {video.video[:HASH_DIGITS]}  {when}  {counts}  {plain(video.path)}{gone}")
    if not videos:
        _say(f"{location} holds no videos yet; iv3 index puts some into it.")


def remove(location: str, videos: Sequence[str]) -> None:
    """Remove videos, each named by its path, its file's name or the beginning of its hash; all of them or none."""
    library = Library(location)
    known = [_known(library, wanted) for wanted in videos]
    for video in {each.video: each for each in known}.values():
        print(f"removed  {plain(video.path)}  ({library.remove(video.video)} records)")


def verify(location: str, anew: bool) -> int:
    """Print what is wrong with a library, and begin a new one where that is wanted; how many problems are left.

    Raises LibraryError where there is no library of this program's, or a newer version's, which is not damaged.
    """
    try:
        problems = Library(location).verify()
    except LibraryFailureError as error:
        problems = [str(error)]
    for problem in problems:
        _say(problem)
    if not problems:
        print(f"{location} is whole.")
    elif anew:
        kept = rebuild(location)
        print(f"{location} is empty now; the old one is kept as {kept}. Run iv3 index again to fill it.")
        return 0
    return len(problems)


def _collections(
    library: Library, location: str, mode: Mode, model: str | None, backend: str, dtype: str | None
) -> list[Collection]:
    """Those to be searched: by text all of them, by vectors the one whose model is meant, which is loaded for it."""
    held = library.collections()
    if model is not None:
        held = [each for each in held if each.model == collection_name(model)]
        if not held:
            raise LibraryError(
                f"The library at {location} holds nothing of {model}; iv3 library list says what it has."
            )
    if mode == "text" or not held:
        return held
    if len(held) > 1:
        names = ", ".join(each.model for each in held)
        raise LibraryError(f"The library at {location} was made with several models ({names}); name one with --model.")
    name = held[0].model
    folder = resolve(name)
    with Display() as bars:
        bars.show("loading weights", 0, 1)
        loaded = load(folder, choose(backend), dtype)
    return [library.collection(name, Embedder(loaded, Tokenizer.from_dir(folder)).texts)]


def _known(library: Library, wanted: str) -> Video:
    """The video that a path, a file's name or the beginning of a content hash means."""
    videos = {video.video: video for video in library.videos()}
    path = str(Path(wanted).expanduser().absolute())
    matches = [video for video in videos.values() if video.path == path]
    if not matches and len(wanted) >= HASH_DIGITS:
        matches = [video for video in videos.values() if video.video.startswith(wanted)]
    if not matches and Path(path).is_file():
        matches = [video for video in videos.values() if video.video == content_hash(path)]
    if not matches:
        matches = [video for video in videos.values() if Path(video.path).name == wanted]
    if len(matches) != 1:
        what = f"{len(matches)} videos" if matches else "no video"
        raise LibraryError(f"{wanted} means {what} of this library; name a path, or a hash of iv3 library list.")
    return matches[0]


def _hit(hit: Record) -> dict[str, Any]:
    shown = ("kind", "video", "path", "span", "text", "source", "model", "time", "score")
    return {name: getattr(hit, name) for name in shown}


def _line(outcome: Outcome) -> str:
    name = plain(outcome.path)
    if outcome.status == "already there":
        return f"already there  {name}"
    shown = f"{_counted(outcome.shots, 'shot')} in {_counted(outcome.scenes, 'scene')}"
    said = _counted(outcome.passages, "passage") if outcome.passages else "nothing said"
    return f"indexed        {name}  ({shown}, {said})"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _say(sentence: str) -> None:
    print(f"iv3: {sentence}", file=sys.stderr)
