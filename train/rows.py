"""Reading data: every row that a stage can use, and every other one with its place and its reason.

- A file of lines is indexed, not held: an offset a row. What is one JSON object (grounding, a list) is held parsed.
- Reading checks what a row says and that its clips exist. The clips are opened when they are first needed, or at once
  with `check_media`; what is found wrong then is added to `rejected` too.
- A meta file joins several data sets: `{"name": {"annotation", "media_root" or "root", "sample_ratio" or
  "repeat_time"}}`, as InternVL's and InternVideo3_sft's configs read it. Paths in it are relative to its own folder.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from ivcore.errors import ConfigError, IvError, MediaError
from train.row import Row, RowError, Stage, parse_row
from train.upstream import grounding_rows, is_grounding, to_messages

# Keys of a data set in a meta file that change nothing here, besides those that are read.
_HARMLESS = frozenset({"annotation", "media_root", "root", "sample_ratio", "repeat_time", "length", "data_augment"})


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: where it stands (in a file of one object, its number in it) and why."""

    file: str
    line: int
    reason: str
    detail: str


class _Lines:
    """A JSONL file: where its rows begin, and one of them when it is asked for."""

    def __init__(self, file: Path, folder: Path, name: str) -> None:
        self.file, self.folder, self.name = file, folder, name

    def __iter__(self) -> Iterator[tuple[int, int, Mapping[str, Any] | RowError]]:
        """(offset, line number from 1, row or what is wrong with it); empty lines are none."""
        offset = 0
        with self.file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield offset, number, _parse(line)
                offset += len(line)

    def __getitem__(self, offset: int) -> Mapping[str, Any] | RowError:
        with self.file.open("rb") as stream:
            stream.seek(offset)
            return _parse(stream.readline())


class _Entries:
    """Rows that are held parsed, because their file is one JSON value."""

    def __init__(self, file: Path, folder: Path, name: str, rows: Sequence[Mapping[str, Any] | RowError]) -> None:
        self.file, self.folder, self.name, self._rows = file, folder, name, rows

    def __iter__(self) -> Iterator[tuple[int, int, Mapping[str, Any] | RowError]]:
        return ((index, index + 1, row) for index, row in enumerate(self._rows))

    def __getitem__(self, index: int) -> Mapping[str, Any] | RowError:
        return self._rows[index]


_Source = _Lines | _Entries


class Rows(Sequence[Row]):
    """The usable rows of some data, data set by data set.

    datasets: the positions of each one's rows. ratios: how often an epoch shows them. rejected: all rows that cannot be
    used, also those that prove so later. notes: sentences for the user.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.datasets: dict[str, range] = {}
        self.ratios: dict[str, float] = {}
        self.rejected: list[Rejected] = []
        self._known: set[Rejected] = set()
        self.notes: list[str] = []
        self._sources: list[_Source] = []
        self._place = array("q")  # three numbers a row: its source, its offset or index there, its line
        self._unusable: set[int] = set()

    def __len__(self) -> int:
        return len(self._place) // 3

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """A row, read from its file again; RowError if the file or a clip is no longer what it was."""
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        source, where, _ = self._placed(range(len(self))[index])
        return _to_row(source, source[where], self.stage)

    def reject(self, index: int, error: IvError) -> None:
        """Add a row that proved unusable to `rejected`; from now on `is_usable` is false for it."""
        self._unusable.add(index)
        source, _, line = self._placed(index)
        self._add_rejected(source, line, error)

    def where(self, index: int) -> str:
        """The file and line of a row."""
        source, _, line = self._placed(index)
        return f"{source.file}:{line}"

    def is_usable(self, index: int) -> bool:
        return index not in self._unusable

    @property
    def counts(self) -> dict[str, int]:
        """How many rows cannot be used for each reason, the most frequent first."""
        return dict(Counter(each.reason for each in self.rejected).most_common())

    def summary(self) -> str:
        """One sentence: how many rows there are, how many cannot be used, why, and where the first of each is."""
        usable = len(self) - len(self._unusable)
        if not self.rejected:
            return f"{usable:,} rows, all usable."
        reasons = []
        for reason, count in self.counts.items():
            first = next(each for each in self.rejected if each.reason == reason)
            reasons.append(f"{reason} ({count:,}, first at {first.file}:{first.line}: {first.detail})")
        return f"{usable:,} rows; {len(self.rejected):,} cannot be used: {'; '.join(reasons)}."

    def _placed(self, index: int) -> tuple[_Source, int, int]:
        source, where, line = self._place[3 * index : 3 * index + 3]
        return self._sources[source], where, line

    def _add_rejected(self, source: _Source, line: int, error: IvError) -> None:
        found = Rejected(str(source.file), line, _reason(error), str(error).removesuffix("."))
        if found not in self._known:
            self._known.add(found)
            self.rejected.append(found)

    def _add(self, source: _Source, ratio: float, check_media: bool) -> None:
        first = len(self)
        self._sources.append(source)
        for where, line, raw in source:
            try:
                row = _to_row(source, raw, self.stage)
                if check_media:
                    row.check_media()
            except RowError as error:
                self._add_rejected(source, line, error)
            else:
                self._place.extend((len(self._sources) - 1, where, line))
        self.datasets[source.name] = range(first, len(self))
        self.ratios[source.name] = ratio


def read_rows(path: str | Path, stage: Stage = "sft", *, check_media: bool = False) -> Rows:
    """The rows of a JSONL file, of a meta file that names several, or of temporal grounding annotations.

    check_media: open every clip now, and compare spans with its length. Rows that cannot be used are in `rejected`.
    Raises ConfigError where a file as a whole cannot be read.
    """
    path = Path(path)
    rows = Rows(stage)
    content = None if path.suffix.lower() == ".jsonl" else _read_object(path)
    if isinstance(content, dict) and not is_grounding(content):
        for name, entry in content.items():
            _add_dataset(rows, path, name, entry, check_media)
    else:
        rows._add(_source(path, path.parent, path.stem, content), 1.0, check_media)
    return rows


def _add_dataset(rows: Rows, meta: Path, name: str, entry: Any, check_media: bool) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
        raise ConfigError(
            f"{meta}: {name!r} has no annotation; a meta file names one file of rows for each data set, and temporal "
            "grounding annotations have queries and spans for each video."
        )
    file = meta.parent / entry["annotation"]
    root = entry.get("media_root") or entry.get("root")
    ratio = entry.get("sample_ratio", entry.get("repeat_time", 1))
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio < float("inf"):
        raise ConfigError(f"{meta}: sample_ratio of {name!r} is {ratio!r}; it must be a number of at least 0.")
    if ignored := sorted(entry.keys() - _HARMLESS):
        rows.notes.append(
            f"{meta}: {', '.join(ignored)} of {name!r} have no effect; the recipe says how media are sampled."
        )
    content = None if file.suffix.lower() == ".jsonl" else _read_object(file)
    folder = meta.parent / root if isinstance(root, str) else file.parent
    rows._add(_source(file, folder, name, content), float(ratio), check_media)


def _source(file: Path, folder: Path, name: str, content: Any) -> _Source:
    if content is None:
        if not os.access(file, os.R_OK) or not file.is_file():
            raise ConfigError(f"There is no readable file {file}; check the path of the data.")
        return _Lines(file, folder, name)
    if isinstance(content, list):
        entries = [each if isinstance(each, dict) else _no_object() for each in content]
        return _Entries(file, folder, name, entries)
    if not is_grounding(content):
        raise ConfigError(f"{file} holds neither rows nor temporal grounding annotations; give a JSONL file.")
    return _Entries(file, folder, name, list(grounding_rows(content, folder)))


def _read_object(file: Path) -> Any:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); check the path of the data.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} is not valid JSON ({error}); a file with one row a line must be named .jsonl."
        ) from None
    if not isinstance(content, dict | list):
        raise ConfigError(f"{file} holds neither an object nor a list; give rows, a meta file or annotations.")
    return content


def _parse(line: bytes) -> Mapping[str, Any] | RowError:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError("broken JSON", f"the line is not valid JSON ({error})")
    return raw if isinstance(raw, dict) else _no_object()


def _no_object() -> RowError:
    return RowError("broken JSON", "the row is not an object")


def _to_row(source: _Source, raw: Mapping[str, Any] | RowError, stage: Stage) -> Row:
    if isinstance(raw, RowError):
        raise raw
    return parse_row(to_messages(raw), source.folder, stage, source.name)


def _reason(error: IvError) -> str:
    if isinstance(error, RowError):
        return error.reason
    return "unusable clip" if isinstance(error, MediaError) else "no usable prompt"
