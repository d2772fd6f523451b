"""The step of training: the gradient of a loss on a packed batch, gathered over batches, and AdamW.

Notable:
- The modules, weights and names are those of inference: after a step, the model generates with the new weights.
- Projections run over all tokens of a batch at once; attention stays within a row, and the head and the loss see only
  the places with a weight, in blocks under the memory budget.
- What is trained has float32 masters where the network computes in bfloat16; gradients are gathered in float32.
- No random state outlives a step: a dropout mask follows from the seed and the number of the batch among those of all
  processes.
- Of several processes each gathers the gradient of its own batches; `apply` sums them. Where all weights are trained,
  FSDP2 shares them out (see `ivtorch.sharding`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ivcore.adapter import write_adapter
from ivcore.allocator import keep_freed_blocks
from ivcore.checkpoint import manifest
from ivcore.errors import TrainingError
from ivcore.floats import narrow
from ivcore.rotary import text_rope
from ivcore.row_groups import row_groups
from ivcore.schedule import frame_groups
from ivcore.shards import TensorSpec
from ivcore.training import (
    Batch,
    LoraSettings,
    Loss,
    NextToken,
    OptimizerSettings,
    head_block,
    joined_grids,
    parameter_groups,
)
from ivtorch.attention import Packing, Step
from ivtorch.cache import Cache
from ivtorch.generate import Model
from ivtorch.lora import add_lora, loras
from ivtorch.losses import Statistics, weighted_loss
from ivtorch.model import Visual, straight
from ivtorch.processes import Processes
from ivtorch.sharding import Replicated, Sharded

STORED = {"float32": "F32", "bfloat16": "BF16"}
FACTORS = (".lora_A.weight", ".lora_B.weight")


class Trainer:
    """Trains a loaded model in place: a LoRA, or with `lora` None all of it.

    An adapter that `load_adapter` has put on the model is trained on. checkpointing: recompute each decoder layer and
    group of frames in the backward pass instead of keeping their activations. seed: of LoRA's first factors and of the
    dropout masks. trainable: name -> shape, named as in the checkpoint, or `<module>.lora_A.weight` and `lora_B`.
    processes: with whom the step is shared; all of them must call the same methods in the same order, `logprobs` and
    `accumulate` apart where weights are not sharded.

    Raises TrainingError for settings that do not fit the model.
    """

    def __init__(
        self,
        model: Model,
        *,
        lora: LoraSettings | None,
        optimizer: OptimizerSettings,
        checkpointing: bool = True,
        seed: int = 0,
        processes: Processes | None = None,
    ) -> None:
        network = model.network
        self.model, self.lora, self.checkpointing = model, lora, checkpointing
        self.processes = processes or Processes()
        if model.dtype not in STORED:
            raise TrainingError(f"A model in {model.dtype} cannot be trained; load it in bfloat16 or float32.")
        if next(network.parameters()).device.type == "cpu":
            keep_freed_blocks()
        if lora is not None:
            add_lora(network, lora, seed)
        elif loras(network):
            raise TrainingError("The model has an adapter; merge it before training all weights.")
        elif model.config.quantization is not None:
            raise TrainingError("Packed weights cannot be trained; train a LoRA on them, or convert them to a float.")
        self._loras = list(loras(network).values())
        parameters = dict(network.named_parameters())
        names = [name for name in parameters if lora is None or name.endswith(FACTORS)]
        self._groups = parameter_groups({name: tuple(parameters[name].shape) for name in names}, optimizer)
        names = [name for group in self._groups for name in group.names]
        self.trainable = {name: tuple(parameters[name].shape) for name in names}
        self._vision = any(name.startswith("model.visual.") for name in self.trainable)
        network.requires_grad_(False)
        for name in names:
            parameters[name].requires_grad_(True)
        self._layout = Replicated(self.processes)
        if lora is None and self.processes.world > 1:
            self._layout = Sharded(network, self.processes, getattr(torch, model.dtype))
            parameters = dict(network.named_parameters())
        self._parameters = {name: parameters[name] for name in names}
        self._masters = {name: self._layout.own(parameter).float() for name, parameter in self._parameters.items()}
        self._start = {name: master.clone() for name, master in self._masters.items()} if lora else {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [self._masters[name] for name in group.names], "weight_decay": group.weight_decay}
                for group in self._groups
            ],
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._steps, self._draws = 0, np.array([seed, 0])

    def accumulate(self, batch: Batch, loss: Loss) -> dict[str, float]:
        """Add a batch's gradient to what `apply` will use; returns `loss` and its statistics, all weighted sums."""
        batch.check(self.model.config)
        seed, done = self._draws.tolist()
        number = done + self.processes.rank + 1
        self._draws[1] += self.processes.world
        seeds = np.random.SeedSequence([seed, number]).generate_state(len(self._loras)).tolist()
        for layer, seed in zip(self._loras, seeds, strict=True):
            layer.mask_seed = seed
        try:
            total, statistics = self._layout.run(lambda: self._loss(batch, loss))
            if total.requires_grad:
                total.backward()
        finally:
            for layer in self._loras:
                layer.mask_seed = None
        self._keep_gradient()
        return {name: value.item() for name, value in {"loss": total, **statistics}.items()}

    def take_part(self) -> None:
        """Have no batch, where others have one more: weights that are sharded are brought together by all or none."""
        if isinstance(self._layout, Sharded):
            zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
            batch = Batch(zero, np.zeros((3, 1), np.int32), one, None, None, zero, one.astype(np.float32))
            total, _ = self._layout.run(lambda: self._loss(batch, NextToken()))
            (total * 0).backward()
            self._keep_gradient()

    def unsharded(self) -> AbstractContextManager[None]:
        """Within, the model may be used as it likes by each process, and `logprobs` and `tensors` may be called."""
        return self._layout.unsharded()

    def apply(self, learning_rate: float, max_norm: float | None) -> float:
        """Take AdamW's step with the gradient gathered, clipped to `max_norm`, and clear it; returns its norm before.

        The gradient is that of all processes together. Raises TrainingError, the weights unchanged, where the norm is
        not finite.
        """
        self._draws[1] = max(self.processes.gather(int(self._draws[1])))
        gradients = self._layout.sum({name: self._gradient(name) for name in self.trainable})
        norm = self._layout.norm(gradients)
        self._gradients = {}
        if not math.isfinite(norm):
            raise TrainingError(f"The gradient's norm is {norm}; the step was not taken. Try a lower learning rate.")
        shrink = 1.0 if max_norm is None else min(1.0, max_norm / max(norm, 1e-12))
        for name, gradient in gradients.items():
            self._masters[name].grad = gradient.mul_(shrink) if shrink < 1 else gradient
        for settings, group in zip(self._optimizer.param_groups, self._groups, strict=True):
            settings["lr"] = learning_rate * group.multiplier
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        self._use(self._masters)
        return norm

    def gradients(self) -> dict[str, np.ndarray]:
        """The gradient gathered, float32, by the names of `trainable`; this process's own where none is sharded."""
        return {name: self._layout.whole(name, self._gradient(name)).cpu().numpy().copy() for name in self.trainable}

    def set_gradients(self, gradients: dict[str, np.ndarray]) -> None:
        """Put a gradient in place of the one gathered."""
        self._gradients = {name: self._layout.cut(name, self._tensor(gradients[name])) for name in self.trainable}

    def logprobs(self, batch: Batch) -> np.ndarray:
        """As the function of that name, with the weights as they are now."""
        return logprobs(self.model, batch)

    def token_logprobs_full(self, batch: Batch) -> np.ndarray:
        """As the function of that name, with the weights as they are now."""
        return token_logprobs_full(self.model, batch)

    def reference_logprobs(self, batch: Batch, *, full: bool = False) -> np.ndarray:
        """As `logprobs`, or `token_logprobs_full`, with the LoRA that training began with.

        Raises TrainingError where all weights are trained.
        """
        if self.lora is None:
            raise TrainingError("All weights are trained, so the model it began from must be loaded beside it.")
        now = {name: master.clone() for name, master in self._masters.items()}
        self._use(self._start)
        try:
            return (token_logprobs_full if full else logprobs)(self.model, batch)
        finally:
            self._use(now)

    def state(self) -> dict[str, np.ndarray]:
        """All that a new Trainer of the same settings needs to go on from here; gradients gathered are not part.

        It does not depend on how many processes there are; only process 0 has it, for the others it is empty.
        """
        state = {"steps": np.array(self._steps), "draws": self._draws.copy()}
        for name, master in self._masters.items():
            moments = self._optimizer.state.get(master) or {
                key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")
            }
            parts = {"weight": master, "mean": moments["exp_avg"], "square": moments["exp_avg_sq"]}
            for key, part in parts.items():
                whole = self._layout.whole(name, part)
                if self.processes.rank == 0:
                    state[f"{key}.{name}"] = whole.cpu().numpy().copy()
        return {} if self.processes.rank else state

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from another Trainer's `state()`, that of process 0; TrainingError where it trained something else."""
        expected = {f"{key}.{name}": shape for name, shape in self.trainable.items()
                    for key in ("weight", "mean", "square")} | {"steps": (), "draws": (2,)}  # fmt: skip
        fits = self.processes.rank > 0 or {name: array.shape for name, array in state.items()} == expected
        if not all(self.processes.gather(fits)):
            raise TrainingError("The state to go on from is of another model, adapter or recipe.")
        counts = None if self.processes.rank else [int(state["steps"]), state["draws"].tolist()]
        self._steps, draws = self.processes.gather(counts)[0]
        self._draws = np.array(draws)
        self._gradients = {}
        for name, shape in self.trainable.items():
            weight, mean, square = (
                self._layout.cut(name, self._tensor(self.processes.broadcast(state.get(f"{key}.{name}"), shape)))
                for key in ("weight", "mean", "square")
            )
            master = self._masters[name]
            master.copy_(weight)
            self._optimizer.state[master] = {
                "step": torch.tensor(float(self._steps), device=master.device),
                "exp_avg": mean,
                "exp_avg_sq": square,
            }
        self._use(self._masters)

    def save_adapter(self, path: str | Path) -> None:
        """Write the LoRA as a folder in PEFT's form; CheckpointError when it cannot be written."""
        if self.lora is None:
            raise TrainingError("All weights are trained, so there is no adapter to save.")
        factors = {
            name: (layer.lora_A.weight.detach().cpu().numpy(), layer.lora_B.weight.detach().cpu().numpy())
            for name, layer in loras(self.model.network).items()
        }
        write_adapter(path, factors, self.lora)

    def specs(self) -> dict[str, TensorSpec]:
        """The specs of `tensors`, for `ivcore.shards.write_checkpoint`."""
        dtype = STORED[self.model.dtype]
        return {name: TensorSpec(shape, dtype) for name, shape in manifest(self.model.config).items()}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor of a fully trained checkpoint in its stored form, one by one."""
        if self.lora is not None:
            raise TrainingError("Only a LoRA is trained; save it as an adapter, and merge it with iv3 convert.")
        parameters = dict(self.model.network.named_parameters())
        for name, spec in self.specs().items():
            # A copy: FSDP2 cannot free memory that it shares with NumPy.
            whole = parameters[name].detach().to("cpu", torch.float32, copy=True)
            yield name, narrow(whole.numpy(), spec.dtype)

    def _loss(self, batch: Batch, loss: Loss) -> tuple[torch.Tensor, Statistics]:
        model, places = self.model, batch.places
        rows, targets, weights = loss.rows(places), batch.targets[places], batch.weights[places]
        visual = _encode(model, batch, self.checkpointing, self._vision)
        hidden = hidden_states(model, batch, visual, recompute=self.checkpointing)
        hidden = hidden[self._tensor(places)]
        block = head_block(model.config.text.vocab_size, model.memory_budget)

        def part(hidden: torch.Tensor, at: slice) -> tuple[torch.Tensor, Statistics]:
            given = {name: self._tensor(array[at]) for name, array in rows.items()}
            scores = model.network.logits(hidden)
            return weighted_loss(loss, scores, self._tensor(targets[at]).long(), self._tensor(weights[at]), given)

        total = torch.zeros((), device=hidden.device)
        statistics: Statistics = {}
        for start in range(0, len(places), block):
            at = slice(start, start + block)
            if len(places) <= block:
                value, sums = part(hidden, at)
            else:
                value, sums = checkpoint(part, hidden[at], at, use_reentrant=False, preserve_rng_state=False)
            total = total + value
            statistics = {name: statistics.get(name, 0) + each for name, each in sums.items()}
        return total, statistics

    def _keep_gradient(self) -> None:
        """Add the gradient of a backward pass to the one gathered."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                gradient, parameter.grad = self._layout.own(parameter.grad), None
                held = self._gradients.get(name)
                self._gradients[name] = gradient.float() if held is None else held.add_(gradient)

    def _gradient(self, name: str) -> torch.Tensor:
        held = self._gradients.get(name)
        return torch.zeros_like(self._masters[name]) if held is None else held

    @torch.no_grad()
    def _use(self, weights: dict[str, torch.Tensor]) -> None:
        """Let the network compute with these weights."""
        for name, parameter in self._parameters.items():
            # A parameter in float32 is its own master.
            if (own := self._layout.own(parameter)).data_ptr() != weights[name].data_ptr():
                own.copy_(weights[name])

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return _tensor(self.model, array)


def logprobs(model: Model, batch: Batch) -> np.ndarray:
    """Log-probabilities of the targets, float32 (S,), without a gradient; 0 where the weight is 0."""
    places, out = batch.places, np.zeros(len(batch.token_ids), np.float32)
    for at, scores in _scores(model, batch):
        targets = _tensor(model, batch.targets[places[at]]).long()[:, None]
        out[places[at]] = scores.gather(-1, targets)[:, 0].cpu().numpy()
    return out


def token_logprobs_full(model: Model, batch: Batch) -> np.ndarray:
    """Log-probabilities of the whole vocabulary at the K places with a weight, float32 (K, vocab)."""
    out = np.empty((len(batch.places), model.config.text.vocab_size), np.float32)
    for at, scores in _scores(model, batch):
        out[at] = scores.cpu().numpy()
    return out


@torch.inference_mode()
def _scores(model: Model, batch: Batch) -> Iterator[tuple[slice, torch.Tensor]]:
    """Log-probabilities (k, vocab) of block after block of the places with a weight."""
    batch.check(model.config)
    hidden, places = hidden_states(model, batch, _encode(model, batch, False, False)), batch.places
    block = head_block(model.config.text.vocab_size, model.memory_budget)
    for start in range(0, len(places), block):
        at = slice(start, start + block)
        scores = model.network.logits(hidden[_tensor(model, places[at])])
        yield at, torch.log_softmax(scores, dim=-1)


def hidden_states(model: Model, batch: Batch, visual: Visual | None, *, recompute: bool = False) -> torch.Tensor:
    """Output of the last layer, (S, hidden), no row seeing another, but for the one that it goes on from.

    recompute: in the backward pass, instead of keeping activations.
    """
    cos, sin = text_rope(model.config.text, batch.position_ids)
    groups, back = row_groups(batch.lengths, batch.parents)
    even = len(groups) == 1 and (batch.lengths == batch.lengths[0]).all()
    packing = Packing(
        [(_tensor(model, group.index), group.first) for group in groups], None if even else _tensor(model, back)
    )
    step = Step(_tensor(model, cos), _tensor(model, sin), 0, 0, model.memory_budget, packing=packing)
    decoder, token_ids = model.network.model.language_model, _tensor(model, batch.token_ids)[None]
    hidden = decoder(token_ids, step, model.new_cache(), visual, run=_recomputed if recompute else straight)
    return hidden[0]


def _encode(model: Model, batch: Batch, recompute: bool, gradient: bool) -> Visual | None:
    """The visual tokens of all rows, frames of one size together whichever row they are of."""
    if batch.pixels is None or batch.grid_thw is None:
        return None
    config, tower = model.config, model.network.model.visual
    # Of a group that is differentiated, the activations of all blocks are held at once.
    budget = model.memory_budget // (config.vision.depth if gradient else 1)
    parts = []
    with torch.set_grad_enabled(gradient):
        for group in frame_groups(config, joined_grids(batch.grid_thw), budget, tower.pos_embed.weight.itemsize):
            patches = _tensor(model, np.asarray(batch.pixels[group.start : group.stop], dtype=np.float32))
            given = patches.reshape(group.frames, group.height * group.width, -1), group.height, group.width, budget
            if recompute and gradient:
                tokens, deepstack = checkpoint(tower, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens, deepstack = tower(*given)
            parts.append([tokens, *deepstack])
        tokens, *deepstack = (torch.cat(arrays) for arrays in zip(*parts, strict=True))
    index = np.flatnonzero(np.isin(batch.token_ids, (config.image_token_id, config.video_token_id)))
    return Visual(_tensor(model, index), tokens, deepstack)


def _recomputed(layer: nn.Module, x: torch.Tensor, step: Step, cache: Cache, index: int) -> torch.Tensor:
    return checkpoint(layer, x, step, cache, index, use_reentrant=False, preserve_rng_state=False)


def _tensor(model: Model, array: np.ndarray) -> torch.Tensor:
    device = model.network.model.language_model.norm.weight.device
    return torch.tensor(np.ascontiguousarray(array), device=device)
