"""The shards of a converted checkpoint: what stays is copied, a layer's attention is made when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convert.m2la.layouts import Tensors, converted_config, norm_tensors, release_tensors
from convert.m2la.plan import AttentionPlan, tensor_specs
from convert.m2la.search import Choice, LayerSearch
from convert.m2la.weights import LayerWeights
from convert.m2la.work import Work
from convert.record import Journal, ShardRecord, sha256_of
from convert.writer import ShardWriter
from ivcore.errors import CheckpointError
from ivcore.floats import cast, finite, narrow
from ivcore.geometry import LAYER_PREFIX
from ivcore.shards import TensorSpec, shard_names, split

BLOCK_BYTES = 8 * 2**20

Progress = Callable[[str, int, int], None]


class Writer:
    """config: config.json's content; shards: file name -> its tensors."""

    def __init__(self, plan: AttentionPlan, work: Work, chosen: Sequence[Choice], journal: Journal) -> None:
        self.plan, self.work, self.chosen, self.journal = plan, work, list(chosen), journal
        ranks, rope_heads = [choice.rank for choice in chosen], [choice.rope_heads for choice in chosen]
        self.config = converted_config(plan.source.config, plan.options.layout, ranks, rope_heads)
        specs = tensor_specs(plan.source, self.config)
        names = split({name: spec.nbytes for name, spec in specs.items()}, plan.shard_bytes)
        self.shards = {
            file: {name: specs[name] for name in group}
            for file, group in zip(shard_names(len(names)), names, strict=True)
        }
        self._layer: tuple[int, Tensors] = (-1, {})

    def run(self, on_progress: Progress | None) -> None:
        """Write the shards that the journal has not, then hash the source's.

        Raises CheckpointError for NaN, infinity and values beyond the dtype, or OSError.
        """
        total = sum(spec.nbytes for shard in self.shards.values() for spec in shard.values())
        done = 0
        for file, specs in self.shards.items():
            if file not in self.journal.shards:
                writer = ShardWriter(self.work.folder / file, specs)
                try:
                    for name, spec in specs.items():
                        self._write(writer, name, spec)
                        done += spec.nbytes
                        if on_progress:
                            on_progress("writing", done, total)
                    self.journal.add_shard(file, writer.finish())
                finally:
                    writer.abandon()
        for shard in self.plan.source.shards:
            if shard.name not in self.journal.sources:
                size = self.plan.source.stats[shard].st_size
                self.journal.add_source(shard.name, ShardRecord(sha256_of(shard), size))

    def _write(self, writer: ShardWriter, name: str, spec: TensorSpec) -> None:
        made = self._made(name)
        if made is not None:
            stored = narrow(np.ascontiguousarray(made, np.float32), spec.dtype)
            self._check(stored, name, spec.dtype)
            writer.add({name: spec}, (stored,), last=True)
            return
        source = self.plan.source.checkpoint
        kept, dtype = source.read(name), source.specs[name].dtype
        rows = max(BLOCK_BYTES // max(spec.nbytes // spec.shape[0], 1), 1)
        for start in range(0, spec.shape[0], rows):
            stored = cast(np.array(kept[start : start + rows]), dtype, spec.dtype)
            self._check(stored, name, spec.dtype)
            writer.add({name: spec}, (stored,), last=start + rows >= spec.shape[0])

    def _check(self, stored: np.ndarray, name: str, dtype: str) -> None:
        if not finite(stored, dtype):
            raise CheckpointError(
                f"{self.plan.source.path}: {name} would hold NaN, infinity or values beyond its dtype; check the "
                "source with iv3 verify, or convert it to --dtype fp32 first."
            )

    def _made(self, name: str) -> np.ndarray | None:
        """A tensor that the conversion makes, float64; None for one that stays as it is."""
        before, found, own = name.partition("self_attn.")
        if not found:
            return None
        layer = int(before.removesuffix(".").rpartition(".")[2])
        if layer != self._layer[0]:
            self._layer = (layer, self._solve(layer))
        return self._layer[1].get(own)

    def _solve(self, layer: int) -> Tensors:
        plan, choice = self.plan, self.chosen[layer]
        weights = LayerWeights.read(plan.source.checkpoint, plan.source.config.text, layer)
        moments, turns, _ = self.work.layer(layer)
        search = LayerSearch(weights, moments, [], plan.options.method, turns)
        joint = search.problem(choice.rope_heads).solve(choice.balance)
        if plan.options.layout == "norm":
            return norm_tensors(weights, search.rotation, joint, choice.rank)
        return release_tensors(weights, moments, search.rotation, joint, choice.rank)


def layer_report(layer: int, choice: Choice, sensitivity: float) -> dict[str, Any]:
    """A layer's entry in conversion.json; NaN, of a kind of token that there is none of, becomes None."""
    error = {kind: value if np.isfinite(value) else None
             for kind, value in (("text", choice.error.text), ("visual", choice.error.visual))}  # fmt: skip
    return {
        "layer": layer, "rope_heads": choice.rope_heads, "rank": choice.rank, "width": choice.width,
        "balance": choice.balance, "energy": choice.energy, "output_error": error,
        "sensitivity": sensitivity,
    }  # fmt: skip


assert LAYER_PREFIX.endswith("{layer}.")  # what `_made` takes a layer's number from
