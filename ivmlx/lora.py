"""LoRA: low-rank updates beside the linear layers of a network; put there to be trained, or read from an adapter.

Notable:
- y = W x + scale * B A dropout(x), arXiv 2106.09685; W stays as it is, packed or not.
- The factors are float32 whatever the network computes in, and are cast where they are used.
- A dropout mask follows from a seed alone: a layer that is gone through again in the backward pass draws the same one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ivcore.adapter import Adapter
from ivcore.training import LoraSettings, first_factor

if TYPE_CHECKING:
    from ivmlx.generate import Model

Linear = nn.Linear | nn.QuantizedLinear


class LoraLinear(nn.Module):
    """A linear layer and its update; lora_A: (rank, in), lora_B: (out, rank).

    mask_seed: what a training step draws the dropout mask from; None leaves nothing out.
    """

    def __init__(self, base: Linear, a: np.ndarray, b: np.ndarray, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = _factor(a), _factor(b)
        self.scale, self.dropout = scale, dropout
        self.mask_seed: int | None = None

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        low = self._masked(x) @ self.lora_A.weight.astype(x.dtype).T
        return mx.addmm(y, low, self.lora_B.weight.astype(x.dtype).T, alpha=self.scale)

    def delta(self) -> mx.array:
        """What the weight gains, (out, in), in the dtype that the layer computes in."""
        packed = isinstance(self.base, nn.QuantizedLinear)
        dtype = self.base.scales.dtype if packed else self.base.weight.dtype
        return (self.scale * self.lora_B.weight @ self.lora_A.weight).astype(dtype)

    @property
    def rank(self) -> int:
        return self.lora_A.weight.shape[0]

    @property
    def bias(self) -> mx.array:
        return self.base.bias

    def _masked(self, x: mx.array) -> mx.array:
        if self.mask_seed is None or not self.dropout:
            return x
        kept = mx.random.uniform(shape=x.shape, key=mx.random.key(self.mask_seed)) >= self.dropout
        return x * kept / (1 - self.dropout)


def linears(network: nn.Module) -> dict[str, Linear | LoraLinear]:
    """Name -> linear layer, with its LoRA if it has one, sorted by the names that a checkpoint has for them."""
    found: dict[str, Linear | LoraLinear] = {}
    for name, module in network.named_modules():  # a module comes before its parts
        if isinstance(module, Linear | LoraLinear) and name.rpartition(".")[0] not in found:
            found[name] = module
    return dict(sorted(found.items()))


def loras(network: nn.Module) -> dict[str, LoraLinear]:
    """Name -> linear layer with a LoRA."""
    return {name: layer for name, layer in linears(network).items() if isinstance(layer, LoraLinear)}


def add_lora(network: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Put a LoRA that changes nothing yet on every layer that the settings name; one that is there already stays.

    Raises TrainingError where the settings name no layer, or are not those of the adapter that is there.
    """
    layers, present = linears(network), loras(network)
    if present:
        settings.check_present({name: (layer.rank, layer.scale) for name, layer in present.items()}, layers)
        for layer in present.values():
            layer.dropout = settings.dropout
        return
    for name in settings.pick(layers):
        rows, columns = _shape(layers[name])
        a, b = first_factor(name, settings.rank, columns, seed), np.zeros((rows, settings.rank), np.float32)
        _replace(network, name, LoraLinear(_base(layers[name]), a, b, settings.scale, settings.dropout))


def load_adapter(model: Model, path: str | Path) -> None:
    """Put the adapter in a folder on a loaded model, in place of one that it has.

    Raises CheckpointError for a folder that cannot be read or an adapter of another model, which is then unchanged.
    """
    adapter, layers = Adapter.load(path), linears(model.network)
    adapter.check({name: _shape(layer) for name, layer in layers.items()})
    for name, layer in layers.items():
        updated = LoraLinear(_base(layer), *adapter.factors(name)) if name in adapter.modules else _base(layer)
        _replace(model.network, name, updated)


def _base(layer: Linear | LoraLinear) -> Linear:
    return layer.base if isinstance(layer, LoraLinear) else layer


def _shape(layer: Linear | LoraLinear) -> tuple[int, ...]:
    """(out, in) of a linear layer, also of one that is packed."""
    base = _base(layer)
    rows, columns = base.weight.shape
    return rows, columns * 32 // base.bits if isinstance(base, nn.QuantizedLinear) else columns


def _factor(values: np.ndarray) -> nn.Linear:
    factor = nn.Linear(1, 1, bias=False)
    factor.weight = mx.array(values)
    return factor


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    network.update_modules(tree_unflatten([(name, module)]))
