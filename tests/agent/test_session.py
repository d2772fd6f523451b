"""A session pays for what is new, and what it has read is what the whole conversation is to the model."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.session import ContextFull, Session
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from tests.agent.scripted import Scripted

REFERENCE = Path(__file__).resolve().parents[1] / "data/reference"
FRAMES = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
VIDEO = {"type": "video", "video": FRAMES, "times": [10.0, 10.5, 11.0, 11.5]}
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": [VIDEO, {"type": "text", "text": "What moves?"}]}


@pytest.fixture(scope="module", params=["torch", "mlx"])
def library(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("torch" if request.param == "torch" else "mlx.core")
    return importlib.import_module(f"iv{request.param}")


@pytest.fixture(params=["iv3-micro", "qwen3vl-micro"])
def session(library: Any, request: pytest.FixtureRequest) -> Session:
    folder = REFERENCE / request.param
    return Session(library.load(folder, dtype="float32"), Tokenizer.from_dir(folder))


def fresh_logits(session: Session, messages: list[dict[str, Any]]) -> np.ndarray:
    """What the model says after the whole conversation, read at once."""
    inputs = build_inputs(session.tokenizer, messages)
    return session.model.prefill(inputs, session.model.new_cache())


def later(number: int) -> list[dict[str, Any]]:
    shown = [VIDEO] if number % 2 else []
    return [{"role": "tool", "content": [*shown, {"type": "text", "text": f"Result {number}."}]}]


def told(session: Session) -> np.ndarray:
    assert session._logits is not None
    return session._logits


ANSWERS = ["It is blue.", "Let me look...", "<tool_call>\nlook\n</tool_call>"]


@pytest.fixture
def scripted(session: Session) -> Session:
    return Session(Scripted(session.model, session.tokenizer, ANSWERS), session.tokenizer)  # type: ignore[arg-type]


def talk(session: Session) -> list[int]:
    """Three turns; what each reading cost."""
    cost = [session.read([SYSTEM, QUESTION])]
    for number, answer in enumerate(ANSWERS):
        before = session.length
        assert "".join(session.answer(64)) == answer
        answered = session.length
        cost.append(session.read(later(number)))
        assert before < answered and cost[-1] == session.length - answered
        np.testing.assert_allclose(told(session), fresh_logits(session, session.messages), rtol=0, atol=2e-4)
    return cost


def test_every_turn_prefills_its_new_tokens_only_and_reads_as_the_whole_does(scripted: Session) -> None:
    cost = talk(scripted)
    whole = build_inputs(scripted.tokenizer, scripted.messages)
    assert scripted.spent.prefilled == sum(cost)
    # Of every answer, the last token was generated and not decoded: two ends, and the one that is read after a cut.
    assert scripted.spent.prefilled + scripted.spent.generated - len(ANSWERS) == len(whole.token_ids)
    assert scripted.spent.visual == int(np.asarray(whole.grid_thw).prod(axis=1).sum()) // 4
    assert scripted.length == len(whole.token_ids)


def test_a_rewritten_conversation_keeps_the_cache_of_what_both_begin_with(scripted: Session) -> None:
    talk(scripted)
    messages = scripted.messages
    for kept in (2, 4, 6):  # messages that both begin with: an answer of each kind is the last of them, or none
        shorter = [*messages[: kept + 1], {"role": "tool", "content": "Trimmed."}, *messages[kept + 2 :]]
        scripted.rewrite(messages)
        read = scripted.rewrite(shorter)
        assert scripted.messages == shorter
        whole = len(build_inputs(scripted.tokenizer, shorter).token_ids)
        assert scripted.length == whole and 0 < read < whole
        np.testing.assert_allclose(told(scripted), fresh_logits(scripted, shorter), rtol=0, atol=5e-4)


def test_likelihoods_are_the_models_own_and_say_nothing(session: Session) -> None:
    session.read([SYSTEM, QUESTION])
    length = session.length
    answers = ["yes", "no", "it is not clear"]
    found = session.log_likelihoods(answers)
    assert session.length == length
    end = session.tokenizer.token_id("<|im_end|>")
    scores = []
    for answer in answers:
        ids = [*session.tokenizer.encode_pieces([answer]), end]
        prompt = build_inputs(session.tokenizer, [SYSTEM, QUESTION])
        prompt.token_ids = np.concatenate((prompt.token_ids, ids)).astype(np.int32)
        logits = session.model.logits(prompt)[length - 1 : -1].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        scores.append(float(logs[np.arange(len(ids)), ids].sum()))
    np.testing.assert_allclose(found, scores, rtol=0, atol=2e-3)


def test_two_questions_without_an_answer_between_them_are_a_mistake(session: Session) -> None:
    session.read([SYSTEM, QUESTION])
    with pytest.raises(ValueError, match="waits for an answer"):
        session.read([QUESTION])


def test_a_prefill_that_is_stopped_leaves_nothing_in_the_cache(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = session.model.prefill

    def stopped(inputs: Any, cache: Any, **options: Any) -> Any:
        real(inputs, cache)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.model, "prefill", stopped)
    with pytest.raises(KeyboardInterrupt):
        session.read([SYSTEM, QUESTION])
    assert session.length == 0 and not session.waits
    monkeypatch.setattr(session.model, "prefill", real)
    session.read([SYSTEM, QUESTION])
    np.testing.assert_allclose(told(session), fresh_logits(session, [SYSTEM, QUESTION]), rtol=0, atol=2e-4)


def test_an_answer_in_other_tokens_than_its_text_is_read_in_is_kept_as_it_is_read(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.read([SYSTEM, QUESTION])
    tokens: list[int] = []
    continue_from = session.model.continue_from

    def noted(*arguments: Any, **options: Any) -> Iterator[int]:
        for token_id in continue_from(*arguments, **options):
            tokens.append(token_id)
            yield token_id

    monkeypatch.setattr(session.model, "continue_from", noted)
    said = "".join(session.answer(24))
    # Random weights write what no tokenizer would cut that way, and half characters.
    assert session.tokenizer.encode(said) != tokens and session.messages[-1]["content"] == said
    session.read(later(1))
    whole = build_inputs(session.tokenizer, session.messages)
    assert session.length == len(whole.token_ids)
    np.testing.assert_allclose(told(session), fresh_logits(session, session.messages), rtol=0, atol=2e-4)


def test_what_does_not_fit_into_the_context_is_not_read(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.read([SYSTEM, QUESTION])
    "".join(session.answer(4))
    messages, length, spent = list(session.messages), session.length, session.spent.prefilled
    text = session.model.config.text.model_copy(update={"max_position_embeddings": length + 60})
    monkeypatch.setattr(session.model, "config", session.model.config.model_copy(update={"text_config": text}))
    too_much = [{"role": "user", "content": "Who was it? " * 20}]
    with pytest.raises(ContextFull, match=rf"but the model's context holds {length + 60:,}; look at less\.$"):
        session.read(too_much)
    assert (session.messages, session.length, session.spent.prefilled) == (messages, length, spent)
    with pytest.raises(ContextFull):
        session.rewrite([*messages, *too_much])
    assert (session.messages, session.length, session.spent.prefilled) == (messages, length, spent)
    session.read([{"role": "user", "content": "Who?"}])
    np.testing.assert_allclose(told(session), fresh_logits(session, session.messages), rtol=0, atol=2e-4)
