"""Films become passages and scenes with captions, whatever happens on the way: kills, other processes, damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.content import content_hash
from agent.embedding import Embedder
from agent.index_journal import IndexJournal, JournalBusyError
from agent.indexing import MAX_SCENE_SECONDS, Indexer, IndexOptions, weights_digest
from agent.library import Library
from agent.video_files import video_files
from ivcore.backend import load
from ivcore.tokenizer import Tokenizer
from train.toyworld.compose import make_script
from train.toyworld.render import write_clip as write_film
from train.toyworld.script import Script

pytest.importorskip("scenedetect")

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "tests/data/reference/iv3-micro"
OPTIONS = IndexOptions(max_frames=2, caption_tokens=2)
MakeClip = Callable[..., Path]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Script]]:
    """A folder with three films, b.mp4 of several scenes, the others of one, and their scripts."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "z").mkdir()
    scripts = [make_script(seed, "said", seconds) for seed, seconds in ((1, 4.0), (3, 20.0), (5, 4.0))]
    for name, script in zip(("a.mp4", "b.mp4", "z/c.mp4"), scripts, strict=True):
        write_film(folder / name, script)
    return folder, scripts


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(load(MICRO, "torch", "float32"), Tokenizer.from_dir(MICRO))


@pytest.fixture
def make_indexer(tmp_path: Path, embedder: Embedder) -> Callable[..., Indexer]:
    def make(location: str | Path = tmp_path / "library", options: IndexOptions = OPTIONS, **more: Any) -> Indexer:
        library = Library(location, create=True)
        return Indexer(library, location, "micro", embedder.model, embedder.tokenizer, options, **more)

    return make


def spans_in(indexer: Indexer) -> list[tuple[float, float]]:
    """The spans of the scenes that an indexer's collection holds, by time."""
    return sorted(each.span for each in indexer.collection.search("the", "vector", 100, kinds=["scene"]))


def journals(library: Path) -> list[Path]:
    return sorted((library / ".index").glob("*"))


def test_a_film_is_what_is_said_in_it_and_captioned_scenes(
    films: tuple[Path, list[Script]], make_indexer: Callable[..., Indexer], tmp_path: Path
) -> None:
    folder, scripts = films
    indexer = make_indexer()
    outcome = indexer.index(folder / "b.mp4")
    found = indexer.collection.search("the", "vector", 100)
    passages = sorted((each for each in found if each.kind == "passage"), key=lambda each: each.span)
    assert [each.text for each in passages] == [line.text for line in scripts[1].lines]
    assert [each.span for each in passages] == [pytest.approx(line.span, abs=2e-3) for line in scripts[1].lines]
    scenes = sorted((each for each in found if each.kind == "scene"), key=lambda each: each.span)
    assert [each.span for each in scenes] == [pytest.approx(scene.span) for scene in scripts[1].scenes]
    assert (outcome.status, outcome.passages, outcome.scenes) == ("indexed", len(passages), len(scenes))
    assert outcome.shots == len(scenes)  # no two backgrounds are alike
    assert {each.source for each in found} == {"stream", "caption"} and {each.path for each in found} == {
        str(folder / "b.mp4")
    }
    # A scene's vector is of its pictures, a passage's of its words.
    said = next(each for each in found if each.kind == "passage")
    np.testing.assert_allclose(said.vector, indexer.embedder.texts([said.text])[0], atol=1e-6)
    assert all(abs(np.linalg.norm(each.vector) - 1) < 1e-5 for each in found)
    assert journals(tmp_path / "library") == []


def test_what_is_there_is_skipped_and_other_settings_index_again(
    films: tuple[Path, list[Script]], make_indexer: Callable[..., Indexer], tmp_path: Path
) -> None:
    film = films[0] / "a.mp4"
    assert make_indexer().index(film).status == "indexed"
    assert make_indexer().index(film).status == "already there"
    for changed in ({"options": IndexOptions(max_frames=3, caption_tokens=2)}, {"weights": "trained on"}):
        assert make_indexer(**changed).index(film).status == "indexed"
        assert make_indexer(**changed).index(film).status == "already there"
    assert Library(tmp_path / "library").verify() == []


def test_a_copy_changes_nothing_and_a_moved_film_is_found_where_it_is(
    films: tuple[Path, list[Script]], make_indexer: Callable[..., Indexer], tmp_path: Path
) -> None:
    first, second = (tmp_path / name for name in ("first.mp4", "second.mp4"))
    shutil.copy(films[0] / "a.mp4", first)
    indexer = make_indexer()
    indexer.index(first)
    shutil.copy(first, second)
    assert indexer.index(second).status == "already there"
    assert [video.path for video in indexer.collection.videos()] == [str(first)]
    first.unlink()
    assert make_indexer().index(second).status == "already there"
    assert [video.path for video in indexer.collection.videos()] == [str(second)]


def test_a_long_shot_is_cut_into_scenes_of_equal_length(make_clip: MakeClip, make_indexer: Any) -> None:
    seconds = 2 * MAX_SCENE_SECONDS + 10
    clip = make_clip(frames=int(seconds), fps=1, picture=lambda i, width, height: np.full((height, width, 3), 90, "u1"))
    indexer = make_indexer()
    outcome = indexer.index(clip)
    assert (outcome.shots, outcome.scenes) == (1, 3)
    edges = np.linspace(0, seconds, 4)
    assert spans_in(indexer) == [pytest.approx(pair) for pair in pairwise(edges)]


def test_a_scene_of_several_shots_is_one_record_unless_it_is_long(make_clip: MakeClip, make_indexer: Any) -> None:
    """Shots of 8 s, by turns of two colours: a conversation, whose records end where shots do."""

    def sides(index: int, width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), (200, 30, 30) if index // 8 % 2 else (20, 60, 220), np.uint8)

    indexer = make_indexer()
    outcome = indexer.index(make_clip(frames=40, fps=1, picture=sides))
    assert (outcome.shots, outcome.scenes) == (5, 2)
    assert spans_in(indexer) == [pytest.approx((0, 24)), pytest.approx((24, 40))]


def test_what_cannot_be_read_is_named_and_the_rest_is_indexed(
    films: tuple[Path, list[Script]], make_indexer: Callable[..., Indexer], tmp_path: Path
) -> None:
    (tmp_path / "junk.mp4").write_bytes(b"no film")
    (tmp_path / "empty.mkv").touch()
    files = video_files([tmp_path / "missing.mp4", tmp_path, films[0] / "b.mp4"])
    outcomes = list(make_indexer().index_all(files))
    assert [(Path(each.path).name, each.status) for each in outcomes] == [
        ("missing.mp4", "failed"), ("empty.mkv", "failed"), ("junk.mp4", "failed"), ("b.mp4", "indexed")
    ]  # fmt: skip
    for each in outcomes[:3]:
        assert each.path in each.error and each.error.endswith(".")
    assert journals(tmp_path / "library") == []


def test_why_a_speech_model_heard_nothing_is_said(
    make_clip: MakeClip, make_indexer: Callable[..., Indexer], tmp_path: Path
) -> None:
    options = IndexOptions(max_frames=1, caption_tokens=1, speech_model=str(tmp_path / "no such model is asked for"))
    assert make_indexer(options=options).index(make_clip("mute.mp4")).warnings == ("mute.mp4 has no sound.",)
    assert make_indexer().index(make_clip("mute.mp4")).warnings == ()


def test_a_damaged_stretch_has_no_scene_and_is_said(
    films: tuple[Path, list[Script]], make_indexer: Callable[..., Indexer], monkeypatch: pytest.MonkeyPatch
) -> None:
    import agent.indexing
    from ivcore.errors import MediaError

    decode = agent.indexing.decode

    def damaged(path: Path, *, span: tuple[float, float], **how: Any) -> Any:
        if span[0] == 0:
            raise MediaError(f"{path} is damaged: none of its frames could be decoded.")
        return decode(path, span=span, **how)

    monkeypatch.setattr("agent.indexing.decode", damaged)
    outcome = make_indexer().index(films[0] / "b.mp4")
    assert outcome.status == "indexed" and outcome.scenes == len(films[1][1].scenes) - 1
    assert len(outcome.warnings) == 1 and "b.mp4 is damaged" in outcome.warnings[0]


def test_a_film_that_vanishes_on_the_way_has_failed(
    films: tuple[Path, list[Script]], make_indexer: Callable[..., Indexer], tmp_path: Path
) -> None:
    film = tmp_path / "film.mp4"
    shutil.copy(films[0] / "a.mp4", film)

    def on_progress(what: str, done: int, total: int) -> None:
        if what == "scenes of film.mp4":
            film.unlink(missing_ok=True)

    indexer = make_indexer(on_progress=on_progress)
    [outcome] = indexer.index_all([film])
    assert outcome.status == "failed" and str(film) in outcome.error
    assert indexer.collection.videos() == []


def test_folders_are_walked_by_name_and_hidden_files_and_other_kinds_left_out(tmp_path: Path) -> None:
    for name in ("b.MKV", "a.mp4", ".hidden.mp4", "c.txt", "sub/d.webm", ".git/e.mp4", "Z.mov"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = video_files([tmp_path / "c.txt", tmp_path, tmp_path / "sub/d.webm", tmp_path / "sub/../a.mp4"])
    assert [str(file.relative_to(tmp_path)) for file in found] == ["c.txt", "Z.mov", "a.mp4", "b.MKV", "sub/d.webm"]


def test_a_checkpoint_that_was_trained_on_has_another_digest_and_a_copy_the_same(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(MICRO, tmp_path / "copy"))
    assert weights_digest(copy) == weights_digest(MICRO)
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\1\2\3\4")
    assert weights_digest(copy) != weights_digest(MICRO)


def test_a_journal_keeps_whole_lines_and_goes_on_after_half_a_one(tmp_path: Path) -> None:
    file = tmp_path / "deep/journal.jsonl"
    with IndexJournal(file) as journal:
        assert journal.get("one", lambda: [1, "ä\n"]) == [1, "ä\n"]
        journal.get("two", lambda: 2)
    whole = file.read_bytes()
    for torn in (whole[:-1], whole[:-5], whole + b'["three", {"a', whole + b"\xff\xfe\n", whole + b"3\n"):
        file.write_bytes(torn)
        with IndexJournal(file) as journal:
            assert journal.get("one", pytest.fail) == [1, "ä\n"]
            assert journal.get("two", lambda: 2) == 2
            assert journal.get("four", lambda: {"x": 4}) == {"x": 4}
        with IndexJournal(file) as journal:
            assert [journal.get(name, pytest.fail) for name in ("two", "four")] == [2, {"x": 4}]


def test_one_process_at_a_time_has_a_journal_and_an_empty_one_leaves_no_file(tmp_path: Path) -> None:
    with IndexJournal(tmp_path / "journal") as journal:
        with pytest.raises(JournalBusyError):
            IndexJournal(tmp_path / "journal", wait=False)
        journal.get("one", lambda: 1)
    with IndexJournal(tmp_path / "journal", wait=False) as journal:
        journal.remove()
    with IndexJournal(tmp_path / "journal", wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


def work(job: dict[str, Any]) -> None:
    """What a spawned process does: index a folder; at the job's `stops` it says how far it is, and waits for a line."""
    model, tokenizer = load(MICRO, "torch", "float32"), Tokenizer.from_dir(MICRO)

    def on_progress(what: str, done: int, total: int) -> None:
        if f"{what} {done}" in job["stops"]:
            print(f"{what} {done}", flush=True)
            sys.stdin.readline()

    indexer = Indexer(
        Library(job["at"], create=True), job["at"], "micro", model, tokenizer, OPTIONS, on_progress=on_progress
    )
    for outcome in indexer.index_all(video_files([job["films"]])):
        print(f"{outcome.status}: {Path(outcome.path).name}", flush=True)


class Worker:
    """A spawned process that indexes a folder."""

    def __init__(self, at: Path, films: Path, stops: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"at": str(at), "films": str(films), "stops": stops})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def go_on(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def rest(self) -> list[str]:
        said, _ = self.process.communicate()
        return said.splitlines()


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def begin(*arguments: Any) -> Worker:
        workers.append(Worker(*arguments))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()


def test_after_a_kill_nothing_that_the_model_has_made_is_made_again(
    films: tuple[Path, list[Script]], start: Callable[..., Worker], make_indexer: Any, embedder: Embedder,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, scripts = films
    done = 2
    worker = start(tmp_path / "library", folder, [f"scenes of b.mp4 {done}"])
    assert [worker.hear(), worker.hear()] == ["indexed: a.mp4", f"scenes of b.mp4 {done}"]
    worker.process.send_signal(signal.SIGKILL)
    worker.process.wait()

    indexer = make_indexer()
    assert [video.path for video in indexer.collection.videos()] == [str(folder / "a.mp4")]
    assert len(journals(tmp_path / "library")) == 1
    made = {"texts": 0, "clip": 0, "_caption": 0}

    def counted(owner: type, name: str) -> None:
        run = getattr(owner, name)

        def count(self: Any, *arguments: Any) -> Any:
            made[name] += 1
            return run(self, *arguments)

        monkeypatch.setattr(owner, name, count)

    for owner, name in ((Embedder, "texts"), (Embedder, "clip"), (Indexer, "_caption")):
        counted(owner, name)
    monkeypatch.setattr("agent.indexing.scenes", pytest.fail)
    [outcome] = indexer.index_all([folder / "b.mp4"])
    left = len(scripts[1].scenes) - done
    assert left > 0 and made == {"texts": 0, "clip": left, "_caption": left}
    assert (outcome.passages, outcome.scenes) == (len(scripts[1].lines), left + done)
    assert journals(tmp_path / "library") == [] and Library(tmp_path / "library").verify() == []

    monkeypatch.undo()
    straight = make_indexer(tmp_path / "another")
    straight.index(folder / "b.mp4")
    of_both = []
    for each in (indexer, straight):
        found = each.collection.search("the", "vector", 100, video=content_hash(folder / "b.mp4"))
        of_both.append(sorted(found, key=lambda record: (record.kind, record.span)))
    assert [(a.kind, a.span, a.text) for a in of_both[0]] == [(b.kind, b.span, b.text) for b in of_both[1]]
    np.testing.assert_allclose([a.vector for a in of_both[0]], [b.vector for b in of_both[1]], atol=1e-5)


def test_two_processes_share_a_folder_and_lose_and_double_nothing(
    films: tuple[Path, list[Script]], start: Callable[..., Worker], make_indexer: Any, tmp_path: Path
) -> None:
    """While one is at the first film, the other does the rest, and then waits for it."""
    folder, scripts = films
    first = start(tmp_path / "library", folder, ["scenes of a.mp4 1"])
    assert first.hear() == "scenes of a.mp4 1"
    second = start(tmp_path / "library", folder, [])
    assert [second.hear(), second.hear()] == ["indexed: b.mp4", "indexed: c.mp4"]
    first.go_on()
    assert first.rest() == ["indexed: a.mp4", "already there: b.mp4", "already there: c.mp4"]
    assert second.rest() == ["already there: a.mp4"]
    assert [first.process.returncode, second.process.returncode] == [0, 0]

    library = Library(tmp_path / "library")
    assert library.verify() == [] and journals(tmp_path / "library") == []
    assert [(Path(video.path).name, video.passages, video.scenes) for video in library.videos()] == [
        (name, len(script.lines), len(script.scenes))
        for name, script in zip(("a.mp4", "b.mp4", "c.mp4"), scripts, strict=True)
    ]


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
