"""Several processes in one library at once, and one that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from agent.library import Collection, Entry, Library, LibraryError, rebuild

ROOT = Path(__file__).resolve().parents[2]
VIDEOS, LINES = 3, 12


def video(index: int) -> str:
    return f"{index:064x}"


def embed(texts: Sequence[str]) -> np.ndarray:
    return np.stack([np.full(16, 1 + len(text), np.float32) for text in texts])


def put(held: Collection, index: int, who: str, lines: int) -> None:
    entries = [Entry("passage", (i, i + 1), f"{who} line {i}", "asr") for i in range(lines)]
    held.replace(video(index), f"{index}.mp4", {"lines": LINES}, entries)


def work(job: dict[str, object]) -> None:
    """What a spawned process does: index videos, each when it is told to, and say before and after that it does."""
    held = Library(str(job["at"]), create=True).collection("model", embed)
    who, lines = str(job["who"]), int(str(job["lines"]))
    for line in sys.stdin:
        index = int(line)
        print(f"begin {index}", flush=True)
        held.add_notes(video(0), "0.mp4", [Entry("note", (0, 1), f"{who} saw {index}", "agent")])
        put(held, index, who, lines)
        print(f"end {index}", flush=True)


class Worker:
    """A spawned process, which is sent videos to index."""

    def __init__(self, at: str, who: str, lines: int = LINES) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"at": at, "who": who, "lines": lines})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def tell(self, index: int) -> None:
        assert self.process.stdin is not None
        print(index, file=self.process.stdin, flush=True)

    def hear(self, what: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == what

    def end(self) -> int:
        self.process.communicate()
        return self.process.returncode


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def begin(*arguments: object, **options: object) -> Worker:
        workers.append(Worker(*arguments, **options))  # type: ignore[arg-type]
        return workers[-1]

    yield begin
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()


@pytest.mark.parametrize("address", ["{}", "file-object-store://{}"], ids=["folder", "object store"])
@pytest.mark.parametrize("same", [True, False], ids=["the same videos", "different videos"])
def test_processes_that_index_at_once_lose_and_double_nothing(
    tmp_path: Path, start: Callable[..., Worker], address: str, same: bool
) -> None:
    """An object store has no lock, so there the primary key alone keeps the commits apart."""
    at = address.format(tmp_path / "library")
    names = ("ann", "bob", "cat")
    workers = [start(at, who, LINES + number) for number, who in enumerate(names)]
    for index in range(VIDEOS):
        for number, worker in enumerate(workers):
            worker.tell(index if same else number * VIDEOS + index)
        for number, worker in enumerate(workers):
            for what in ("begin", "end"):
                worker.hear(f"{what} {index if same else number * VIDEOS + index}")
    assert [worker.end() for worker in workers] == [0, 0, 0]

    library = Library(at)
    held = library.collection("model", embed)
    assert library.verify() == []
    assert {each.video for each in library.videos()} == {video(i) for i in range(VIDEOS if same else 3 * VIDEOS)}
    for each in library.videos():
        texts = {record.text for record in held.search("line", "text", 100, video=each.video, kinds=["passage"])}
        who = next(iter(texts)).split()[0]
        lines = LINES + names.index(who)
        assert texts == {f"{who} line {i}" for i in range(lines)} and each.passages == lines
        assert held.is_complete(each.video, {"lines": LINES})
    assert len(held.search("saw", "text", 100, kinds=["note"])) == len(names) * VIDEOS


def first_file(folder: Path, known: set[Path], worker: Worker) -> None:
    """Wait for a file that is not among those known."""
    while not set(folder.glob("*")) - known:
        assert worker.process.poll() is None


@pytest.mark.parametrize("part", ["data", "_transactions", "_versions"])
@pytest.mark.parametrize("done", [0, 2])
def test_a_process_killed_as_it_writes_leaves_a_library_that_goes_on(
    tmp_path: Path, start: Callable[..., Worker], part: str, done: int
) -> None:
    """Killed when the first new file is seen: of rows, of a transaction, or the commit itself."""
    worker = start(str(tmp_path), "ann")
    for index in range(done):
        worker.tell(index)
        worker.hear(f"begin {index}")
        worker.hear(f"end {index}")
    folders = list(tmp_path.glob("*.lance"))
    folder = folders[0] / part if folders else tmp_path
    known = set(folder.glob("*"))
    worker.tell(done)
    worker.hear(f"begin {done}")
    first_file(folder, known, worker)
    worker.process.send_signal(signal.SIGKILL)
    assert worker.end() == -signal.SIGKILL

    library = Library(tmp_path, create=True)
    held = library.collection("model", embed)
    assert library.verify() == []
    complete = [index for index in range(VIDEOS) if held.is_complete(video(index), {"lines": LINES})]
    assert complete in (list(range(done)), list(range(done + 1)))
    assert {each.video: each.passages for each in library.videos() if each.passages} == {
        video(index): LINES for index in complete
    }
    for index in range(VIDEOS):
        put(held, index, "bob", LINES)
    held.build_indices()
    assert library.verify() == []
    assert [each.passages for each in library.videos()] == [LINES] * VIDEOS
    assert len(held.search("bob line", "text", 100)) == VIDEOS * LINES


def test_a_killed_process_keeps_no_lock(tmp_path: Path, start: Callable[..., Worker]) -> None:
    library = Library(tmp_path, create=True)
    held = library.collection("model", embed)
    put(held, 0, "bob", LINES)
    worker = start(str(tmp_path), "ann")
    with library._place.writing():
        worker.tell(1)
        worker.hear("begin 1")  # From here it waits for the lock, which this process has.
        assert worker.process.poll() is None
        worker.process.kill()
        worker.end()
    put(held, 2, "bob", LINES)
    assert library.verify() == [] and {each.path for each in library.videos()} == {"0.mp4", "2.mp4"}


def test_a_process_that_waits_as_the_library_is_rebuilt_writes_to_the_new_one(
    tmp_path: Path, start: Callable[..., Worker]
) -> None:
    at = tmp_path / "library"
    put(Library(at, create=True).collection("model", embed), 0, "bob", LINES)
    worker = start(str(at), "ann")
    worker.tell(1)
    worker.hear("begin 1")
    kept = rebuild(at)
    worker.hear("end 1")
    assert worker.end() == 0
    for folder in (kept, at):
        assert Library(folder).verify() == []
    held = [each.video for folder in (kept, at) for each in Library(folder).videos() if each.passages]
    assert sorted(held) == [video(0), video(1)]


def test_a_writer_waits_for_a_folder_that_is_just_being_set_aside_and_not_for_one_that_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between renaming the old folder and making the new one there is none."""
    at = tmp_path / "library"
    held = Library(at, create=True).collection("model", embed)
    at.rename(tmp_path / "library.old")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            at.mkdir()

    monkeypatch.setattr("agent.library.place.time.sleep", nap)
    put(held, 0, "ann", LINES)
    assert len(naps) == 3 and Library(at).verify() == []
    at.rename(tmp_path / "moved")
    monkeypatch.setattr("agent.library.place.SETTING_ASIDE", 0.0)
    with pytest.raises(LibraryError, match=r"cannot be opened .* was it moved\?"):
        put(held, 1, "ann", LINES)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
