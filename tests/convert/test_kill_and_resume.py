"""A conversion killed at any moment leaves nothing, something to resume to the same bytes, or the whole.

Run as a script, this file is a server: it does conversions in forks of itself, which are killed, or in which a copy of
all that is on disk is made before every step, so that every state which a kill can leave is there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert import stream
from convert.plan import Options
from convert.run import convert
from ivcore.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"bits": 4, "group_size": 32, "shard_bytes": 25_000}
OTHER = {"dtype": "fp16", "shard_bytes": 60_000}
Serve = Callable[..., dict[str, Any]]
Listing = dict[str, Any]
some = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


# The server.


def serve() -> None:
    """Do the job in every line of stdin; say a line of how it ended."""
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            do(job, writer)
        os.close(writer)
        if events := job.get("kill_after"):
            while events and (seen := os.read(reader, events)):
                events -= len(seen)
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reader) as rest:
            said = rest.read().lstrip(".")
        status = os.waitpid(child, 0)[1]
        print(json.dumps({"killed": os.WIFSIGNALED(status), "said": said}), flush=True)


def do(job: dict[str, Any], pipe: int) -> None:
    """A conversion in a process of its own, with a dot into the pipe at every progress and its error at the end."""
    try:
        os.fsync = os.posix_fadvise = lambda *arguments: None
        stream.BLOCK_BYTES = job.get("block", stream.BLOCK_BYTES)
        if copies := job.get("copies"):
            copy_before_every_step(Path(job["target"]).parent, Path(copies))
        how = {name: job[name] for name in ("resume", "force") if name in job}
        options = Options(**job["options"])
        convert(job["source"], job["target"], options, on_progress=lambda done, total: dot(pipe), **how)
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(0)


def dot(pipe: int) -> None:
    os.write(pipe, b".")


def copy_before_every_step(folder: Path, copies: Path) -> None:
    """Copy `folder` before whatever changes it: an opening to write, a renaming, a removal, a flush to the disk."""
    busy, lock = threading.local(), threading.Lock()

    def step(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "fcntl.flock", "fsync")
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+x")
        if not (changes or writes) or getattr(busy, "copying", False):
            return
        busy.copying = True
        with lock:
            shutil.copytree(folder, copies / f"{len(list(copies.iterdir())):03d}")
        busy.copying = False

    os.fsync = lambda descriptor: step("fsync", ())
    sys.addaudithook(step)


@pytest.fixture(scope="module")
def run() -> Iterator[Serve]:
    """Function (source, target, options, **job) that has the server do a job; how it ended."""
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    to_server, from_server = server.stdin, server.stdout

    def ask(source: Path, target: Path, options: dict[str, Any], **job: Any) -> dict[str, Any]:
        job |= {"source": str(source), "target": str(target), "options": options}
        print(json.dumps(job), file=to_server, flush=True)
        return json.loads(from_server.readline())

    yield ask
    to_server.close()
    from_server.close()
    assert server.wait() == 0


# What there is to convert, and what must come of it.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any) -> Path:
    folder = tmp_path_factory.mktemp("kill") / "source"
    return checkpoints.make(folder, shards=2, num_hidden_layers=1)


@pytest.fixture(scope="module")
def undisturbed(source: Path, checkpoints: Any) -> Listing:
    convert(source, source.parent / "undisturbed", Options(**OPTIONS))
    return checkpoints.listing(source.parent / "undisturbed")


@pytest.fixture(scope="module")
def other(source: Path, checkpoints: Any) -> Listing:
    """What other options make of it: fewer files, some of the same names."""
    convert(source, source.parent / "other", Options(**OTHER))
    return checkpoints.listing(source.parent / "other")


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory, run: Serve, source: Path) -> list[Path]:
    """Every state that a kill of a fresh conversion to `out` can leave, in order, one a folder."""
    return copies(tmp_path_factory.mktemp("fresh"), run, source)


def copies(folder: Path, run: Serve, source: Path, options: dict[str, Any] = OPTIONS, **job: Any) -> list[Path]:
    """The states of a conversion to `out` in `folder`/work, which must succeed; the last is its end."""
    (folder / "work").mkdir(exist_ok=True)
    (folder / "states").mkdir()
    ended = run(source, folder / "work" / "out", options, copies=str(folder / "states"), **job)
    assert ended == {"killed": False, "said": ""}
    (folder / "work").rename(folder / "states" / "end")
    found = sorted((folder / "states").iterdir())
    return found


def finished(state: Path) -> int:
    """How many shards the journal of a state has, -1 where there is no journal."""
    journal = state / "out.part" / "journal.jsonl"
    return journal.read_text().count('"shard"') if journal.exists() else -1


@pytest.fixture
def stopped(states: list[Path], tmp_path: Path) -> Path:
    """A folder with a conversion to `out` that was killed when two of its shards were finished."""
    return Path(shutil.copytree(next(state for state in states if finished(state) == 2), tmp_path / "stopped"))


def resume(source: Path, folder: Path, options: dict[str, Any] = OPTIONS, **how: Any) -> None:
    convert(source, folder / "out", Options(**options), resume=True, **how)


def only_out(listing: Listing) -> Listing:
    """What is in `out`, where nothing is beside it."""
    assert all(name.split("/")[0] == "out" for name in listing), sorted(listing)
    return {name.removeprefix("out/"): content for name, content in listing.items() if name != "out"}


# Killed.


def test_every_step_of_a_fresh_conversion_may_be_the_last(
    states: list[Path], source: Path, undisturbed: Listing, checkpoints: Any
) -> None:
    assert {finished(state) for state in states} >= {-1, 0, 1, 2, 3}
    whole = 0
    for state in states:
        if (state / "out").exists():
            assert only_out(checkpoints.listing(state)) == undisturbed, state.name
            whole += 1
        resumed = shutil.copytree(state, state.parent.parent / "resumed")
        resume(source, resumed)
        assert only_out(checkpoints.listing(resumed)) == undisturbed, state.name
        shutil.rmtree(resumed)
    assert whole > 0


@pytest.mark.parametrize("begun", [0, 2, "all"])
def test_every_step_of_a_resumed_conversion_may_be_the_last(
    tmp_path: Path, run: Serve, states: list[Path], source: Path, undisturbed: Listing, checkpoints: Any, begun: Any
) -> None:
    most = max(finished(state) for state in states)
    start = [state for state in states if finished(state) == (most if begun == "all" else begun)]
    shutil.copytree(start[-1], tmp_path / "work")
    for state in copies(tmp_path, run, source, resume=True):
        assert not (state / "out").exists() or only_out(checkpoints.listing(state)) == undisturbed, state.name
        resume(source, state)
        assert only_out(checkpoints.listing(state)) == undisturbed, state.name


def test_every_step_of_a_replacement_may_be_the_last(
    tmp_path: Path, run: Serve, source: Path, undisturbed: Listing, other: Listing, checkpoints: Any
) -> None:
    (tmp_path / "work").mkdir()
    shutil.copytree(source.parent / "other", tmp_path / "work" / "out")
    kinds = []
    for state in copies(tmp_path, run, source, force=True):
        there = checkpoints.listing(state / "out")
        assert not (state / "out").exists() or there in (undisturbed, other), state.name
        kinds.append("absent" if not (state / "out").exists() else "new" if there == undisturbed else "old")
        resume(source, state, force=(state / "out").exists())
        assert only_out(checkpoints.listing(state)) == undisturbed, state.name
    assert kinds == sorted(kinds, key=["old", "absent", "new"].index) and set(kinds) == {"old", "absent", "new"}


def test_every_step_of_starting_anew_over_a_stopped_conversion_may_be_the_last(
    tmp_path: Path, run: Serve, states: list[Path], source: Path, other: Listing, checkpoints: Any
) -> None:
    ready = [state for state in states if finished(state) == -1 and (state / "out.part" / "conversion.json").exists()]
    for number, start in enumerate([ready[-1], next(state for state in states if finished(state) == 2)]):
        folder = tmp_path / str(number)
        shutil.copytree(start, folder / "work")
        for state in copies(folder, run, source, OTHER, force=True):
            try:
                resume(source, state, OTHER)
            except CheckpointError as error:
                # It had not begun yet: what is there is still the old one's.
                assert "--force" in str(error)
                convert(source, state / "out", Options(**OTHER), force=True)
            assert only_out(checkpoints.listing(state)) == other, state.name


def test_killed_at_random_moments_it_resumes_to_the_same_hashes(
    tmp_path: Path, run: Serve, source: Path, undisturbed: Listing, checkpoints: Any
) -> None:
    moments = random.Random(0).sample(range(1, 900), 20)
    killed = 0
    for moment in moments:
        folder = tmp_path / str(moment)
        folder.mkdir()
        ended = run(source, folder / "out", OPTIONS, block=64, kill_after=moment)
        assert ended["said"] == ""
        killed += ended["killed"]
        # A second time as it resumes, and then to the end.
        run(source, folder / "out", OPTIONS, block=64, kill_after=moment, resume=True)
        assert not (folder / "out").exists() or only_out(checkpoints.listing(folder)) == undisturbed
        resume(source, folder)
        assert only_out(checkpoints.listing(folder)) == undisturbed
    assert killed > 15


# What may have happened to the files in between.


@some
@given(data=st.data())
def test_a_journal_cut_anywhere_is_read_up_to_there(
    states: list[Path], source: Path, undisturbed: Listing, checkpoints: Any, data: st.DataObject
) -> None:
    start = next(state for state in states if finished(state) == 3)
    folder = Path(shutil.copytree(start, start.parent.parent / "cut"))
    try:
        journal = folder / "out.part" / "journal.jsonl"
        content = journal.read_bytes()
        length = data.draw(st.integers(0, len(content)))
        journal.write_bytes(content[:length] + b"\0" * data.draw(st.sampled_from([0, 0, 7])))
        resume(source, folder)
        assert only_out(checkpoints.listing(folder)) == undisturbed
    finally:
        shutil.rmtree(folder)


def test_a_cut_journal_is_gone_on_with_line_by_line(
    tmp_path: Path, run: Serve, stopped: Path, source: Path, undisturbed: Listing, checkpoints: Any
) -> None:
    journal = stopped / "out.part" / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - 9)
    stopped.rename(tmp_path / "work")
    most = 0
    for state in copies(tmp_path, run, source, resume=True)[5:]:
        journal = state / "out.part" / "journal.jsonl"
        lines = journal.read_text().splitlines() if journal.exists() else []
        assert all(isinstance(json.loads(line), dict) for line in lines), state.name
        most = max(most, finished(state))
    assert most == len([name for name in undisturbed if name.endswith(".safetensors")])


def test_finished_shards_are_not_written_again(stopped: Path, source: Path, undisturbed: Listing) -> None:
    before = {file.name: file.stat().st_ino for file in (stopped / "out.part").glob("*.safetensors")}
    assert len(before) == 2
    resume(source, stopped)
    assert {name: (stopped / "out" / name).stat().st_ino for name in before} == before


@pytest.mark.parametrize("line", ["[]", "null", "5", "{}", '{"day": 1}', '{"request": {}}'])
@pytest.mark.parametrize("place", [0, 3])
def test_a_journal_of_something_else_is_refused(
    stopped: Path, source: Path, checkpoints: Any, line: str, place: int
) -> None:
    journal = stopped / "out.part" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:place], line, *lines[place:]]) + "\n")
    assert str(stopped / "out.part") in refused(stopped, checkpoints, source, OPTIONS, resume=True)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    "spoil", [flip, lambda file: os.truncate(file, 100), Path.unlink, lambda file: file.write_bytes(b"")]
)
@pytest.mark.parametrize("which", [0, 1])
def test_a_finished_shard_that_was_altered_is_written_anew(
    stopped: Path, source: Path, undisturbed: Listing, checkpoints: Any, spoil: Any, which: int
) -> None:
    spoil(sorted((stopped / "out.part").glob("*.safetensors"))[which])
    resume(source, stopped)
    assert only_out(checkpoints.listing(stopped)) == undisturbed


def refused(folder: Path, checkpoints: Any, source: Path, options: dict[str, Any], **how: Any) -> str:
    """The sentence with which a conversion to `out` is refused, everything staying as it was."""
    before = checkpoints.listing(folder), checkpoints.listing(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, folder / "out", Options(**options), **how)
    assert (checkpoints.listing(folder), checkpoints.listing(source)) == before
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"bits": 8}, ["bits was 4 and is now 8"]),
    ({"group_size": 64}, ["group_size was 32 and is now 64"]),
    ({"dtype": "fp16"}, ["dtype was None and is now 'fp16'"]),
    ({"keep": ("lm_head",)}, ["keep was [] and is now ['lm_head']"]),
    ({"bits": None, "recipe": "mixed_3_6"}, ["recipe was None and is now 'mixed_3_6'", "bits was 4 and is now None"]),
    ({"shard_bytes": 30_000}, ["shard_bytes was 25000 and is now 30000"]),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_other_options_are_not_resumed_and_the_difference_is_named(
    stopped: Path, source: Path, undisturbed: Listing, checkpoints: Any, change: dict[str, Any], words: list[str]
) -> None:
    sentence = refused(stopped, checkpoints, source, {**OPTIONS, **change}, resume=True)
    assert any(word in sentence for word in words) and "--force" in sentence
    resume(source, stopped)
    assert only_out(checkpoints.listing(stopped)) == undisturbed


@pytest.mark.parametrize("change", ["time", "length", "header", "name"])
def test_a_source_that_has_changed_is_not_resumed(
    tmp_path: Path, run: Serve, source: Path, checkpoints: Any, change: str
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    (tmp_path / "work").mkdir()
    states = copies(tmp_path, run, copy)
    stopped = next(state for state in states if finished(state) == 2)
    shard = sorted(copy.glob("*.safetensors"))[1]
    stat = shard.stat()
    if change == "time":
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "name":
        copy = copy.rename(tmp_path / "renamed")
    else:
        header, data = checkpoints.header(shard)
        header["__metadata__"] = {"format": "xx" if change == "header" else "a longer one"}
        checkpoints.raw_file(shard, header, data)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    sentence = refused(stopped, checkpoints, copy, OPTIONS, resume=True)
    assert "--force" in sentence and ("source" in sentence.lower() or "inputs" in sentence)


def test_a_stopped_conversion_is_neither_overwritten_nor_gone_on_with_unasked(
    stopped: Path, source: Path, undisturbed: Listing, checkpoints: Any
) -> None:
    sentence = refused(stopped, checkpoints, source, OPTIONS)
    assert "--resume" in sentence and "--force" in sentence
    convert(source, stopped / "out", Options(**OPTIONS), force=True)
    assert only_out(checkpoints.listing(stopped)) == undisturbed


def test_resume_begins_where_nothing_was_begun_and_leaves_the_whole_alone(
    tmp_path: Path, source: Path, undisturbed: Listing, checkpoints: Any
) -> None:
    resume(source, tmp_path)
    assert only_out(checkpoints.listing(tmp_path)) == undisturbed
    inodes = {file.name: file.stat().st_ino for file in (tmp_path / "out").iterdir()}
    resume(source, tmp_path)
    assert {file.name: file.stat().st_ino for file in (tmp_path / "out").iterdir()} == inodes
    assert "another conversion" in refused(tmp_path, checkpoints, source, OTHER, resume=True)
    assert "--force" in refused(tmp_path, checkpoints, source, OPTIONS)


def test_a_whole_conversion_of_weights_that_were_trained_on_since_is_not_taken_for_theirs(
    tmp_path: Path, source: Path, checkpoints: Any
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    resume(copy, tmp_path)
    for shard in copy.glob("*.safetensors"):
        header, data = checkpoints.header(shard)
        checkpoints.raw_file(shard, header, bytes(255 - byte for byte in data))
    sentence = refused(tmp_path, checkpoints, copy, OPTIONS, resume=True)
    assert "inputs has changed" in sentence and "--force" in sentence


# Stopped by hand.


def test_ctrl_c_keeps_finished_shards_and_otherwise_nothing(
    tmp_path: Path, source: Path, undisturbed: Listing, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 64)
    monkeypatch.setattr(stream, "IN_FLIGHT", 1)
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    for share in (0.0, 0.02, 0.5, 0.95):
        folder = tmp_path / str(share)
        folder.mkdir()

        def stop(done: int, total: int, share: float = share) -> None:
            if done >= share * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source, folder / "out", Options(**OPTIONS), on_progress=stop)
        left = checkpoints.listing(folder)
        assert bool(left) == (share >= 0.5) == (finished(folder) > 0)
        assert not [name for name in left if name.endswith(".safetensors.part")]
        resume(source, folder)
        assert only_out(checkpoints.listing(folder)) == undisturbed
    assert total > 64 * 1000


if __name__ == "__main__":
    serve()
