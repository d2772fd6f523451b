"""Where the weights of a network are: each process has all of them, or FSDP2 gives each its part.

Notable:
- A decoder layer is brought together when it is gone through, and what is left of the network (vision tower,
  embeddings, head) for as long as a batch takes: how often the tower is gone through depends on a process's own frames,
  and all processes must bring parts together in the same order.
- A part is float32, so it is its own master; a layer computes in the dtype that the model was loaded in.
- Gradients are added up, never averaged: a step's weights add up to 1 over all processes (see docs/training.md).

FSDP2 is `torch.distributed.fsdp.fully_shard`; the idea is ZeRO's, arXiv 1910.02054. MLX has no such thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ivtorch.model import Network
from ivtorch.processes import Processes

T = TypeVar("T")


class Replicated:
    """Every process has all weights; gradients are summed when a step is taken."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, which goes through the network once with a gradient."""
        return work()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Within, every process has all weights, and goes through the network as it likes, without a gradient."""
        yield

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this process has of a parameter or its gradient; the parameter's own memory."""
        return tensor.detach()

    def whole(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """From every process's part of something that lies as the parameter of that name does."""
        return own

    def cut(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of it; the way back from `whole`."""
        return whole

    def sum(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's parts of the gradients of all processes together."""
        return self._processes.sum(gradients)

    def norm(self, gradients: Mapping[str, torch.Tensor]) -> float:
        """The norm of what `sum` gives, the same number on all processes."""
        norm = torch.nn.utils.get_total_norm(list(gradients.values())).item()
        return float(self._processes.gather(norm)[0])


class Sharded(Replicated):
    """Every process has a part of each weight (FSDP2), along its first axis."""

    def __init__(self, network: Network, processes: Processes, dtype: torch.dtype) -> None:
        """Cut the network's weights up; `requires_grad` of its parameters is what it will be. dtype: to compute in."""
        # Imported here, because it takes as long as the rest of PyTorch.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__(processes)
        mesh = init_device_mesh(next(network.parameters()).device.type, (processes.world,))
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        self._layers: list[Any] = list(network.model.language_model.layers)
        self._root: Any = cast(Any, _Root(network))
        for module in (*self._layers, self._root):
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
            fully_shard(module, mesh=mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        # FSDP2 would prefetch in the order of the last passes, and `unsharded` has other ones on every process.
        for module, before in zip((*self._layers, self._root), (self._layers[0], *self._layers), strict=True):
            module.set_modules_to_backward_prefetch([before])
        with torch.no_grad():
            self._root(lambda: None)  # FSDP2 takes the module that is gone through first for the root.
        self._root.reshard()
        self._parameters: dict[str, Any] = dict(network.named_parameters())

    def run(self, work: Callable[[], T]) -> T:
        found = self._root(work)
        # A process without a video has no gradient for the tower, and FSDP2 would leave it out there alone.
        for parameter in self._root.parameters():
            if parameter.requires_grad and not isinstance(parameter, torch.distributed.tensor.DTensor):
                parameter.grad = torch.zeros_like(parameter)
        return found

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        for module in (*self._layers, self._root):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in (*self._layers, self._root):
                module.reshard()
            for layer in self._layers:
                layer.set_reshard_after_forward(True)

    def own(self, tensor: Any) -> torch.Tensor:
        part: torch.Tensor = tensor.detach().to_local()
        return part

    def whole(self, name: str, own: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        like = self._parameters[name]
        return DTensor.from_local(
            own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        ).full_tensor()

    def cut(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        like = self._parameters[name]
        # The copy, because a part would keep the whole tensor's memory.
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local().clone()

    def sum(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(gradients)  # FSDP2 has done that in every backward pass.

    def norm(self, gradients: Mapping[str, torch.Tensor]) -> float:
        own = torch.nn.utils.get_total_norm(list(gradients.values())).item()
        return math.sqrt(sum(norm**2 for norm in self._processes.gather(own)))


class _Root(nn.Module):
    """Whatever is done with a network, as one module's pass: for so long FSDP2 keeps what is no layer's together."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[[], T]) -> T:
        return work()
