"""A conversion as a picture: what each layer lost, and what its cache holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.parity.plot import COLOURS, check_plotting, save

MOST_LEVEL_LABELS = 12
"""Layers whose ranks can be written side by side."""

__all__ = ["check_plotting", "draw"]


def draw(report: Mapping[str, Any], file: str | Path, title: str) -> None:
    """Write a PNG of the report of a conversion; it is written beside and renamed, so `file` is whole or as it was.

    report: `report` of conversion.json.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    errors, cache = figure.subplots(2, 1, sharex=True)
    layers = report["layers"]
    places = [layer["layer"] for layer in layers]
    for kind, colour in zip(("text", "visual"), COLOURS, strict=False):
        heights = [math.nan if layer["output_error"][kind] is None else layer["output_error"][kind] for layer in layers]
        errors.plot(places, heights, "-o", color=colour, markersize=4, label=f"{kind} positions")
    lost = [max(0.0, 1 - layer["energy"]) for layer in layers]
    errors.plot(places, lost, "--", color=COLOURS[2], linewidth=1.2, label="energy that the latent leaves out")
    errors.set_yscale("symlog", linthresh=1e-4)
    errors.set_ylim(bottom=0)
    errors.set_ylabel("squared error of attention,\nrelative to its output")
    errors.set_title(_headline(report, title), loc="left", fontsize=11)
    errors.legend(frameon=False, fontsize=9)
    ranks = [layer["rank"] for layer in layers]
    rope = [layer["width"] - layer["rank"] for layer in layers]
    cache.bar(places, ranks, color=COLOURS[5], label="latent")
    cache.bar(places, rope, bottom=ranks, color=COLOURS[4], label="RoPE keys")
    for layer in layers:
        text = f"{layer['rank']} + {layer['rope_heads']}"
        where, turn = (layer["layer"], layer["width"]), 90 if len(layers) > MOST_LEVEL_LABELS else 0
        cache.annotate(
            text, where, (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7, rotation=turn
        )
    cache.set_ylabel("numbers a token\n(rank + count of RoPE keys)")
    cache.set_xlabel("layer")
    cache.set_ylim(top=1.35 * max(layer["width"] for layer in layers))
    cache.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    for axes in (errors, cache):
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    save(figure, file)


def _headline(report: Mapping[str, Any], title: str) -> str:
    bytes_of = report["cache_bytes_per_token"]
    measured = [
        f"{kind}: KL {found['kl']:.3g}, top-1 {found['top1']:.1%}" for kind, found in report["model"].items() if found
    ]
    return f"{title}\ncache {bytes_of['source']:,} to {bytes_of['converted']:,} bytes a token   {'; '.join(measured)}"
