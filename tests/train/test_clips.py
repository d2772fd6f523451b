"""The cache of decoded clips: the same clip as decoding, within its limit, whatever happens to its files."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.clips
from ivcore.prompt import build_inputs
from ivcore.video import Clip, decode, decode_at, probe
from train.clips import ABANDONED_SECONDS, SPARE, ClipCache

MICRO = Path(__file__).resolve().parents[1] / "data/reference/iv3-micro"
LIMIT = 1 << 20


def small(_frames: int, _height: int, _width: int) -> tuple[int, int]:
    return 32, 32


def entries(cache: ClipCache) -> list[Path]:
    """The files of clips; those of what `probe` found are small."""
    return sorted(file for file in cache.folder.glob("*.clip") if file.stat().st_size > 1_000)


def assert_same(one: Clip, other: Clip) -> None:
    np.testing.assert_array_equal(one.frames, other.frames)
    assert {**asdict(one), "frames": None} == {**asdict(other), "frames": None}


@pytest.fixture
def clip(make_clip: Callable[..., Path]) -> Path:
    return make_clip(frames=20, fps=10, size=(64, 48))


@pytest.fixture
def cache(tmp_path: Path) -> ClipCache:
    return ClipCache(tmp_path / "cache", LIMIT)


def test_a_cached_clip_is_the_decoded_one(cache: ClipCache, make_clip: Callable[..., Path]) -> None:
    times = [0.0, 0.1, 0.35, 0.4, 1.0, 1.7]  # a variable frame rate: no timestamp follows from another
    file = make_clip(frames=len(times), times=times, size=(64, 48), rotation=90)
    expected = decode(file, fps=3, max_frames=5, size=small)
    for hits in range(3):
        assert_same(cache.decode(file, fps=3, max_frames=5, size=small), expected)
        assert (cache.hits, cache.misses) == (hits, 1)


def test_frames_at_given_times_are_cached_too(cache: ClipCache, clip: Path) -> None:
    times = [0.3, 0.5]
    for counted in ((0, 1), (1, 1)):
        found, fresh = cache.decode_at(clip, times), decode_at(clip, times)
        np.testing.assert_array_equal(found.frames, fresh.frames)
        assert found.timestamps == fresh.timestamps and (cache.hits, cache.misses) == counted
    assert cache.decode_at(clip, [0.3]).indices == fresh.indices[:1]


def test_a_damaged_file_s_warnings_are_cached_too(cache: ClipCache, make_clip: Callable[..., Path]) -> None:
    file = make_clip("cut.mkv", frames=60, fps=10, size=(64, 48))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    expected = decode(file, size=small)
    assert expected.warnings
    for _ in range(2):
        assert_same(cache.decode(file, size=small), expected)
    assert cache.hits == 1


def test_a_known_file_is_not_opened_again(cache: ClipCache, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, expected = probe(clip), decode(clip, size=small)
    assert cache.probe(clip) == info
    cache.decode(clip, size=small)
    monkeypatch.setattr(train.clips, "probe", None)
    monkeypatch.setattr(train.clips, "decode", None)
    assert cache.probe(clip) == info
    assert_same(cache.decode(clip, size=small), expected)


def test_other_samplings_sizes_and_files_are_other_clips(cache: ClipCache, clip: Path) -> None:
    def large(_frames: int, _height: int, _width: int) -> tuple[int, int]:
        return 64, 64

    fast: dict[str, Any] = {"fps": 4}
    ways: list[dict[str, Any]] = [
        {"fps": 2},
        fast,
        {**fast, "max_frames": 5},
        {**fast, "size": small},
        {**fast, "size": large},
    ]
    shapes = [cache.decode(clip, **how).frames.shape for how in ways]
    assert shapes == [(4, 48, 64, 3), (8, 48, 64, 3), (5, 48, 64, 3), (8, 32, 32, 3), (8, 64, 64, 3)]
    assert (cache.hits, cache.misses, len(entries(cache))) == (0, 5, 5)
    status = clip.stat()
    os.utime(clip, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # written to since
    cache.decode(clip, fps=2)
    assert cache.misses == 6


def test_keyframes_are_decoded_every_time(cache: ClipCache, clip: Path) -> None:
    assert_same(cache.decode(clip, mode="keyframes"), decode(clip, mode="keyframes"))
    assert entries(cache) == []


@pytest.mark.parametrize("spoil", ["cut", "emptied", "changed", "header"])
def test_a_damaged_entry_is_decoded_anew(cache: ClipCache, clip: Path, spoil: str) -> None:
    expected = cache.decode(clip, size=small)
    (entry,) = entries(cache)
    content = bytearray(entry.read_bytes())
    if spoil == "changed":
        content[-7] ^= 1
    elif spoil == "header":
        content[20] ^= 1
    else:
        del content[{"cut": len(content) // 2, "emptied": 0}[spoil] :]
    entry.write_bytes(content)
    assert_same(cache.decode(clip, size=small), expected)
    assert (cache.hits, cache.misses) == (0, 2)
    cache.decode(clip, size=small)
    assert cache.hits == 1


def test_the_least_recently_used_entries_go(tmp_path: Path, clip: Path) -> None:
    cache = ClipCache(tmp_path / "cache", LIMIT)
    rates = (2.0, 2.5, 3.0, 3.5)

    def use(index: int) -> None:
        cache.decode(clip, fps=rates[index], min_frames=4, max_frames=4, size=small)

    known: list[Path] = []  # in the order of their first use
    for index in range(4):
        use(index)
        (new,) = set(entries(cache)) - set(known)
        os.utime(new, ns=(index, index))  # a clock may be too coarse to order them
        known.append(new)
        if index == 2:
            left = 3 * known[0].stat().st_size + 2_000  # three of them and what `probe` found
            cache.limit = int(left / (1 - SPARE))
            use(0)  # a hit, which makes it the latest
            assert known[0].stat().st_mtime_ns > 10
            os.utime(known[0], ns=(10, 10))
    assert [entry.exists() for entry in known] == [True, False, True, True]
    assert sum(entry.stat().st_size for entry in entries(cache)) <= cache.limit


def kept(cache: ClipCache) -> int:
    """Bytes of all entries, those of `probe` among them."""
    return sum(file.stat().st_size for file in cache.folder.glob("*.clip"))


def test_a_write_below_the_limit_looks_at_no_other_entry(
    cache: ClipCache, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    look = ClipCache._shrink
    monkeypatch.setattr(ClipCache, "_shrink", lambda self: looks.append(1) or look(self))
    for frames in range(4, 10):
        cache.decode(clip, fps=10, min_frames=frames, max_frames=frames, size=small)
    assert len(looks) == 1  # as the process begins
    assert int((cache.folder / "lock").read_text()) == kept(cache)


@pytest.mark.parametrize("found", ["", "-1", "many"])
def test_a_count_that_says_nothing_is_made_anew(cache: ClipCache, clip: Path, found: str) -> None:
    cache.decode(clip, size=small)
    (cache.folder / "lock").write_text(found)
    cache.decode(clip, fps=3.0, size=small)
    assert int((cache.folder / "lock").read_text()) == kept(cache)


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path, clip: Path) -> None:
    cache = ClipCache(tmp_path / "cache", 1000)
    assert cache.decode(clip).frames.nbytes > 1000
    assert entries(cache) == []


def test_a_full_disk_stops_nothing(cache: ClipCache, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.clips.os, "replace", full)
    assert_same(cache.decode(clip, size=small), decode(clip, size=small))
    assert list(cache.folder.iterdir()) == []


def test_what_a_killed_process_left_is_removed(cache: ClipCache, clip: Path) -> None:
    old, young = cache.folder / "old.part", cache.folder / "young.part"
    for part in (old, young):
        part.write_bytes(b"x")
    long_ago = old.stat().st_mtime - ABANDONED_SECONDS - 1
    os.utime(old, (long_ago, long_ago))
    cache.decode(clip)
    assert (old.exists(), young.exists()) == (False, True)


def _use(folder: Path, file: Path, limit: int, first: int) -> bool:
    """Decode many clips of a file through the cache, checking each; in a process of its own."""
    cache = ClipCache(folder, limit)
    for index in range(30):
        frames = 4 + (first + index) % 6
        got = cache.decode(file, fps=10, min_frames=frames, max_frames=frames, size=small)
        if got.frames.shape != (frames, 32, 32, 3) or got.indices != decode(file, fps=10, max_frames=frames).indices:
            return False
    return True


def test_two_processes_share_a_folder(tmp_path: Path, clip: Path) -> None:
    limit = 60_000  # of the six clips, 12 to 28 KB each, only some fit at once
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(_use, [(tmp_path / "cache", clip, limit, first) for first in (0, 3)])
    assert results == [True, True]
    left = [file for file in (tmp_path / "cache").iterdir() if file.name != "lock"]
    assert left and all(file.suffix == ".clip" for file in left)
    assert sum(file.stat().st_size for file in left) <= limit


def test_a_prompt_with_the_cache_is_the_prompt_without(cache: ClipCache, clip: Path) -> None:
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    expected = build_inputs(MICRO, messages, fps=4)
    for _ in range(2):
        inputs = build_inputs(MICRO, messages, fps=4, videos=cache)
        assert inputs.token_ids.tolist() == expected.token_ids.tolist()
        assert inputs.media == expected.media
        np.testing.assert_array_equal(np.asarray(inputs.pixels), np.asarray(expected.pixels))
    assert (cache.hits, cache.misses) == (1, 1)
