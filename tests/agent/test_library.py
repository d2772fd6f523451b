"""What a library holds after it was written to, whatever the order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.content import content_hash
from agent.library import Collection, Entry, Library, LibraryError, rebuild
from ivcore.errors import MediaError

A, B, C = (letter * 64 for letter in "abc")
SETTINGS = {"rate": 1.0, "captions": True}


def embed(texts: Sequence[str]) -> np.ndarray:
    """float32 (n, 16): the same text, the same vector."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]
    return np.stack([np.random.default_rng(seed).standard_normal(16) for seed in seeds]).astype(np.float32)


def passages(*texts: str) -> list[Entry]:
    return [Entry("passage", (float(i), float(i + 1)), text, "asr") for i, text in enumerate(texts)]


def note(text: str) -> Entry:
    return Entry("note", (0.0, 1.0), text, "agent")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library", create=True)


@pytest.fixture
def held(library: Library) -> Collection:
    return library.collection("model", embed)


def test_a_record_comes_back_with_everything_that_was_put_in(held: Collection) -> None:
    vector = np.arange(1, 17, dtype=np.float32)
    entry = Entry("scene", (2.5, 4.0), "a dog – 犬 🐕 \"'); DROP TABLE records; --", "caption", vector)
    held.replace(A, "films/dog.mp4", SETTINGS, [entry])
    [found] = held.search("dog", "text")
    assert (found.kind, found.video, found.path, found.span) == ("scene", A, "films/dog.mp4", (2.5, 4.0))
    assert (found.text, found.source, found.model) == (entry.text, "caption", "model")
    np.testing.assert_array_equal(found.vector, vector)


def test_texts_without_a_vector_get_that_of_the_model_in_their_own_order(held: Collection) -> None:
    given = [np.full(16, value, np.float32) for value in (2, 3)]
    entries = [
        Entry("scene", (0, 1), "first", "caption", given[0]),
        Entry("passage", (1, 2), "second", "asr"),
        Entry("scene", (2, 3), "", "cut", given[1]),
        Entry("passage", (3, 4), "fourth", "asr"),
    ]
    held.replace(A, "a.mp4", SETTINGS, entries)
    found = {record.span[0]: record.vector for record in held.search("second", "vector")}
    second, fourth = embed(["second", "fourth"])
    for start, vector in enumerate((given[0], second, given[1], fourth)):
        np.testing.assert_array_equal(found[start], vector)


def test_a_video_indexed_again_is_replaced_and_its_notes_stay(library: Library, held: Collection) -> None:
    held.replace(A, "a.mp4", SETTINGS, passages("one", "two", "three"))
    held.add_notes(A, "a.mp4", [note("mind the two")])
    held.replace(A, "b/a.mp4", SETTINGS, passages("four", "five"))
    texts = {record.text for record in held.search("one two three four five", "text")}
    assert texts == {"four", "five", "mind the two"}
    [video] = library.videos()
    assert (video.path, video.passages, video.notes) == ("b/a.mp4", 2, 1)
    assert library.verify() == []


def test_complete_means_this_video_with_this_model_and_these_settings(library: Library, held: Collection) -> None:
    held.replace(A, "a.mp4", SETTINGS, passages("one"))
    held.add_notes(B, "b.mp4", [note("seen, not indexed")])
    assert held.is_complete(A, dict(reversed(SETTINGS.items())))
    assert not held.is_complete(A, {**SETTINGS, "rate": 2.0})
    assert not held.is_complete(B, SETTINGS) and not held.is_complete(B, {})
    assert not library.collection("other", embed).is_complete(A, SETTINGS)


def test_a_video_in_which_nothing_was_found_is_complete(library: Library, held: Collection) -> None:
    held.replace(A, "silent.mp4", SETTINGS, [])
    assert held.is_complete(A, SETTINGS) and library.verify() == []


def test_indexing_after_a_note_makes_a_video_complete_and_a_note_after_indexing_leaves_it_so(held: Collection) -> None:
    held.add_notes(A, "a.mp4", [note("first")])
    held.replace(A, "a.mp4", SETTINGS, passages("one"))
    held.add_notes(A, "a.mp4", [note("second")])
    assert held.is_complete(A, SETTINGS) and held.videos()[0].notes == 2


def test_a_note_written_twice_is_held_once_and_one_that_differs_beside_it(held: Collection) -> None:
    held.add_notes(A, "a.mp4", [note("she left"), note("she left"), note("she came")])
    held.add_notes(A, "a.mp4", [note("she left")])
    assert held.videos()[0].notes == 2


@settings(max_examples=20)
@given(
    texts=st.lists(
        st.text(st.sampled_from("aber éß犬ﬁ'’-_.,09\n\u00ad\u0301") | st.characters(), max_size=40), max_size=12
    )
)
def test_verify_finds_nothing_wrong_with_a_sound_library_whatever_its_texts_are(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    library = Library(tmp_path_factory.mktemp("texts"), create=True)
    held = library.collection("model", embed)
    held.replace(A, "a.mp4", SETTINGS, passages(*(f"{text}1" for text in texts), *["one more line"] * 300))
    held.build_indices()
    assert library.verify() == []


def test_removing_a_video_removes_it_from_every_collection_and_nothing_else(library: Library) -> None:
    for model in ("small", "large"):
        for video in (A, B):
            library.collection(model, embed).replace(video, "film.mp4", SETTINGS, passages("one", "two"))
    library.collection("small", embed).add_notes(A, "film.mp4", [note("three")])
    assert library.remove(A) == 5
    assert library.remove(A) == 0
    assert {(video.video, video.model) for video in library.videos()} == {(B, "small"), (B, "large")}
    assert library.verify() == []


def test_a_moved_file_is_found_where_it_is_now_and_stays_complete(held: Collection) -> None:
    held.replace(A, "old.mp4", SETTINGS, passages("one"))
    held.moved(A, "it's new.mp4")
    held.moved(B, "nowhere.mp4")
    assert [record.path for record in held.search("one")] == ["it's new.mp4"]
    assert held.is_complete(A, SETTINGS) and len(held.videos()) == 1


def test_vectors_of_two_models_never_meet(library: Library) -> None:
    def wide(texts: Sequence[str]) -> np.ndarray:
        return np.ones((len(texts), 24), np.float32)

    library.collection("small", embed).replace(A, "a.mp4", SETTINGS, passages("one"))
    library.collection("wide", wide).replace(B, "b.mp4", SETTINGS, passages("one"))
    for model, function, video in (("small", embed, A), ("wide", wide, B)):
        for mode in ("text", "vector", "both"):
            found = library.collection(model, function).search("one", mode)
            assert [(record.video, record.model) for record in found] == [(video, model)]
    with pytest.raises(LibraryError, match="holds vectors of 16 numbers made with 'small', but these have 24"):
        library.collection("small", wide).replace(A, "a.mp4", SETTINGS, passages("two"))
    with pytest.raises(LibraryError, match="another name"):
        library.collection("small", wide).search("one")
    assert library.collection("small", embed).is_complete(A, SETTINGS)


def test_another_handle_sees_what_was_written_and_a_rebuilt_library_as_empty(tmp_path: Path, held: Collection) -> None:
    reader = Library(tmp_path / "library").collection("model", embed)
    held.replace(A, "a.mp4", SETTINGS, passages("one"))
    assert len(reader.search("one")) == 1
    held.replace(A, "a.mp4", SETTINGS, passages("one", "one more"))
    assert len(reader.search("one")) == 2
    rebuild(tmp_path / "library")
    assert reader.search("one") == [] and held.videos() == []
    held.replace(B, "b.mp4", SETTINGS, passages("one"))
    assert [record.video for record in reader.search("one")] == [B]


@pytest.mark.parametrize("address", ["file://{}", "file-object-store://{}"])
def test_a_library_may_be_at_an_address(tmp_path: Path, address: str) -> None:
    library = Library(address.format(tmp_path / "library"), create=True)
    held = library.collection("model", embed)
    held.replace(A, "a.mp4", SETTINGS, passages("one"))
    held.build_indices()
    assert [record.text for record in held.search("one")] == ["one"]
    assert Library(tmp_path / "library").videos() == library.videos() and library.verify() == []


Step = tuple[str, str, int]


@given(st.lists(st.tuples(st.sampled_from(["replace", "note", "remove", "index"]), st.sampled_from([A, B]),
                          st.integers(0, 3)), max_size=7))  # fmt: skip
@settings(max_examples=8)
def test_any_sequence_of_writes_leaves_what_a_dictionary_would_hold(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    library = Library(tmp_path_factory.mktemp("steps"), create=True)
    held = library.collection("model", embed)
    index: dict[str, int] = {}
    notes: dict[str, set[int]] = {}
    for what, video, number in steps:
        if what == "replace":
            held.replace(video, "film.mp4", {"n": number}, passages(*(f"line {i}" for i in range(number))))
            index[video] = number
        elif what == "note":
            held.add_notes(video, "film.mp4", [note(f"note {number}")])
            notes.setdefault(video, set()).add(number)
        elif what == "remove":
            assert library.remove(video) == index.pop(video, 0) + len(notes.pop(video, ()))
        else:
            held.build_indices()
    expected = {video: (index.get(video, 0), len(notes.get(video, ()))) for video in index.keys() | notes.keys()}
    assert {video.video: (video.passages, video.notes) for video in library.videos()} == expected
    assert all(held.is_complete(video, {"n": number}) for video, number in index.items())
    found = held.search("line note", "text", 100)
    assert len(found) == sum(map(sum, expected.values()))
    assert library.verify() == []


def test_a_content_hash_is_of_the_content_and_not_of_the_name(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    (tmp_path / "one.mp4").write_bytes(content)
    (tmp_path / "two.mkv").write_bytes(content)
    (tmp_path / "longer.mp4").write_bytes(content + b"\0")
    one, two, longer = (content_hash(tmp_path / name) for name in ("one.mp4", "two.mkv", "longer.mp4"))
    assert one == two == hashlib.sha256(content).hexdigest() != longer


@pytest.mark.parametrize("name", ["missing.mp4", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_said_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(MediaError, match="cannot be read"):
        content_hash(f"{tmp_path}/{name}")


def test_a_file_that_grows_while_it_is_hashed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = tmp_path / "download.mp4"
    film.write_bytes(b"half")
    digest = hashlib.file_digest

    def slow(stream: Any, name: str) -> Any:
        found = digest(stream, name)
        with film.open("ab") as more:
            more.write(b"and half")
        return found

    monkeypatch.setattr(hashlib, "file_digest", slow)
    with pytest.raises(MediaError, match="being written"):
        content_hash(film)
