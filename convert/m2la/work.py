"""What a conversion to M2LA keeps until it is done: hidden states between two layers, and each finished layer.

Every file is written beside and renamed, in the folder that becomes the checkpoint; a run that is stopped goes on with
the first layer that has no file.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from convert.m2la.moments import HeadMaps, Moments
from convert.m2la.search import Choice
from ivcore.files import write_beside


class Work:
    """hidden: the width of a state; lengths: of the prompts, in order."""

    def __init__(self, folder: Path, hidden: int, lengths: Sequence[int]) -> None:
        self.folder, self.hidden, self.lengths = folder, hidden, list(lengths)

    def has_states(self, layer: int) -> bool:
        return self._states(layer).exists()

    def write_states(self, layers: Sequence[int], states: Iterable[Sequence[np.ndarray]]) -> None:
        """Of every prompt in turn the inputs (S, hidden) of all `layers`."""
        files = [self._states(layer) for layer in layers]
        parts = [file.with_name(f"{file.name}.part") for file in files]
        streams = [part.open("wb") for part in parts]
        try:
            for rows in states:
                for stream, each in zip(streams, rows, strict=True):
                    stream.write(np.ascontiguousarray(each, np.float32).data)
            for stream in streams:
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            for stream in streams:
                stream.close()
        for part, file in zip(parts, files, strict=True):
            os.replace(part, file)

    def states(self, layer: int) -> Iterator[np.ndarray]:
        """The input (S, hidden) of a layer in every prompt, one at a time in memory."""
        start = 0
        for length in self.lengths:
            numbers = np.fromfile(
                self._states(layer), np.float32, count=length * self.hidden, offset=start * self.hidden * 4
            )  # fmt: skip
            yield numbers.reshape(length, self.hidden)
            start += length

    def drop_states(self, layer: int) -> None:
        self._states(layer).unlink(missing_ok=True)

    def has_layer(self, layer: int) -> bool:
        return self._layer(layer).exists()

    def write_layer(
        self, layer: int, moments: Moments, turns: Mapping[int, np.ndarray], choices: Sequence[Choice]
    ) -> None:
        """turns: by number of RoPE keys, as `LayerSearch` has them."""
        arrays = {f"turns_{rope_heads}": each for rope_heads, each in turns.items()}
        arrays |= {"keys_values": moments.keys_values, "queries": moments.queries}
        for name, maps in (("query", moments.query_maps), ("key", moments.key_maps)):
            if maps:
                arrays |= {f"{name}_weight": maps.weight, f"{name}_bias": maps.bias}
        text = json.dumps([choice.to_dict() for choice in choices])
        content = io.BytesIO()
        np.savez(content, choices=np.array(text), **arrays)  # type: ignore[arg-type]
        write_beside(self._layer(layer), content.getvalue())

    def layer(self, layer: int) -> tuple[Moments, dict[int, np.ndarray], list[Choice]]:
        """What `write_layer` has written."""
        with np.load(self._layer(layer)) as arrays:
            maps = [
                HeadMaps(arrays[f"{name}_weight"], arrays[f"{name}_bias"]) if f"{name}_weight" in arrays else None
                for name in ("query", "key")
            ]
            choices = [Choice.from_dict(fields) for fields in json.loads(str(arrays["choices"]))]
            turns = {int(name.removeprefix("turns_")): arrays[name] for name in arrays if name.startswith("turns_")}
            return Moments(arrays["keys_values"], arrays["queries"], *maps), turns, choices

    def sensitivities(self) -> list[float] | None:
        """What `write_sensitivities` has written."""
        file = self.folder / "m2la-sensitivities.json"
        return list(json.loads(file.read_text())) if file.exists() else None

    def write_sensitivities(self, values: Sequence[float]) -> None:
        write_beside(self.folder / "m2la-sensitivities.json", json.dumps(list(values)).encode())

    def begun(self) -> bool:
        """Whether there is anything that a later run can use."""
        return any(self.folder.glob("m2la-*.npz"))

    def clear(self) -> None:
        for file in self.folder.glob("m2la-*"):
            file.unlink()

    def _states(self, layer: int) -> Path:
        return self.folder / f"m2la-states-{layer:03d}.f32"

    def _layer(self, layer: int) -> Path:
        return self.folder / f"m2la-layer-{layer:03d}.npz"
