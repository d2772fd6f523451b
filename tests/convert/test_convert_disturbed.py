"""A conversion beside others, on a disk that fills up, and with folders that change while it runs."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convert import stream
from convert.plan import Options
from convert.run import convert
from ivcore.errors import CheckpointError

OPTIONS = Options(bits=4, group_size=32, shard_bytes=25_000)
PAGE = 4096
Listing = dict[str, Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("disturbed") / "source", shards=2, num_hidden_layers=1)


@pytest.fixture(scope="module")
def undisturbed(source: Path, checkpoints: Any) -> Listing:
    convert(source, source.parent / "undisturbed", OPTIONS)
    return checkpoints.listing(source.parent / "undisturbed")


def sentence(source: Path, target: Path, options: Options = OPTIONS, **how: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(source, target, options, **how)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


# Another process. (A lock belongs to an open file, so that a second call in this process is as good as another one.)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"force": True}, {"resume": True, "force": True}])
def test_a_second_conversion_to_the_same_folder_is_refused_while_the_first_runs(
    tmp_path: Path, source: Path, undisturbed: Listing, checkpoints: Any, how: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(stream, "BLOCK_BYTES", 10_000)
    said = []
    convert(source, tmp_path / "out", OPTIONS,
            on_progress=lambda done, total: said.append(sentence(source, tmp_path / "out", **how)))  # fmt: skip
    assert len(said) > 5
    assert all("Another process" in words or "--resume" in words for words in said)
    assert all("Another process" in words for words in said) or not how
    assert checkpoints.listing(tmp_path / "out") == undisturbed


def at_every_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    """Have `act` called before every renaming, removal, flush and making of a folder."""
    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
        real = getattr(os, name)

        def step(*arguments: Any, name: str = name, real: Callable[..., Any] = real, **options: Any) -> Any:
            act(name)
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, step)


def steps_of(source: Path, target: Path) -> int:
    """How many such steps a conversion takes."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        at_every_step(patch, seen.append)
        convert(source, target, OPTIONS)
    return len(seen)


@pytest.mark.parametrize("how", [{"force": True}, {"resume": True}])
def test_a_second_conversion_begun_at_any_step_of_the_first_spoils_nothing(
    tmp_path: Path, source: Path, undisturbed: Listing, checkpoints: Any, how: dict[str, bool]
) -> None:
    for number in range(steps_of(source, tmp_path / "count")):
        folder = tmp_path / str(number)
        folder.mkdir()
        steps = iter(range(10_000))
        refused: list[Exception] = []

        def begin_another(
            name: str, steps: Iterator[int] = steps, number: int = number, folder: Path = folder,
            refused: list[Exception] = refused,
        ) -> None:  # fmt: skip
            if next(steps) == number:
                try:
                    convert(source, folder / "out", OPTIONS, **how)
                except CheckpointError as error:
                    refused.append(error)

        with pytest.MonkeyPatch.context() as patch:
            at_every_step(patch, begin_another)
            try:
                convert(source, folder / "out", OPTIONS)
            except CheckpointError as error:
                refused.append(error)
        assert len(refused) <= 1, (number, refused)
        assert {path.name for path in folder.iterdir()} == {"out"}, number
        assert checkpoints.listing(folder / "out") == undisturbed, number


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 2 MB whose free space is not asked before writing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    made = (
        mount
        and subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode == 0
    )
    if not made:
        pytest.skip("needs the right to mount a tmpfs")
    usage = shutil.disk_usage(disk)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes free."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    stat = os.statvfs(disk)
    ballast.write_bytes(b"\0" * (stat.f_bavail * stat.f_frsize - free))
    return ballast


def check_failed(disk: Path, words: str, reason: str) -> bool:
    """A clear error and no DST; nothing at all where no shard was finished. Whether one was."""
    assert (reason in words or os.strerror(errno.ENOSPC) in words) and str(disk / "out") in words
    assert not (disk / "out").exists()
    shards = list((disk / "out.part").glob("*.safetensors"))
    assert bool(shards) == (disk / "out.part").exists() == ("--resume" in words)
    return bool(shards)


def test_a_disk_full_at_any_page_is_one_sentence_and_what_is_finished_is_kept(
    small_disk: Path, source: Path, undisturbed: Listing, checkpoints: Any
) -> None:
    kept, failed = 0, 0
    for pages in range(200):
        ballast = fill(small_disk, pages * PAGE)
        try:
            convert(source, small_disk / "out", OPTIONS)
        except CheckpointError as error:
            failed += 1
            kept += check_failed(small_disk, str(error), "disk is full")
            ballast.unlink()
            convert(source, small_disk / "out", OPTIONS, resume=True)
        assert checkpoints.listing(small_disk / "out") == undisturbed, pages
        shutil.rmtree(small_disk / "out")
        if ballast.exists():
            break
    assert failed > kept > 5 and ballast.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_step_leaves_no_target(
    tmp_path: Path, source: Path, undisturbed: Listing, checkpoints: Any, code: int
) -> None:
    reason = "disk is full" if code == errno.ENOSPC else os.strerror(code)
    count = steps_of(source, tmp_path / "count")
    kept = []
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        steps = iter(range(10_000))

        def fail(name: str, steps: Iterator[int] = steps, number: int = number) -> None:
            if next(steps) == number and name not in ("unlink", "rmdir"):
                raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            at_every_step(patch, fail)
            try:
                convert(source, folder / "out", OPTIONS)
            except CheckpointError as error:
                # The very last flush comes after the renaming.
                if not (folder / "out").exists():
                    kept.append(check_failed(folder, str(error), reason))
        if not (folder / "out").exists():
            convert(source, folder / "out", OPTIONS, resume=True)
        assert checkpoints.listing(folder) == {"out": None} | {
            f"out/{name}": content for name, content in undisturbed.items()
        }
    assert kept == sorted(kept) and kept.count(True) > 20 and kept.count(False) > 1


def test_a_write_that_fails_once_is_the_last_one(
    tmp_path: Path, source: Path, undisturbed: Listing, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is queued behind it would leave a gap in a shard that looks finished."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 5_000)
    monkeypatch.setattr(stream, "IN_FLIGHT", 50)
    real = stream.ShardWriter.add
    for number in (0, 1, 5, 20, 40, 60):
        calls = iter(range(10_000))

        def fail(*given: Any, number: int = number, calls: Iterator[int] = calls) -> None:
            if next(calls) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(*given)

        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(stream.ShardWriter, "add", fail)
            sentence(source, folder / "out")
        assert next(calls) <= number + 2
        convert(source, folder / "out", OPTIONS, resume=True)
        assert checkpoints.listing(folder / "out") == undisturbed, number


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, source: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = sentence(source, tmp_path / "far" / "out")
    assert "room" in words and str(tmp_path) in words and checkpoints.listing(tmp_path) == {}


def test_a_target_that_is_a_mounted_disk_works_or_is_refused_before_anything_is_written(
    small_disk: Path, source: Path, undisturbed: Listing, checkpoints: Any
) -> None:
    try:
        convert(source, small_disk, OPTIONS)
    except CheckpointError as error:
        assert str(small_disk) in str(error)
        assert [path.name for path in small_disk.parent.iterdir()] == ["disk"] and not list(small_disk.iterdir())
    else:
        assert checkpoints.listing(small_disk) == undisturbed


def test_another_file_system_is_written_to(
    small_disk: Path, source: Path, undisturbed: Listing, checkpoints: Any
) -> None:
    convert(source, small_disk / "out", OPTIONS)
    convert(small_disk / "out", small_disk.parent / "back", OPTIONS)
    assert checkpoints.listing(small_disk / "out") == undisturbed


# Folders that change while it runs, and folders of the user's beside the target.


def during(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> Callable[[int, int], None]:
    """An on_progress that acts once, when about half is done."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 2_000)
    monkeypatch.setattr(stream, "IN_FLIGHT", 1)
    todo = [act]

    def on_progress(done: int, total: int) -> None:
        if done > total / 2 and todo:
            todo.pop()()

    return on_progress


@pytest.mark.parametrize("what", ["a checkpoint", "a file", "a folder of anything"])
def test_what_comes_to_lie_at_the_target_meanwhile_is_not_overwritten(
    tmp_path: Path, source: Path, undisturbed: Listing, checkpoints: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    target = tmp_path / "out"

    def appear() -> None:
        if what == "a checkpoint":
            checkpoints.make(target)
        elif what == "a file":
            target.write_text("mine")
        else:
            (target / "deep").mkdir(parents=True)
            (target / "deep" / "file").write_text("mine")

    assert str(target) in sentence(source, target, on_progress=during(monkeypatch, appear))
    found = checkpoints.listing(tmp_path)
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    appear()
    assert {name: content for name, content in found.items() if name.split("/")[0] == "out"} == {
        name: content for name, content in checkpoints.listing(tmp_path).items() if name.split("/")[0] == "out"
    }


@pytest.mark.parametrize("suffix", [".replaced", ".part", ".old"])
@pytest.mark.parametrize("what", ["a checkpoint", "a file", "a folder of anything", "an empty folder"])
@pytest.mark.parametrize("force", [False, True])
def test_what_the_user_has_beside_the_target_stays(
    tmp_path: Path, source: Path, checkpoints: Any, suffix: str, what: str, force: bool
) -> None:
    beside = tmp_path / f"out{suffix}"
    if what == "a checkpoint":
        checkpoints.make(beside)
    elif what == "a file":
        beside.write_text("mine")
    else:
        beside.mkdir()
        if what == "a folder of anything":
            (beside / "journal.jsonl").write_text('{"day": "a diary of the user\'s"}\n')
            (beside / "letter.txt").write_text("mine")
    if force:
        checkpoints.make(tmp_path / "out")
    before = checkpoints.listing(tmp_path)
    try:
        convert(source, tmp_path / "out", OPTIONS, force=force)
    except CheckpointError as error:
        assert str(beside) in str(error)
        assert checkpoints.listing(tmp_path) == before
    else:
        kept = {name: content for name, content in before.items() if name.startswith(f"out{suffix}")}
        after = checkpoints.listing(tmp_path)
        assert what == "an empty folder" or {name: after.get(name, "gone") for name in kept} == kept
        assert (tmp_path / "out" / "conversion.json").exists()


@pytest.mark.parametrize("name", ["out.replaced", "out.part"])
def test_the_source_is_never_removed_whatever_its_name(tmp_path: Path, checkpoints: Any, name: str) -> None:
    source = checkpoints.make(tmp_path / name)
    checkpoints.make(tmp_path / "out")
    before = checkpoints.listing(source)
    for force in (False, True):
        try:
            convert(source, tmp_path / "out", OPTIONS, force=force)
        except CheckpointError as error:
            assert str(tmp_path) in str(error)
        assert checkpoints.listing(source) == before
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("change", ["vanishes", "is cut"])
def test_a_source_shard_that_changes_meanwhile_is_named(
    tmp_path: Path, source: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    shard = sorted(copy.glob("*.safetensors"))[1]
    act = shard.unlink if change == "vanishes" else lambda: os.truncate(shard, shard.stat().st_size - 10)

    def early(done: int, total: int) -> None:
        if shard.exists() and shard.stat().st_size == (source / shard.name).stat().st_size:
            act()

    monkeypatch.setattr(stream, "BLOCK_BYTES", 2_000)
    monkeypatch.setattr(stream, "IN_FLIGHT", 1)
    words = sentence(copy, tmp_path / "out", on_progress=early)
    assert str(shard) in words and "room" not in words
    assert not (tmp_path / "out").exists()
