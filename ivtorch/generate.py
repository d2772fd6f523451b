"""Running the network: vision encoding in groups, chunked prefill under a memory budget, decode, generate.

Notable:
- The vision tower runs just ahead of the chunk that needs its tokens: neither pixels in float nor features of the
  whole video are ever in memory together.
- A cache that already holds tokens is continued: a second question pays for its own tokens only.
- Sampling is `ivcore.sampling`, so a seed gives the same answer on both backends wherever their logits agree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch

from ivcore.allocator import peak_resident_bytes
from ivcore.config import ModelConfig
from ivcore.errors import BackendError
from ivcore.inputs import ModelInputs, check_pixels, check_token_ids
from ivcore.positions import position_ids
from ivcore.rotary import text_rope
from ivcore.sampling import Sampler, Sampling
from ivcore.schedule import DEFAULT_MEMORY_BUDGET, chunk_size, frame_groups
from ivcore.vision import Patches
from ivtorch.attention import Form, Step
from ivtorch.cache import Cache
from ivtorch.model import Network, Visual
from ivtorch.vision import Observe, unobserved

Progress = Callable[[str, int, int], None]
Observer = Callable[[str, np.ndarray], np.ndarray | None]
HEAD_ROWS = 256
"""Tokens whose logits are made at a time: of a vocabulary of 152k, 150 MB in float32."""


class Model:
    """A loaded checkpoint: what `load` returns. Arrays at this seam are NumPy, float32.

    memory_budget: bytes of working memory, above weights and cache, that vision encoding and prefill plan for.
    stop_ids: token ids at which `generate` ends.
    """

    backend = "torch"

    def __init__(self, network: Network, config: ModelConfig, dtype: str, stop_ids: Collection[int] = ()) -> None:
        self.network = network
        self.config = config
        self.dtype = dtype
        self.stop_ids = frozenset(stop_ids)
        self.memory_budget = DEFAULT_MEMORY_BUDGET
        self.form: Form = "auto"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(array.nbytes for array in self.network.parameters())

    def peak_bytes(self) -> int:
        """The most bytes held so far: on CUDA by PyTorch's allocator; on a CPU, where that does not count, by the whole
        process (its peak resident size)."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return peak_resident_bytes()

    def new_cache(self) -> Cache:
        """An empty cache."""
        return Cache(self.config.text)

    @torch.inference_mode()
    def encode_vision(
        self, pixels: np.ndarray | Patches, grid_thw: np.ndarray, observe: Observer | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """pixels (P, patch_dim), grid_thw (N, 3) -> embeddings (T, hidden), DeepStack features (n, T, hidden).

        Holds the features of the whole video; `encode_groups` gives them piece by piece, as prefill uses them.
        """
        check_pixels(pixels, grid_thw, self.config)
        vision = self.config.vision
        count = int(np.prod(grid_thw, axis=1).sum()) // vision.spatial_merge_size**2
        embeds = np.empty((count, vision.out_hidden_size), np.float32)
        features = np.empty((len(vision.deepstack_visual_indexes), *embeds.shape), np.float32)
        start = 0
        for tokens, deepstack in self.encode_groups(pixels, grid_thw, observe):
            stop = start + tokens.shape[0]
            embeds[start:stop] = _numpy(tokens)
            for place, feature in enumerate(deepstack):
                features[place, start:stop] = _numpy(feature)
            start = stop
        return embeds, features

    @torch.inference_mode()
    def encode_groups(
        self, pixels: np.ndarray | Patches, grid_thw: np.ndarray, observe: Observer | None = None
    ) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Tokens (T, hidden) and DeepStack features of one group of frames after the other, in the backend's arrays."""
        watch = self._watch(observe)
        for group in frame_groups(self.config, grid_thw, self.memory_budget, self._itemsize):
            patches = self._tensor(np.asarray(pixels[group.start : group.stop], dtype=np.float32))
            patches = patches.reshape(group.frames, group.height * group.width, -1)
            tokens, deepstack = self.network.model.visual(patches, group.height, group.width, self.memory_budget, watch)
            yield tokens, deepstack
            del patches, tokens, deepstack  # or they would lie beside the next group's activations

    @torch.inference_mode()
    def logits(
        self, inputs: ModelInputs, observe: Observer | None = None, positions: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits of every position, (S, vocab), or of `positions` (K,) alone, (K, vocab).

        observe(name, rows) sees the activations of both towers, portion by portion, rows (patches or tokens, width);
        an array that it gives back takes the place of the activation for all that follows. Names, in causal order:
        `visual.patch_embed` (with position embeddings), `visual.blocks.i`, `visual.deepstack_merger_list.j`,
        `visual.merger`, `embeddings`, `layers.i` (before DeepStack adds to it), `norm`, `logits`.
        """
        count = len(inputs.token_ids)
        places = np.arange(count) if positions is None else np.asarray(positions)
        if not np.isin(places, np.arange(count)).all():
            raise BackendError(f"positions must lie in the prompt, 0 to {count - 1}.")
        out = np.empty((len(places), self.config.text.vocab_size), np.float32)
        watch = self._watch(observe)
        start = 0
        for hidden in self._run(inputs, self.new_cache(), None, None, observe):
            normed = watch("norm", self.network.model.language_model.norm(hidden))[0]
            inside = np.flatnonzero((start <= places) & (places < start + len(normed)))
            for first in range(0, len(inside), HEAD_ROWS):
                block = inside[first : first + HEAD_ROWS]
                out[block] = _numpy(watch("logits", self.network.head(normed[self._tensor(places[block] - start)])))
            start += len(normed)
        return out

    @torch.inference_mode()
    def prefill(
        self, inputs: ModelInputs, cache: Cache, *, chunk: int | None = None, on_progress: Progress | None = None
    ) -> np.ndarray:
        """Append a prompt to the cache; returns the logits (vocab,) after its last token.

        chunk: tokens at a time; None lets the memory budget decide. on_progress(phase, done, total) counts the tokens
        of the phases "encode" and "prefill".
        """
        for hidden in self._run(inputs, cache, chunk, on_progress, None):
            last = hidden[:, -1]
        return _numpy(self.network.logits(last)[0])

    def decode(self, token_id: int, cache: Cache) -> np.ndarray:
        """Append one text token to the cache; returns the logits (vocab,) after it."""
        return self._decode_rows([token_id], cache)[0]

    def generate(
        self,
        inputs: ModelInputs,
        *,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        cache: Cache | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[int]:
        """Token ids as they are picked; the last is a stop id unless `max_tokens` or the context ended it.

        Closing the iterator stops. With a `cache` of the caller's, all ids but the last one are in it afterwards.
        """
        cache = cache if cache is not None else self.new_cache()
        logits = self.prefill(inputs, cache, on_progress=on_progress)
        yield from self.continue_from(logits, cache, max_tokens=max_tokens, sampling=sampling)

    def continue_from(
        self, logits: np.ndarray, cache: Cache, *, max_tokens: int = 512, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """As `generate`, from the logits (vocab,) that a prefill gave and its cache, or a fork of it."""
        sampler = Sampler(sampling)
        generated: list[int] = []
        while len(generated) < max_tokens:
            generated.append(sampler(logits, generated))
            yield generated[-1]
            full = cache.length >= self.config.text.max_position_embeddings
            if generated[-1] in self.stop_ids or len(generated) == max_tokens or full:
                return
            logits = self.decode(generated[-1], cache)

    def continue_each(
        self, logits: np.ndarray, cache: Cache, samplings: Sequence[Sampling], *, max_tokens: int = 512
    ) -> list[list[int]]:
        """Of several answers after one prompt, each what `continue_from` gives with its sampling, but for rounding.

        They are decoded side by side, as many as their copies of the cache leave in the memory budget.
        """
        most = max(1, self.memory_budget // max(1, cache.nbytes))
        answers: list[list[int]] = []
        for start in range(0, len(samplings), most):
            answers += self._side_by_side(logits, cache, samplings[start : start + most], max_tokens)
        return answers

    def _side_by_side(
        self, logits: np.ndarray, cache: Cache, samplings: Sequence[Sampling], max_tokens: int
    ) -> list[list[int]]:
        samplers, answers = [Sampler(each) for each in samplings], [list[int]() for _ in samplings]
        held = list(range(len(samplings)))  # the answer that each row of the cache is of
        going = list(range(len(held)))  # the rows whose answers have not ended
        wide, scores = cache.fork(len(held)), np.tile(logits, (len(held), 1))
        for number in range(max_tokens):
            if number:
                if 2 * len(going) <= len(held):  # else those that have ended are carried along
                    wide.keep(going)
                    held, going = [held[row] for row in going], list(range(len(going)))
                scores = self._decode_rows([answers[index][-1] for index in held], wide)
            for row in going:
                answers[held[row]].append(samplers[held[row]](scores[row], answers[held[row]]))
            going = [row for row in going if answers[held[row]][-1] not in self.stop_ids]
            if not going or wide.length >= self.config.text.max_position_embeddings:
                break
        return answers

    @torch.inference_mode()
    def _decode_rows(self, token_ids: Sequence[int], cache: Cache) -> np.ndarray:
        """Append one text token to every row of the cache; returns the logits (rows, vocab) after them."""
        rows = np.array(token_ids)
        check_token_ids(rows, self.config)
        positions = np.full((3, 1), cache.next_position, dtype=np.int32)
        hidden = self._chunk(rows[:, None], positions, cache, None, None)
        return _numpy(self.network.logits(hidden[:, -1]))

    def _run(
        self,
        inputs: ModelInputs,
        cache: Cache,
        chunk: int | None,
        on_progress: Progress | None,
        observe: Observer | None,
    ) -> Iterator[torch.Tensor]:
        """Append a prompt chunk by chunk; yields each chunk's output of the last layer, (1, S, hidden)."""
        config, token_ids = self.config, np.asarray(inputs.token_ids)
        inputs.check(config, held=cache.length)
        if chunk is not None and chunk < 1:
            raise BackendError(f"A chunk of {chunk} tokens cannot be read; it takes at least one.")
        is_visual = np.isin(token_ids, (config.image_token_id, config.video_token_id))
        positions = inputs.position_ids
        if positions is None:
            positions = position_ids(
                token_ids,
                inputs.grid_thw,
                image_token_id=config.image_token_id,
                video_token_id=config.video_token_id,
                merge_size=config.vision.spatial_merge_size,
                start=cache.next_position,
            )
        features = self._feature_stream(inputs, int(is_visual.sum()), on_progress, observe)
        cache.reserve(len(token_ids))
        size = chunk or chunk_size(config.text, self.memory_budget, self._itemsize)
        for start in range(0, len(token_ids), size):
            stop = min(start + size, len(token_ids))
            index = np.flatnonzero(is_visual[start:stop])
            visual = features(index) if len(index) else None
            yield self._chunk(token_ids[None, start:stop], positions[:, start:stop], cache, visual, observe)
            if on_progress:
                on_progress("prefill", stop, len(token_ids))

    def _chunk(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        cache: Cache,
        visual: Visual | None,
        observe: Observer | None,
    ) -> torch.Tensor:
        """Append tokens (B, S), all at the same positions (3, S), to the cache's rows; the last layer's output."""
        cos, sin = text_rope(self.config.text, positions)
        step = Step(
            self._tensor(cos), self._tensor(sin), cache.length, cache.room, self.memory_budget, self.form
        )  # fmt: skip
        watch = self._watch(observe)
        hidden = self.network.model.language_model(self._tensor(token_ids), step, cache, visual, watch)
        cache.commit(positions)
        return hidden

    def _feature_stream(
        self, inputs: ModelInputs, visual_tokens: int, on_progress: Progress | None, observe: Observer | None
    ) -> Callable[[np.ndarray], Visual]:
        """A function that gives the next visual tokens for the places `index` of a chunk, encoding as it goes."""
        groups: Iterator[tuple[torch.Tensor, list[torch.Tensor]]] = iter(())
        if inputs.pixels is not None and inputs.grid_thw is not None:
            groups = self.encode_groups(inputs.pixels, inputs.grid_thw, observe)
        held: list[torch.Tensor] = []
        encoded = 0

        def take(index: np.ndarray) -> Visual:
            nonlocal held, encoded
            while not held or held[0].shape[0] < len(index):
                group = next(groups, None)
                if group is None:
                    raise BackendError("The prompt holds more visual tokens than its pixels make.")
                new = [group[0], *group[1]]
                held = [torch.cat(pair) for pair in zip(held, new, strict=True)] if held else new
                encoded += new[0].shape[0]
                if on_progress:
                    on_progress("encode", encoded, visual_tokens)
            tokens, *deepstack = (array[: len(index)] for array in held)
            held = [array[len(index) :] for array in held]
            return Visual(self._tensor(index), tokens, deepstack)

        return take

    def _watch(self, observe: Observer | None) -> Observe:
        """The network's observer that an observer of NumPy rows makes."""
        if observe is None:
            return unobserved

        def watch(name: str, activation: torch.Tensor) -> torch.Tensor:
            seen = observe(name, _numpy(activation).reshape(-1, activation.shape[-1]))
            return activation if seen is None else self._tensor(seen).to(activation.dtype).reshape(activation.shape)

        return watch

    @property
    def _itemsize(self) -> int:
        return self.network.model.language_model.norm.weight.itemsize

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.network.model.language_model.norm.weight.device)


def _numpy(array: torch.Tensor) -> np.ndarray:
    return array.float().cpu().numpy()
