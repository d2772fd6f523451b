"""The report of a run: one HTML file that refers to nothing outside itself, of a run that ended or was killed.

- What a model, a subtitle or a file name says is data: escaped by jinja2 in every place, without control characters,
  cut off where it is long. The page runs no script and forbids itself to load anything.
- Pictures are decoded again from the video, at the times of the frames that were seen; without it, the page says so.
- Every question of a talk stands with its own answer, status and evidence; evidence is numbered through the page.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from agent.clock import clock, span_text
from agent.content import content_hash
from agent.entries import (
    Belief,
    Entry,
    Evidence,
    Hypothesis,
    Instruction,
    Observation,
    Reasoning,
    Result,
    Run,
)
from agent.printable import printable
from agent.run_view import call_text, observation_text
from agent.thumbnails import thumbnails
from agent.timeline import timeline
from ivcore.errors import IvError, MediaError
from ivcore.files import write_beside
from ivcore.media_file import readable_file

MAX_PICTURES = 60
PICTURES_OF_EVIDENCE, PICTURES_OF_OBSERVATION = 4, 6
STRIP = 8  # pictures below the timeline
PICTURE_SIDE = 192
MAX_TEXT, MAX_VALUE, MAX_TITLE = 2000, 300, 120  # characters


@dataclass(frozen=True)
class Picture:
    """A frame at `time` seconds as a data URI, its size in pixels, and the number of the evidence it belongs to."""

    time: float
    uri: str
    width: int
    height: int
    evidence: int | None


@dataclass(frozen=True)
class Exchange:
    """A question and its Result, None where it was stopped; best: the likeliest answer then; cited: how many pieces of
    evidence the page has before its own."""

    question: str
    result: Result | None
    best: Hypothesis | None
    cited: int


@dataclass(frozen=True)
class Turn:
    """The entries of a turn of the loop (from 0); read, written: the model's tokens; seconds: of the run at its end."""

    number: int
    entries: tuple[Entry, ...]
    read: int
    written: int
    seconds: float


def check_writable(path: str | Path) -> None:
    """IvError if a report cannot be written there, which is better known before its run."""
    path = Path(path)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise IvError(f"{path} cannot be written; name a file in a folder of yours for the report.")


def write_report(path: str | Path, entries: Sequence[Entry], video: str | Path | None = None) -> None:
    """Write the report of a run to `path`; whole or not at all.

    entries: of its trace, from the first on; without a Result where it was killed. video: where the film is now; None
    looks for it where the run found it.
    Raises ValueError if the first entry is no Run, IvError if the file cannot be written.
    """
    page = _page(entries, video)
    try:
        # A half of a surrogate pair, which JSON can hold, is no character that a file can.
        write_beside(Path(path), page.encode("utf-8", "replace"))
    except OSError as error:
        raise IvError(f"{path} cannot be written ({error.strerror}); choose another file for the report.") from None


def _page(entries: Sequence[Entry], video: str | Path | None) -> str:
    if not entries or not isinstance(entries[0], Run):
        raise ValueError("a trace begins with its run")
    run = entries[0]
    exchanges = _exchanges(run, entries[1:])
    results = [each.result for each in exchanges if each.result is not None]
    cited = [evidence for result in results for evidence in result.evidence]
    pictures, missing = _pictures(run, Path(run.path if video is None else video), cited, entries)
    names = {
        "run": run,
        "name": Path(run.path).name or run.path,
        "exchanges": exchanges,
        "results": results,
        "turns": _turns(entries),
        "timeline": timeline(run, entries[1:]),
        "strip": _strip(pictures, run.duration),
        "missing": missing,
        "observed": {entry.id for entry in entries if isinstance(entry, Observation)},
        "seconds": entries[-1].seconds,
        "shown": lambda times: _shown(times, pictures),
    }
    return _template().render(names)


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.globals.update(MAX_TEXT=MAX_TEXT, MAX_VALUE=MAX_VALUE, MAX_TITLE=MAX_TITLE)
    environment.filters.update(
        clock=clock, span=span_text, call=call_text, saw=observation_text, value=_value, number="{:,}".format,
        percent="{:.0%}".format,
    )  # fmt: skip
    return environment.from_string(files("agent").joinpath("report.html").read_text("utf-8"))


def _visible(printed: object) -> object:
    """What is printed on the page, a text without control characters; Markup is a part of the page already."""
    return printable(printed) if isinstance(printed, str) and not isinstance(printed, Markup) else printed


def _value(value: Any) -> str:
    """An argument or an option as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _exchanges(run: Run, entries: Sequence[Entry]) -> list[Exchange]:
    """The questions that were asked, in order; of a run that was killed before, the one that it was begun with."""
    asked: list[tuple[str, list[Entry]]] = []
    for entry in entries:
        if isinstance(entry, Instruction) and entry.question:
            asked.append((entry.question, []))
        elif asked:
            asked[-1][1].append(entry)
    found: list[Exchange] = []
    for question, since in asked or [(run.question, list(entries))]:
        beliefs = [entry.hypotheses for entry in since if isinstance(entry, Belief)]
        result = next((entry for entry in since if isinstance(entry, Result)), None)
        best = max(beliefs[-1], key=lambda each: each.confidence, default=None) if beliefs else None
        cited = sum(len(each.result.evidence) for each in found if each.result is not None)
        found.append(Exchange(question, result, best, cited))
    return found


def _turns(entries: Sequence[Entry]) -> list[Turn]:
    """The entries by turn, as they came; the run and the result have their own places on the page."""
    told = [entry for entry in entries if not isinstance(entry, Run | Result)]
    turns = []
    for number, members in groupby(told, key=lambda entry: entry.turn):
        mine = tuple(members)
        messages = [entry for entry in mine if isinstance(entry, Reasoning)]
        read, written = (sum(getattr(entry, name) for entry in messages) for name in ("prefilled", "generated"))
        turns.append(Turn(number, mine, read, written, mine[-1].seconds))
    return turns


def _pictures(
    run: Run, video: Path, cited: Sequence[Evidence], entries: Sequence[Entry]
) -> tuple[dict[float, Picture], str | None]:
    """Pictures by their time, and why there are none."""
    number_of = {time: number for number, evidence in enumerate(cited, 1) for time in evidence.times}
    wanted = _chosen(
        [evidence.times for evidence in cited],
        [entry.times for entry in entries if isinstance(entry, Observation)],
    )
    if not wanted:
        return {}, None
    try:
        if content_hash(readable_file(video)) != run.video:
            return {}, f"{video} is not the file that this run looked at, so there are no pictures of it here."
        found = thumbnails(video, wanted, PICTURE_SIDE)
    except (MediaError, OSError):
        return {}, f"{video} is gone or cannot be read, so there are no pictures of it here."
    pictures = {}
    for time, jpeg in found.items():
        width, height = Image.open(io.BytesIO(jpeg)).size
        uri = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        pictures[time] = Picture(time, uri, width, height, number_of.get(time))
    return pictures, None


def _chosen(cited: Iterable[Sequence[float]], seen: Iterable[Sequence[float]]) -> list[float]:
    """At most MAX_PICTURES times: of evidence first, then of observations, first ones before second ones."""
    evidence = _in_turns(_spread(times, PICTURES_OF_EVIDENCE) for times in cited)
    others = _in_turns(_spread(times, PICTURES_OF_OBSERVATION) for times in seen)
    return list(dict.fromkeys([*evidence, *others]))[:MAX_PICTURES]


def _spread(times: Sequence[float], count: int) -> list[float]:
    """At most `count` of the times, evenly: the middle one first, then always the one farthest from those before."""
    if len(times) > count:
        times = [times[round((place + 0.5) * len(times) / count - 0.5)] for place in range(count)]
    places = list(range(len(times)))
    order = [places.pop(len(places) // 2)] if places else []
    while places:
        order.append(max(places, key=lambda place: min(abs(place - other) for other in order)))
        places.remove(order[-1])
    return [times[place] for place in order]


def _in_turns(groups: Iterable[Sequence[float]]) -> list[float]:
    return [time for time in chain.from_iterable(zip_longest(*groups)) if time is not None]


def _shown(times: Iterable[float], pictures: dict[float, Picture]) -> list[Picture]:
    return [pictures[time] for time in dict.fromkeys(times) if time in pictures]


def _strip(pictures: dict[float, Picture], duration: float) -> list[Picture | None]:
    """For each of STRIP equal parts of the video a picture in it, of evidence if there is one, or None."""
    strip: list[Picture | None] = [None] * STRIP
    for picture in sorted(pictures.values(), key=lambda picture: (picture.evidence is None, picture.time)):
        part = min(max(int(STRIP * picture.time / duration), 0), STRIP - 1) if duration > 0 else 0
        strip[part] = strip[part] or picture
    return strip
