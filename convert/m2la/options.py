"""What is asked of a conversion to M2LA, and what of the method may be left out to see what it is worth."""

from __future__ import annotations

from dataclasses import dataclass, field

from ivcore.errors import ConfigError
from ivcore.geometry import AttentionGeometry

LAYOUTS = ("norm", "release")
MOST_ROPE_HEADS = 4
"""Shared RoPE keys that are tried at most; each costs head_dim numbers of the latent."""


@dataclass(frozen=True)
class Method:
    """The parts of the method; the command line has them all, an ablation leaves one out.

    rotation: heads are rotated before one of them keeps RoPE. turns: a constant fitted to the distances stands in for
    RoPE where it is lost. balance: what a key's error weighs beside a value's is measured. attention_aware: errors are
    weighed by queries and o_proj. per_layer: layers differ in rank and in RoPE keys. calibrated: moments of
    activations; without them those that the weights alone imply.
    """

    rotation: bool = True
    turns: bool = True
    balance: bool = True
    attention_aware: bool = True
    per_layer: bool = True
    calibrated: bool = True


PLAIN_SVD = Method(False, False, False, False, False, False)
"""The baseline: one joint singular value decomposition of the weights of keys and values."""


@dataclass(frozen=True)
class Options:
    """The names are the command line's; one of rank and cache_ratio is given.

    rank: the latent's width in every layer, with one RoPE key. cache_ratio: how many times smaller the cache is to be
    than the grouped-query one. rope_heads: shared RoPE keys in every layer; None chooses them layer by layer in the
    `norm` layout.
    """

    rank: int | None = None
    cache_ratio: float | None = None
    layout: str = "norm"
    rope_heads: int | None = None
    method: Method = field(default_factory=Method)

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.cache_ratio is None):
            raise ConfigError("--attention m2la takes one of --rank and --cache-ratio; give one of them.")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank {self.rank} leaves no latent; it must be at least 1.")
        if self.cache_ratio is not None and not 1 <= self.cache_ratio < float("inf"):
            raise ConfigError(f"--cache-ratio {self.cache_ratio:g} makes no smaller cache; use 2, 4 or 8.")
        if self.layout not in LAYOUTS:
            raise ConfigError(f"--layout {self.layout} is not one of {', '.join(LAYOUTS)}.")
        if self.rope_heads is not None and self.rope_heads < 1:
            raise ConfigError(f"rope_heads is {self.rope_heads}; at least one key must keep RoPE.")
        if self.layout == "release" and self.rope_heads not in (None, 1):
            raise ConfigError("The release layout has one RoPE key; use --layout norm for more.")

    def cache_width(self, source: AttentionGeometry) -> int:
        """Numbers a token and layer in the cache, on average; ConfigError where no rank is left or none is saved."""
        head_dim, full = source.head_dim, source.gqa_cache_width
        kept = (self.rope_heads or 1) * head_dim
        if self.rank is not None:
            width = self.rank + kept
            if width > full:
                raise ConfigError(
                    f"--rank {self.rank} with {kept} numbers of RoPE keys makes the cache wider than the source's "
                    f"{full} numbers a token and layer; use at most --rank {full - kept}."
                )
            return width
        assert self.cache_ratio is not None
        width = int(full / self.cache_ratio)
        if width <= kept:
            raise ConfigError(
                f"--cache-ratio {self.cache_ratio:g} leaves {width} of {full} numbers a token and layer, but the RoPE "
                f"key alone takes {kept}, so no rank is left; use a ratio below {full / kept:g}."
            )
        return width

    def rope_choices(self, source: AttentionGeometry) -> tuple[int, ...]:
        """How many shared RoPE keys a layer may have."""
        if self.rope_heads is not None:
            if self.rope_heads > source.num_kv_heads:
                raise ConfigError(
                    f"rope_heads is {self.rope_heads}, but the source has {source.num_kv_heads} key heads to rotate."
                )
            return (self.rope_heads,)
        if self.layout == "release" or self.rank is not None or not self.method.calibrated:
            return (1,)
        return tuple(range(1, min(source.num_kv_heads, MOST_ROPE_HEADS) + 1))
