"""What a run holds to be so: open answers with a confidence, and what spoke for and against each.

After every feedback the model is asked, on a fork of its cache, what it would answer now: the beginning of the call
`answer` is put into its mouth, and it goes on from there. What it says is a hypothesis; the confidence of each is how
likely the model finds its words at that place, among all that are open. An observation that raises it speaks for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import numpy as np

from agent.calls import OPEN
from agent.context import Context
from agent.entries import Belief, Hypothesis, Instruction, Observation
from agent.session import Session

BEGINNING = f'{OPEN}\n{{"name": "answer", "arguments": {{"text": "'
MOST_HYPOTHESES = 4
ANSWER_TOKENS = 24
_INSIDE = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
MOVED, SURE = 0.05, 0.8
"""A change of confidence that counts as evidence; a confidence from which the question is no longer open."""


@dataclass
class Beliefs:
    """The belief of a run, kept in its context."""

    context: Context
    _hypotheses: dict[str, Hypothesis] = field(default_factory=dict)
    _weighed: int = 0

    def __post_init__(self) -> None:
        seen: list[str] = []
        for entry in self.context.entries:
            if isinstance(entry, Instruction):
                self._hypotheses = {}
            elif isinstance(entry, Belief):
                self._hypotheses = {each.text: each for each in entry.hypotheses}
                self._weighed = len(seen)
            elif isinstance(entry, Observation):
                seen.append(entry.id)

    def update(self, session: Session) -> Belief:
        """The belief after what the session has read."""
        seen = [each.id for each in self.context.of(Observation)]
        new, self._weighed = tuple(seen[self._weighed :]), len(seen)
        mouth = session.begun(BEGINNING)
        foreseen = _text(mouth.foreseen(ANSWER_TOKENS))
        texts = [*self._hypotheses, *([foreseen] if foreseen and foreseen not in self._hypotheses else [])]
        if texts:
            scores = mouth.log_likelihoods([_written(each) for each in texts], whole=False)
            chances = np.exp(scores - np.logaddexp.reduce(scores)) if len(texts) > 1 else np.exp(scores)
            found = [self._weigh(text, float(chance), new) for text, chance in zip(texts, chances, strict=True)]
            found.sort(key=lambda each: -each.confidence)
            self._hypotheses = {each.text: each for each in found[:MOST_HYPOTHESES]}
        best = next(iter(self._hypotheses.values()), None)
        question = list(self.context.of(Instruction))[-1].question
        unknown = () if best is not None and best.confidence >= SURE else (question,)
        return Belief(hypotheses=tuple(self._hypotheses.values()), unknown=unknown)

    def best(self) -> Hypothesis | None:
        """The likeliest answer so far."""
        return next(iter(self._hypotheses.values()), None)

    def forget(self) -> None:
        """Another question: its answers are others."""
        self._hypotheses = {}

    def _weigh(self, text: str, confidence: float, new: tuple[str, ...]) -> Hypothesis:
        before = self._hypotheses.get(text) or Hypothesis(text=text, confidence=0.0)
        change = confidence - before.confidence
        return Hypothesis(
            text=text,
            confidence=confidence,
            pro=before.pro + (new if change > MOVED else ()),
            contra=before.contra + (new if change < -MOVED else ()),
        )


def _text(said: str) -> str:
    """What a model says as the text of an answer, which is the inside of a JSON string, until it ends or is cut off."""
    inside = _INSIDE.match(said)
    assert inside is not None  # which may be empty
    try:
        return str(json.loads(f'"{inside[0]}"', strict=False)).encode(errors="replace").decode().strip()
    except ValueError:
        return inside[0].strip()


def _written(text: str) -> str:
    """A text as the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
