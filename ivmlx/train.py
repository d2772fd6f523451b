"""The step of training: the gradient of a loss on a packed batch, gathered over batches, and AdamW.

Notable:
- The modules, weights and names are those of inference: after a step, the model generates with the new weights.
- Projections run over all tokens of a batch at once; attention stays within a row, and the head and the loss see only
  the places with a weight, in blocks under the memory budget.
- What is trained has float32 masters where the network computes in bfloat16; gradients are gathered in float32.
- No random state outlives a step: a dropout mask follows from the seed and the number of the batch among those of all
  processes.
- Of several processes each gathers the gradient of its own batches; `apply` sums them. Each has all weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten, tree_unflatten

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
    OptimizerSettings,
    head_block,
    joined_grids,
    parameter_groups,
)
from ivmlx.attention import Packing, Step
from ivmlx.cache import Cache
from ivmlx.generate import Model
from ivmlx.lora import add_lora, loras
from ivmlx.losses import Statistics, weighted_loss
from ivmlx.model import Visual, straight
from ivmlx.processes import Processes

STORED = {"float32": "F32", "bfloat16": "BF16"}
FACTORS = (".lora_A.weight", ".lora_B.weight")
Arrays = dict[str, mx.array]


class Trainer:
    """Trains a loaded model in place: a LoRA, or with `lora` None all of it.

    An adapter that `load_adapter` has put on the model is trained on. checkpointing: recompute each decoder layer and
    group of frames in the backward pass instead of keeping their activations. seed: of LoRA's first factors and of the
    dropout masks. trainable: name -> shape, named as in the checkpoint, or `<module>.lora_A.weight` and `lora_B`.
    processes: with whom the step is shared; all of them must call the same methods in the same order, `logprobs` and
    `accumulate` apart.

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
        if mx.default_device() == mx.cpu:
            keep_freed_blocks()
        if lora is not None:
            add_lora(network, lora, seed)
        elif loras(network):
            raise TrainingError("The model has an adapter; merge it before training all weights.")
        elif model.config.quantization is not None:
            raise TrainingError("Packed weights cannot be trained; train a LoRA on them, or convert them to a float.")
        self._loras = list(loras(network).values())
        parameters: Arrays = dict(tree_flatten(network.parameters()))
        names = [name for name in parameters if lora is None or name.endswith(FACTORS)]
        self._groups = parameter_groups({name: parameters[name].shape for name in names}, optimizer)
        self._parameters = {name: parameters[name] for group in self._groups for name in group.names}
        self.trainable = {name: parameter.shape for name, parameter in self._parameters.items()}
        self._vision = any(name.startswith("model.visual.") for name in self.trainable)
        network.freeze()
        modules = dict(network.named_modules())
        for name in self.trainable:
            module, _, key = name.rpartition(".")
            modules[module].unfreeze(keys=[key], recurse=False)
        self._masters = {name: parameter.astype(mx.float32) for name, parameter in self._parameters.items()}
        self._start = dict(self._masters) if lora else {}
        self._gradients: Arrays = {}
        self._optimizers = [
            AdamW(0.0, list(optimizer.betas), optimizer.eps, group.weight_decay, bias_correction=True)
            for group in self._groups
        ]
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
        frozen = None if self._vision else _encode(self.model, batch, False, False)

        def loss_of(weights: Arrays) -> tuple[mx.array, Statistics]:
            self._put(weights)
            return self._loss(batch, loss, frozen)

        try:
            (total, statistics), gradients = mx.value_and_grad(loss_of)(self._parameters)
            for name, gradient in gradients.items():
                held = self._gradients.get(name)
                gradient = gradient.astype(mx.float32)
                self._gradients[name] = gradient if held is None else held + gradient
            mx.eval(total, statistics, self._gradients)
        finally:
            for layer in self._loras:
                layer.mask_seed = None
            # Without this the network would keep the arrays of the trace, and all that they were made from.
            self._put(self._parameters)
        return {name: float(np.array(value)) for name, value in {"loss": total, **statistics}.items()}

    def take_part(self) -> None:
        """Have no batch, where others have one more: nothing to do, since every process has all weights."""

    def unsharded(self) -> AbstractContextManager[None]:
        """Within, the model may be used as it likes by each process, and `logprobs` and `tensors` may be called."""
        return nullcontext()

    def apply(self, learning_rate: float, max_norm: float | None) -> float:
        """Take AdamW's step with the gradient gathered, clipped to `max_norm`, and clear it; returns its norm before.

        The gradient is that of all processes together. Raises TrainingError, the weights unchanged, where the norm is
        not finite.
        """
        self._draws[1] = max(self.processes.gather(int(self._draws[1])))
        gradients = self.processes.sum({name: self._gradient(name) for name in self.trainable})
        norm = math.sqrt(float(np.array(sum((each.square().sum() for each in gradients.values()), mx.array(0.0)))))
        norm = self.processes.gather(norm)[0]
        self._gradients = {}
        if not math.isfinite(norm):
            raise TrainingError(f"The gradient's norm is {norm}; the step was not taken. Try a lower learning rate.")
        shrink = 1.0 if max_norm is None else min(1.0, max_norm / max(norm, 1e-12))
        for optimizer, group in zip(self._optimizers, self._groups, strict=True):
            optimizer.learning_rate = learning_rate * group.multiplier
            shrunk = {name: gradients[name] * shrink if shrink < 1 else gradients[name] for name in group.names}
            self._masters |= optimizer.apply_gradients(shrunk, self._masters)
        self._steps += 1
        self._use(self._masters)
        mx.eval([optimizer.state for optimizer in self._optimizers])
        return norm

    def gradients(self) -> dict[str, np.ndarray]:
        """The gradient gathered, float32, by the names of `trainable`; this process's own."""
        return {name: np.array(self._gradient(name)) for name in self.trainable}

    def set_gradients(self, gradients: dict[str, np.ndarray]) -> None:
        """Put a gradient in place of the one gathered."""
        self._gradients = {name: mx.array(gradients[name]) for name in self.trainable}

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
        self._use(self._start)
        try:
            return (token_logprobs_full if full else logprobs)(self.model, batch)
        finally:
            self._use(self._masters)

    def state(self) -> dict[str, np.ndarray]:
        """All that a new Trainer of the same settings needs to go on from here; gradients gathered are not part.

        It does not depend on how many processes there are; only process 0 has it, for the others it is empty.
        """
        if self.processes.rank:
            return {}
        state = {"steps": np.array(self._steps), "draws": self._draws.copy()}
        for optimizer, group in zip(self._optimizers, self._groups, strict=True):
            for name in group.names:
                master = self._masters[name]
                moments = optimizer.state.get(name) or {key: mx.zeros_like(master) for key in ("m", "v")}
                arrays = {"weight": master, "mean": moments["m"], "square": moments["v"]}
                state |= {f"{key}.{name}": np.array(array) for key, array in arrays.items()}
        return state

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
        for optimizer, group in zip(self._optimizers, self._groups, strict=True):
            optimizer.state = {"step": mx.array(self._steps, mx.uint64), "learning_rate": mx.array(0.0)}
            for name in group.names:
                self._masters[name], mean, square = (
                    mx.array(self.processes.broadcast(state.get(f"{key}.{name}"), self.trainable[name]))
                    for key in ("weight", "mean", "square")
                )
                optimizer.state[name] = {"m": mean, "v": square}
        self._use(self._masters)

    def save_adapter(self, path: str | Path) -> None:
        """Write the LoRA as a folder in PEFT's form; CheckpointError when it cannot be written."""
        if self.lora is None:
            raise TrainingError("All weights are trained, so there is no adapter to save.")
        factors = {
            name: (np.array(layer.lora_A.weight), np.array(layer.lora_B.weight))
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
        parameters: Arrays = dict(tree_flatten(self.model.network.parameters()))
        for name, spec in self.specs().items():
            yield name, narrow(np.array(parameters[name].astype(mx.float32)), spec.dtype)

    def _loss(self, batch: Batch, loss: Loss, frozen: Visual | None) -> tuple[mx.array, Statistics]:
        """frozen: the visual tokens, where the vision tower is not trained."""
        model, places = self.model, batch.places
        rows, targets, weights = loss.rows(places), batch.targets[places], batch.weights[places]
        visual = _encode(model, batch, self.checkpointing, True) if self._vision else frozen
        hidden = hidden_states(model, batch, visual, recompute=self.checkpointing)
        hidden = hidden[mx.array(places)]
        block = head_block(model.config.text.vocab_size, model.memory_budget)
        decoder = model.network.model.language_model
        head = model.network.lm_head if "lm_head" in model.network else decoder.embed_tokens

        total = mx.array(0.0)
        statistics: Statistics = {}
        for start in range(0, len(places), block):
            at = slice(start, start + block)

            def part(hidden: mx.array, at: slice = at) -> tuple[mx.array, Statistics]:
                given = {name: mx.array(array[at]) for name, array in rows.items()}
                scores = model.network.logits(hidden)
                return weighted_loss(loss, scores, mx.array(targets[at]), mx.array(weights[at]), given)

            run = part if len(places) <= block else _again([decoder.norm, head], part)
            value, sums = run(hidden[at])
            total = total + value
            statistics = {name: statistics.get(name, 0) + each for name, each in sums.items()}
        return total, statistics

    def _gradient(self, name: str) -> mx.array:
        held = self._gradients.get(name)
        return mx.zeros_like(self._masters[name]) if held is None else held

    def _use(self, weights: Arrays) -> None:
        """Let the network compute with these weights."""
        self._parameters = {name: weights[name].astype(each.dtype) for name, each in self._parameters.items()}
        mx.eval(self._parameters)
        self._put(self._parameters)

    def _put(self, parameters: Arrays) -> None:
        self.model.network.update(tree_unflatten(list(parameters.items())))


def logprobs(model: Model, batch: Batch) -> np.ndarray:
    """Log-probabilities of the targets, float32 (S,), without a gradient; 0 where the weight is 0."""
    places, out = batch.places, np.zeros(len(batch.token_ids), np.float32)
    for at, scores in _scores(model, batch):
        targets = mx.array(batch.targets[places[at]])[:, None]
        out[places[at]] = np.array(mx.take_along_axis(scores, targets, axis=-1)[:, 0])
    return out


def token_logprobs_full(model: Model, batch: Batch) -> np.ndarray:
    """Log-probabilities of the whole vocabulary at the K places with a weight, float32 (K, vocab)."""
    out = np.empty((len(batch.places), model.config.text.vocab_size), np.float32)
    for at, scores in _scores(model, batch):
        out[at] = np.array(scores)
    return out


def _scores(model: Model, batch: Batch) -> Iterator[tuple[slice, mx.array]]:
    """Log-probabilities (k, vocab) of block after block of the places with a weight."""
    batch.check(model.config)
    hidden, places = hidden_states(model, batch, _encode(model, batch, False, False)), batch.places
    block = head_block(model.config.text.vocab_size, model.memory_budget)
    for start in range(0, len(places), block):
        at = slice(start, start + block)
        scores = model.network.logits(hidden[mx.array(places[at])])
        yield at, nn.log_softmax(scores, axis=-1)


def hidden_states(model: Model, batch: Batch, visual: Visual | None, *, recompute: bool = False) -> mx.array:
    """Output of the last layer, (S, hidden), no row seeing another, but for the one that it goes on from.

    recompute: in the backward pass, instead of keeping activations.
    """
    cos, sin = text_rope(model.config.text, batch.position_ids)
    groups, back = row_groups(batch.lengths, batch.parents)
    even = len(groups) == 1 and (batch.lengths == batch.lengths[0]).all()
    indices = [(mx.array(group.index), group.first) for group in groups]
    packing = Packing(indices, None if even else mx.array(back))
    step = Step(mx.array(cos), mx.array(sin), 0, 0, model.memory_budget, packing=packing)
    decoder, token_ids = model.network.model.language_model, mx.array(batch.token_ids)[None]
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
    for group in frame_groups(config, joined_grids(batch.grid_thw), budget, tower.pos_embed.weight.itemsize):
        patches = mx.array(np.asarray(batch.pixels[group.start : group.stop], dtype=np.float32))
        patches = patches.reshape(group.frames, group.height * group.width, -1)

        def part(patches: mx.array, height: int = group.height, width: int = group.width) -> Any:
            return tower(patches, height, width, budget)

        tokens, deepstack = (_again([tower], part) if recompute and gradient else part)(patches)
        if not gradient:
            mx.eval(tokens, deepstack)
        parts.append([tokens, *deepstack])
    tokens, *deepstack = (mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))
    index = np.flatnonzero(np.isin(batch.token_ids, (config.image_token_id, config.video_token_id)))
    return Visual(mx.array(index), tokens, deepstack)


def _recomputed(layer: nn.Module, x: mx.array, step: Step, cache: Cache, index: int) -> mx.array:
    return _again([layer], lambda x: layer(x, step, cache, index))(x)


def _again(modules: list[nn.Module], function: Callable[[mx.array], Any]) -> Callable[[mx.array], Any]:
    """A function that is gone through again in the backward pass; modules: those whose weights it uses."""

    def with_weights(weights: list[dict[str, Any]], x: mx.array) -> Any:
        for module, own in zip(modules, weights, strict=True):
            module.update(own)
        return function(x)

    again = mx.checkpoint(with_weights)
    return lambda x: again([module.trainable_parameters() for module in modules], x)
