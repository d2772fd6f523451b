"""The right passage among 10,000, by words, by vectors and by both; and queries of all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.library import KINDS, MODES, Collection, Entry, Library, LibraryError, Mode

ROWS, VIDEOS, DIMENSION = 10_000, 10, 64
VECTORS = np.random.default_rng(6).standard_normal((ROWS, DIMENSION)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
WORDS = [
    f"{first}{second}" for first in ("ba", "do", "ki", "lu", "me") for second in ("gar", "len", "mis", "tor", "zap")
]


def video(index: int) -> str:
    return f"{index:064x}"


def passage(row: int) -> str:
    """Row `row` is the only one with the word of its number; all share the other words."""
    return f"{WORDS[row % 25]} {WORDS[row // 25 % 25]} number{row}"


def towards(row: int, noise: float = 0.05) -> np.ndarray:
    """A query's vector near that of a row, float32 (d,)."""
    return VECTORS[row] + noise * np.random.default_rng(row).standard_normal(DIMENSION).astype(np.float32)


def exact(query: np.ndarray, count: int, rows: np.ndarray | None = None) -> list[tuple[int, float]]:
    """The nearest rows by cosine and how near, by NumPy."""
    rows = np.arange(ROWS) if rows is None else rows
    cosines = VECTORS[rows] @ (query / np.linalg.norm(query))
    return [(int(rows[i]), float(cosines[i])) for i in np.argsort(-cosines)[:count]]


def row_of(text: str) -> int:
    return int(text.rpartition("number")[2])


def searching(folder: Path, target: int) -> Collection:
    """The collection, with a model to which every query is one near row `target`."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.stack([towards(target)] * len(texts))

    return Library(folder).collection("model", embed)


def fill(folder: Path) -> None:
    held = Library(folder, create=True).collection("model")
    per_video = ROWS // VIDEOS
    for index in range(VIDEOS):
        rows = range(index * per_video, (index + 1) * per_video)
        entries = [Entry("passage", (r, r + 1), passage(r), "asr", VECTORS[r]) for r in rows]
        held.replace(video(index), f"{index}.mp4", {}, entries)


@pytest.fixture(scope="module", params=["before", "after", "with a vector index"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 passages, before and after the indices are brought up to date."""
    folder = tmp_path_factory.mktemp("library")
    fill(folder)
    if request.param != "before":
        rows = ROWS if request.param == "with a vector index" else ROWS + VIDEOS + 1
        Library(folder).collection("model").build_indices(vector_index_rows=rows)
    return folder


@pytest.mark.parametrize("target", [0, 4321, 9999])
def test_a_word_finds_the_one_passage_among_10_000_that_has_it(folder: Path, target: int) -> None:
    found = Library(folder).collection("model").search(f"where is number{target}?", "text")
    assert [(record.text, record.video) for record in found] == [(passage(target), video(target // 1000))]
    assert found[0].path == f"{target // 1000}.mp4"


@pytest.mark.parametrize("target", [0, 4321, 9999])
def test_a_vector_finds_what_an_exact_search_of_all_10_000_finds(folder: Path, target: int) -> None:
    found = searching(folder, target).search("any words", "vector", 5)
    expected = exact(towards(target), 5)
    assert expected[0][0] == target
    assert [row_of(record.text) for record in found] == [row for row, _ in expected]
    np.testing.assert_allclose([record.score for record in found], [cosine for _, cosine in expected], atol=1e-5)


@pytest.mark.parametrize("target", [0, 4321, 9999])
def test_both_together_put_first_what_both_put_first(folder: Path, target: int) -> None:
    found = searching(folder, target).search(f"number{target}", "both", 5)
    assert found[0].text == passage(target)
    assert found[0].score == pytest.approx(2 / 61, abs=1e-6)  # First in both lists: 1 / (60 + 1) from each.
    assert found[1].score == pytest.approx(1 / 62, abs=1e-6)


def test_both_together_find_what_only_one_finds(folder: Path) -> None:
    found = searching(folder, 77).search("number8000", "both", 10)
    assert {77, 8000} <= {row_of(record.text) for record in found[:2]}


def test_filters_hold_before_the_best_are_chosen(folder: Path) -> None:
    held = searching(folder, 4321)
    rows = np.arange(7000, 7011)
    for mode in MODES:
        found = held.search(passage(4321), mode, 20, video=video(7), kinds=["passage"], span=(7000.5, 7010.0))
        assert {row_of(record.text) for record in found} <= set(rows.tolist())
    nearest = held.search("any words", "vector", 20, video=video(7), span=(7000.5, 7010.0))
    assert [row_of(record.text) for record in nearest] == [row for row, _ in exact(towards(4321), 20, rows)]
    assert held.search(passage(4321), kinds=["note"]) == [] == held.search(passage(4321), kinds=[])
    assert held.search("number4321", "text", video=video(8)) == []


def test_what_came_after_the_indices_were_built_is_found_and_what_went_is_not(tmp_path: Path) -> None:
    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.stack([VECTORS[row_of(text)] for text in texts])

    held = Library(tmp_path, create=True).collection("model", embed)

    def put(index: int, rows: Sequence[int]) -> None:
        held.replace(video(index), "film.mp4", {}, [Entry("passage", (r, r + 1), passage(r), "asr") for r in rows])

    put(0, range(300))
    held.build_indices(vector_index_rows=256)
    put(1, range(300, 310))
    put(0, range(100))
    for mode in MODES:
        assert held.search("number305", mode, 1)[0].text == passage(305)
        assert passage(200) not in {record.text for record in held.search("number200", mode, 400)}
    held.build_indices(vector_index_rows=256)
    assert len(held.search("number305", "vector", 400)) == 110


QUERIES = {
    "quotes": '"a \'quoted" ""phrase\' \\"',
    "brackets": ")(][}{ text:(number1 AND NOT",
    "sql": "' OR 1=1; DROP TABLE records; --",
    "emoji": "👩‍👩‍👧 🐕",
    "40,000 characters": " ".join(f"word{i}" for i in range(5000))[:40_000],
    "one word of 40,000 characters": "x" * 40_000,
    "stop words": "the of and is it",
    "chinese": "视频里有一只狗",
    "arabic": "كلب في الحديقة",
    "nul": "a\0b",
    "half a pair": "\ud83d dog",
    "wildcards": "* ? ~ ^ % _ +-",
    "a letter": "x",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_a_strange_query_finds_itself_and_keeps_to_the_filter(
    strange: tuple[Collection, str], mode: Mode, query: str
) -> None:
    held, other = strange
    for record in held.search(query, mode, video=other):
        assert record.video == other and record.text == "nothing of the kind"
    found = held.search(query, mode, len(QUERIES))
    if mode != "text" or any(character.isalnum() for character in query):
        clean = query.replace("\ud83d", "\ufffd")
        # A word of more than 40 letters is in no index.
        assert (mode == "text" and query.startswith("xxx")) or clean in [record.text for record in found]


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> tuple[Collection, str]:
    """Every strange query is a passage of one video; another video has none of them."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.stack([VECTORS[len(text) % ROWS] for text in texts])

    held = Library(tmp_path_factory.mktemp("strange"), create=True).collection("model", embed)
    held.replace(video(1), "1.mp4", {}, [Entry("passage", (0, 1), query, "asr") for query in QUERIES.values()])
    held.replace(video(2), "2.mp4", {}, [Entry("passage", (0, 1), "nothing of the kind", "asr")])
    return held, video(2)


@given(query=st.text(max_size=60), mode=st.sampled_from(MODES), kinds=st.sets(st.sampled_from(KINDS)),
       k=st.integers(1, 20))  # fmt: skip
@settings(max_examples=40)
def test_no_query_crashes_or_leaves_its_filter(
    strange: tuple[Collection, str], query: str, mode: Mode, kinds: set[str], k: int
) -> None:
    held, other = strange
    found = held.search(query, mode, k, video=other, kinds=sorted(kinds), span=(0, 10))  # type: ignore[arg-type]
    assert all(record.video == other and record.kind in kinds for record in found) and len(found) <= k


def test_words_are_found_in_other_scripts_and_forms(tmp_path: Path) -> None:
    held = Library(tmp_path, create=True).collection("model")
    texts = ["公园里有一只狗在跑", "她在厨房里做饭", "Die Tür öffnet sich", "the dogs were running", "собака бежит"]
    entries = [Entry("passage", (i, i + 1), text, "asr", VECTORS[i]) for i, text in enumerate(texts)]
    held.replace(video(0), "0.mp4", {}, entries)
    queries = ["公园", "厨房", "TUR", "dog runs", "собака"]
    for _ in range(2):
        for query, text in zip(queries, texts, strict=True):
            assert held.search(query, "text")[0].text == text
        held.build_indices()


def test_a_blank_query_finds_nothing_and_asks_no_model(tmp_path: Path) -> None:
    held = Library(tmp_path, create=True).collection("model")
    held.replace(video(0), "0.mp4", {}, [Entry("passage", (0, 1), "one", "asr", VECTORS[0])])
    assert held.search("") == held.search(" \n\t") == []


@pytest.mark.parametrize(
    "request_, said",
    [
        ({"mode": "sql"}, "'sql' is no way to search"),
        ({"k": 0}, "0 records cannot be asked for"),
        ({"k": 10**12}, "1000000000000 records"),
        ({"kinds": ["passage", "film"]}, "'film' is no kind"),
        ({"video": "x' OR '1'='1"}, "is not the content hash"),
        ({"span": (5.0, 2.0)}, "5.0-2.0 is no span"),
        ({"span": (float("nan"), 2.0)}, "is no span"),
        ({"mode": "vector"}, "need the model"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_one_sentence(tmp_path: Path, request_: dict, said: str) -> None:
    held = Library(tmp_path, create=True).collection("model")
    held.replace(video(0), "0.mp4", {}, [Entry("passage", (0, 1), "one", "asr", VECTORS[0])])
    with pytest.raises(LibraryError, match=said):
        held.search("one", **request_)
