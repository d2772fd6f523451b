"""`iv3 parity` on a terminal: a table of every point for each comparison, plain text when piped."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convert.parity.report import Comparison, Decode, LogitsError, Report


def show(report: Report, console: Console | None = None) -> None:
    """Print a report to stdout, or to the console given."""
    console = console or Console(highlight=False)
    prompt = report.prompt
    source = {"probe": "the built-in clip, image and text", "inputs": "the inputs given"}
    console.print(Text(f"Reference: {report.reference}", style="bold"), soft_wrap=True)
    console.print(
        Text(f"Prompt: {source.get(prompt.source, prompt.source)}; {prompt.tokens:,} tokens, "
             f"{prompt.visual_tokens:,} of them visual"),
        soft_wrap=True,
    )  # fmt: skip
    for comparison in report.comparisons:
        console.print()
        console.print(Text(f"{report.title(comparison.run)}, against the reference", style="bold"), soft_wrap=True)
        console.print()
        console.print(_points(comparison))
        console.print()
        console.print(_verdict(comparison), soft_wrap=True)
        console.print()
        console.print(_summary(comparison))


def _points(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("point", no_wrap=True)
    for column in ("relative L2", "own", "max abs", "cosine"):
        table.add_column(column, justify="right", no_wrap=True)
    suspect = comparison.suspect.point if comparison.suspect else None
    previous = ""
    for point in comparison.points:
        if previous.startswith("visual.") and not point.point.startswith("visual."):
            table.add_section()
        previous = point.point
        marked = point.point == suspect
        table.add_row(
            f"{point.point} <" if marked else point.point,
            _error(point.relative_l2),
            _error(point.own),
            _error(point.max_abs),
            f"{point.cosine:.6f}",
            style="bold red" if marked else "dim" if point.relative_l2 == 0.0 else "",
        )
    return table


def _verdict(comparison: Comparison) -> Text:
    if comparison.suspect:
        return Text(comparison.suspect.sentence, style="red")
    return Text("No point leaves the trend of those before it.", style="green")


def _summary(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("logits", no_wrap=True)
    for column in ("positions", "KL mean", "KL max", "top-1 agree", "perplexity"):
        table.add_column(column, justify="right", no_wrap=True)
    for kind, error in (("text", comparison.text), ("visual", comparison.visual)):
        if error:
            positions = f"{error.compared:,} of {error.positions:,}"
            kl = (_error(error.kl_mean), _error(error.kl_max))
            table.add_row(kind, positions, *kl, f"{error.agreement:.2%}", _perplexity(error))
    table.caption = _decode(comparison.decode)
    table.caption_justify = "left"
    return table


def _perplexity(error: LogitsError) -> str:
    if error.perplexity is None or error.perplexity_difference is None:
        return ""
    return f"{error.perplexity:.5g} ({error.perplexity_difference:+.2g})"


def _decode(decode: Decode) -> str:
    count = len(decode.reference_ids)
    if decode.parted_at is None:
        return f"All {count} greedy tokens are the same."
    return f"The greedy texts part after {decode.parted_at} of {count} tokens."


def _error(value: float) -> str:
    """0 only for what is exactly equal."""
    return "0" if value == 0.0 else f"{value:.1e}" if math.isfinite(value) else "not finite"
