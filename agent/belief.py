"""What a run holds to be so: open answers with a confidence, and what spoke for and against each.

After every feedback the model is asked, on a fork of its cache, what it would answer now: the beginning of the call
`answer` is put into its mouth, and it goes on from there. What it says is a hypothesis; the confidence of each is how
likely the model finds its words at that place, among all that are open. An observation that raises it speaks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from agent.calls import OPEN
from agent.context import Context
from agent.entries import Belief, Hypothesis, Instruction, Observation
from agent.session import Session

BEGINNING = f'{OPEN}\n{{"name": "answer", "arguments": {{"text": "'
MOST_HYPOTHESES = 4
ANSWER_TOKENS = 24
MOVED, SURE = 0.05, 0.8
"""A change of confidence that counts as evidence; a confidence from which the question is no longer open."""


@dataclass
class Beliefs:
    """The belief of a run, kept in its context."""

    context: Context
    _hypotheses: dict[str, Hypothesis] = field(default_factory=dict)
    _weighed: int = 0

    def __post_init__(self) -> None:
        for last in self.context.of(Belief):
            self._hypotheses = {each.text: each for each in last.hypotheses}
        last_belief = max((n for n, each in enumerate(self.context.entries) if isinstance(each, Belief)), default=0)
        self._weighed = sum(isinstance(each, Observation) for each in self.context.entries[:last_belief])

    def update(self, session: Session) -> Belief:
        """The belief after what the session has read."""
        seen = [each.id for each in self.context.of(Observation)]
        new, self._weighed = tuple(seen[self._weighed :]), len(seen)
        mouth = session.begun(BEGINNING)
        foreseen = _until_quote(mouth.foreseen(ANSWER_TOKENS))
        texts = [*self._hypotheses, *([foreseen] if foreseen and foreseen not in self._hypotheses else [])]
        if texts:
            scores = mouth.log_likelihoods(texts, whole=False)
            chances = np.exp(scores - np.logaddexp.reduce(scores)) if len(texts) > 1 else np.exp(scores)
            found = [self._weigh(text, float(chance), new) for text, chance in zip(texts, chances, strict=True)]
            found.sort(key=lambda each: -each.confidence)
            self._hypotheses = {each.text: each for each in found[:MOST_HYPOTHESES]}
        best = next(iter(self._hypotheses.values()), None)
        question = next(each.text for each in reversed(list(self.context.of(Instruction))))
        unknown = () if best is not None and best.confidence >= SURE else (question.rpartition("Question: ")[2],)
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


def _until_quote(text: str) -> str:
    return text.partition('"')[0].strip()
