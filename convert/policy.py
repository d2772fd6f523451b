"""Which modules are quantised, to how many bits: the defaults, patterns to keep, and mixed recipes.

Notable:
- The vision tower and its mergers stay in float: what is lost before the decoder sees it cannot be recovered.
- `kv_b_proj` gets 8 bits whatever the rest has, since every cached token passes through it.
- A recipe gives more bits to the places that mlx-lm's of that name does (mlx_lm/convert.py, after llama.cpp): to values
  and `down_proj` in the first and last eighth of the layers and every third between, and to the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ivcore.errors import ConfigError
from ivcore.patterns import matches

VISION = "model.visual"
LATENT_UP = "kv_b_proj"
LATENT_UP_BITS = 8
VALUE_MODULES = ("v_proj", "kv_a_proj_with_mqa", "kv_a_proj")
"""Where values are made; under M2LA they are part of the latent."""

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Form:
    """MLX's affine form: bits a code, and how many columns share a scale and a bias."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Recipe:
    """low: bits of most modules; high: of those that lose the most."""

    low: int
    high: int


RECIPES = {
    "mixed_2_6": Recipe(2, 6),
    "mixed_3_4": Recipe(3, 4),
    "mixed_3_6": Recipe(3, 6),
    "mixed_4_6": Recipe(4, 6),
}


@dataclass(frozen=True)
class Policy:
    """bits: None where `recipe` says them, or nothing is quantised; keep: shell patterns of what stays in float."""

    bits: int | None
    group_size: int
    keep: tuple[str, ...]
    recipe: str | None
    layers: int

    @property
    def quantizes(self) -> bool:
        return self.bits is not None or self.recipe is not None

    def form(self, module: str, shape: tuple[int, ...]) -> tuple[Form | None, str]:
        """The form of a module's weight, None for float, and the reason where that is not the common one."""
        if len(shape) != 2:
            return None, "not a matrix"
        if module.startswith(f"{VISION}."):
            return None, "vision tower"
        if pattern := next((pattern for pattern in self.keep if matches(module, pattern)), None):
            return None, f"--keep {pattern}"
        if shape[1] % self.group_size:
            return None, f"{shape[1]} columns are not groups of {self.group_size}"
        bits, reason = self._bits(module)
        return Form(bits, self.group_size), reason

    def _bits(self, module: str) -> tuple[int, str]:
        name = module.rpartition(".")[2]
        if name == LATENT_UP:
            return LATENT_UP_BITS, "every cached token passes through it"
        if self.recipe is None:
            assert self.bits is not None
            return self.bits, ""
        recipe = RECIPES[self.recipe]
        sensitive = module == "lm_head" or (
            name in (*VALUE_MODULES, "down_proj") and _more_bits(_layer_of(module), self.layers)
        )
        return (recipe.high, f"{self.recipe}: sensitive") if sensitive else (recipe.low, "")


def check_patterns(patterns: Iterable[str], modules: Iterable[str]) -> None:
    """ConfigError for a pattern that names no module: it is misspelt, and would silently keep nothing."""
    modules = list(modules)
    for pattern in patterns:
        if not any(matches(module, pattern) for module in modules):
            raise ConfigError(f"--keep {pattern} names no module of this checkpoint; see iv3 convert --dry-run.")


def _layer_of(module: str) -> int:
    match = _LAYER.search(module)
    return int(match[1]) if match else 0


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
