"""What `compare` returns: plain numbers of every comparison, gates on them, and the object that `--json` prints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ivcore.errors import IvError


class ParityError(IvError):
    """Runs that cannot be compared, or that are further apart than a gate allows."""


@dataclass(frozen=True)
class RunName:
    """One run: the folder or id as it was given, the backend, the dtype it computes in."""

    model: str
    backend: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model} on {self.backend} in {self.dtype}"


@dataclass(frozen=True)
class PromptSize:
    """The prompt that all runs read; source: "probe", the video's file, or "inputs"."""

    source: str
    tokens: int
    visual_tokens: int


@dataclass(frozen=True)
class PointError:
    """How far a run is from the reference at one point.

    relative_l2 (||run - reference|| / ||reference||), max_abs and cosine: of the run as it is, with all that the point
    inherits; visual and text: relative_l2 at those positions alone, None in the vision tower and where there are none.
    own: relative L2 of the error that the point makes by itself, when everything before it is the reference's.
    limit: the own error above which it would be the suspect; None where nothing is known of what to expect.
    """

    point: str
    stack: str
    rows: int
    relative_l2: float
    max_abs: float
    cosine: float
    visual: float | None
    text: float | None
    own: float
    limit: float | None


@dataclass(frozen=True)
class Suspect:
    """The first point, in causal order, whose own error leaves the trend of those before it; sentence says it."""

    point: str
    own: float
    limit: float
    sentence: str


@dataclass(frozen=True)
class LogitsError:
    """Logits at `compared` of `positions` positions: KL(reference || run) in nats, share of equal top tokens, and the
    perplexity of the prompt's own text tokens under both, None where there are none to predict."""

    compared: int
    positions: int
    kl_mean: float
    kl_max: float
    agreement: float
    reference_perplexity: float | None = None
    perplexity: float | None = None

    @property
    def perplexity_difference(self) -> float | None:
        """The run's perplexity less the reference's."""
        if self.perplexity is None or self.reference_perplexity is None:
            return None
        return self.perplexity - self.reference_perplexity


@dataclass(frozen=True)
class Decode:
    """Greedy tokens of both; parted_at: how many are the same before the texts part, None where they do not."""

    parted_at: int | None
    reference_ids: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """One run beside the reference; text, visual: logits at the prompt's positions of that kind."""

    run: RunName
    points: tuple[PointError, ...]
    suspect: Suspect | None
    text: LogitsError | None
    visual: LogitsError | None
    decode: Decode


@dataclass(frozen=True)
class Report:
    """Every comparison with the first run."""

    reference: RunName
    prompt: PromptSize
    comparisons: tuple[Comparison, ...]

    def title(self, run: RunName) -> str:
        """A run's name as short as the report allows: without the model where all runs are of one."""
        models = {self.reference.model, *(comparison.run.model for comparison in self.comparisons)}
        return str(run) if len(models) > 1 else f"{run.backend} in {run.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints; a number that is not finite is null."""
        content = _finite(asdict(self))
        for raw, comparison in zip(content["comparisons"], self.comparisons, strict=True):
            for kind in ("text", "visual"):
                if error := getattr(comparison, kind):
                    raw[kind]["perplexity_difference"] = _finite(error.perplexity_difference)
        return content

    def misses(self, max_kl: float | None = None, min_agreement: float | None = None) -> list[str]:
        """A clause for every bound that a comparison misses at the text positions; empty when all hold.

        max_kl: of the mean KL in nats. min_agreement: of the share of equal top tokens. A KL of NaN misses any bound.
        """
        found = []
        for comparison in self.comparisons:
            text, title = comparison.text, self.title(comparison.run)
            if text is None:
                continue
            if max_kl is not None and not text.kl_mean <= max_kl:
                found.append(f"{title}: the mean KL of {text.kl_mean:.3g} nats is not within {max_kl:g}")
            if min_agreement is not None and not text.agreement >= min_agreement:
                found.append(
                    f"{title}: the top tokens agree at {text.agreement:.4g} of the positions, not {min_agreement:g}"
                )
        return found


def _finite(value: Any) -> Any:
    """`value` with null for numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
