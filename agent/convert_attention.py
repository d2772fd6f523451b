"""`iv3 convert --attention m2la`: prompts, progress and the report on the terminal; `convert.m2la` does the work."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agent.calibration import mixture
from agent.display import Display
from agent.units import human_bytes
from convert.m2la.files import prompts_of_files
from convert.m2la.options import Options
from convert.m2la.plan import AttentionPlan, outline
from convert.m2la.plot import check_plotting, draw
from convert.m2la.run import convert_attention as convert_checkpoint
from convert.place import Place
from convert.record import RECORD
from convert.source import open_source

SAMPLES = 64


def convert_attention(
    source: str,
    target: str,
    options: Options,
    *,
    calibrate: Sequence[str],
    samples: int | None,
    backend: str,
    shard_bytes: int,
    plot: str | None,
    dry_run: bool,
    resume: bool,
    force: bool,
) -> None:
    """Convert, with progress on stderr and a row a layer on stdout; with `dry_run` only say what would be done.

    calibrate: files, of which every fifth prompt is kept to measure on; where there are none, `samples` built-in ones.
    """
    if plot:
        check_plotting(plot)
    opened = open_source(source)
    plan = outline(opened, options)
    if dry_run:
        _print_outline(plan)
        return
    try:
        with Display() as display:
            display.show("reading what to calibrate with", 0, 1)
            if calibrate:
                prompts, held_out = prompts_of_files(opened.path, calibrate), None
            else:
                prompts, held_out = mixture(opened.path, samples or SAMPLES)
            display.show("reading what to calibrate with", 1, 1)
            record = convert_checkpoint(
                source, target, options, prompts, held_out,
                backend=backend, shard_bytes=shard_bytes, resume=resume, force=force, on_progress=display.show,
            )  # fmt: skip
    except KeyboardInterrupt:
        if (part := Place(target).part).exists():
            print(f"iv3: the layers that were finished are in {part}; --resume goes on from them.", file=sys.stderr)
        raise
    _print_report(target, record.report)
    if plot:
        draw(record.report, plot, Path(target).name)


def _print_outline(plan: AttentionPlan) -> None:
    text = plan.source.config.text
    before, after = plan.cache_bytes()
    print(
        f"{text.num_hidden_layers} layers, {text.num_key_value_heads} key heads of {text.head_dim}: "
        f"{text.geometry.gqa_cache_width} numbers a token and layer become {plan.width}"
        f"{' on average' if plan.spends else ''}, {human_bytes(before)} a token {human_bytes(after)}.\n"
        f"{human_bytes(plan.nbytes)} of weights in the {plan.options.layout} layout; nothing was written (--dry-run)."
    )


def _print_report(target: str, report: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "rank", "RoPE keys", "energy kept", "error at text", "at visual positions"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in report["layers"]:
        errors = ["-" if error is None else f"{error:.2%}" for error in layer["output_error"].values()]
        table.add_row(
            str(layer["layer"]), str(layer["rank"]), str(layer["rope_heads"]), f"{layer['energy']:.2%}", *errors
        )
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    cache = report["cache_bytes_per_token"]
    print(f"Cache: {human_bytes(cache['source'])} a token became {human_bytes(cache['converted'])}.")
    for kind, found in report["model"].items():
        if found:
            print(
                f"Held out, {kind} positions: KL {found['kl']:.3g} nats, the likeliest token is the same at "
                f"{found['top1']:.1%} of {found['positions']:,}."
            )
    print(f"{target}: all of it is in {RECORD}.")
