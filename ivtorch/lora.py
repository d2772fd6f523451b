"""LoRA: low-rank updates beside the linear layers of a network; put there to be trained, or read from an adapter.

Notable:
- y = W x + scale * B A dropout(x), arXiv 2106.09685; W stays as it is, packed or not.
- The factors are float32 whatever the network computes in, and are cast where they are used.
- A dropout mask follows from a seed alone: a layer that is gone through again in the backward pass draws the same one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ivcore.adapter import Adapter
from ivcore.training import LoraSettings, first_factor

if TYPE_CHECKING:
    from ivtorch.generate import Model


class LoraLinear(nn.Module):
    """A linear layer and its update; lora_A: (rank, in), lora_B: (out, rank).

    mask_seed: what a training step draws the dropout mask from; None leaves nothing out.
    """

    def __init__(self, base: nn.Linear, a: np.ndarray, b: np.ndarray, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = _factor(a, base.weight.device), _factor(b, base.weight.device)
        self.scale, self.dropout = scale, dropout
        self.mask_seed: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        low = F.linear(self._masked(x), self.lora_A.weight.to(x.dtype)).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), low, self.lora_B.weight.to(x.dtype).T, alpha=self.scale).view_as(y)

    def delta(self) -> torch.Tensor:
        """What the weight gains, (out, in), in the dtype that the layer computes in."""
        return (self.scale * self.lora_B.weight @ self.lora_A.weight).to(self.base.weight.dtype)

    @property
    def rank(self) -> int:
        return self.lora_A.weight.shape[0]

    @property
    def bias(self) -> torch.Tensor:
        return self.base.bias

    def _masked(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask_seed is None or not self.dropout:
            return x
        random = torch.Generator(x.device).manual_seed(self.mask_seed)
        kept = torch.rand(x.shape, generator=random, device=x.device) >= self.dropout
        return x * kept / (1 - self.dropout)


def linears(network: nn.Module) -> dict[str, nn.Linear | LoraLinear]:
    """Name -> linear layer, with its LoRA if it has one, sorted by the names that a checkpoint has for them."""
    found: dict[str, nn.Linear | LoraLinear] = {}
    for name, module in network.named_modules():  # a module comes before its parts
        if isinstance(module, nn.Linear | LoraLinear) and name.rpartition(".")[0] not in found:
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


def _base(layer: nn.Linear | LoraLinear) -> nn.Linear:
    return layer.base if isinstance(layer, LoraLinear) else layer


def _shape(layer: nn.Linear | LoraLinear) -> tuple[int, ...]:
    """(out, in) of a linear layer."""
    return tuple(_base(layer).weight.shape)


def _factor(values: np.ndarray, device: torch.device) -> nn.Linear:
    factor = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    factor.weight = nn.Parameter(torch.tensor(values, device=device), requires_grad=False)
    return factor


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)
