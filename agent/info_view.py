"""`iv3 info` on a terminal: the report's numbers in words and tables, within 80 columns, plain text when piped."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.info import Report
from agent.machine import Memory
from agent.units import human_bytes
from ivcore.config import ModelConfig
from ivcore.geometry import AttentionGeometry

BACKENDS = {
    "mlx": "with MLX",
    "torch": "with PyTorch",
    None: "once a backend is installed: pip install 'ivmlx[mlx]' or 'ivmlx[torch]'",
}
FIT_STYLE = {"fits": "green", "tight": "yellow", "too large": "red"}


def show(report: Report, console: Console | None = None) -> None:
    """Print a report to stdout, or to the console given."""
    console = console or Console(highlight=False)
    console.print(Text(report.title, style="bold"))
    # A path is to be copied, so it is never broken.
    console.print(Text(report.model), soft_wrap=True)
    console.print()
    console.print(_facts(report))
    console.print()
    console.print(_weights(report))
    if report.cache:
        console.print()
        console.print(_cache(report))
        console.print()
        console.print(_contexts(report))
        console.print(Text(f"here: {_memories(report.memories)}", style="dim"))
    if report.verdict:
        console.print()
        console.print(Text(f"{report.verdict[0].upper()}{report.verdict[1:]}"))


def architecture(config: ModelConfig) -> dict[str, str]:
    """What the network is, aspect by aspect, in words."""
    text, vision = config.text, config.vision
    rope, geometry = text.rope_scaling, text.geometry
    merge, patch, deepstack = vision.spatial_merge_size, vision.patch_size, vision.deepstack_visual_indexes
    words = {
        "decoder": f"{text.num_hidden_layers} layers of width {text.hidden_size}, MLP {text.intermediate_size}, "
        f"vocabulary {text.vocab_size}",
        **_attention(geometry),
        "rope": f"interleaved M-RoPE, time/height/width {'/'.join(map(str, rope.mrope_section))}, "
        f"theta {rope.rope_theta:,.0f}",
        "vision": f"{vision.depth} blocks of width {vision.hidden_size}, {vision.num_heads} heads, "
        f"MLP {vision.intermediate_size}",
        "patches": f"{patch} x {patch} pixels, {vision.temporal_patch_size} frames; "
        f"{merge} x {merge} of them make a token",
        "DeepStack": f"blocks {', '.join(map(str, deepstack))} added after decoder layers "
        f"{', '.join(map(str, range(len(deepstack))))}"
        if deepstack
        else "none",
        "context": f"{text.max_position_embeddings:,} tokens",
    }
    if block := config.quantization:
        words["packed"] = f"{block.bits} bits in groups of {block.group_size} (MLX affine)"
    return words


def _attention(geometry: AttentionGeometry) -> dict[str, str]:
    biases = {"biases": ", ".join(sorted(geometry.biases))} if geometry.biases else {}
    if geometry.kind == "gqa":
        heads = f"{geometry.num_heads} heads over {geometry.num_kv_heads} key/value heads of {geometry.head_dim}"
        return {"attention": f"grouped-query, {heads}, q/k norm", **biases}
    heads = (
        f"{geometry.num_heads} heads of {geometry.nope_dim} + {geometry.rope_dim} rotary, values of {geometry.v_dim}"
    )
    keys, ranks = _span(geometry.rope_heads), _span(geometry.latent_ranks)
    latent = f"rank {ranks} and {keys} shared rotary key{'' if keys == '1' else 's'}"
    latent += " by layer" if " to " in latent else ""
    latent += ", latent norm" if geometry.latent_norm else ""
    latent += f"; queries through rank {geometry.q_rank}" if geometry.q_rank else ""
    norm = ", q/k norm" if geometry.layout == "norm" else ""
    return {"attention": f"latent (M2LA), {heads}{norm}", "latent": latent, **biases}


def _span(values: Iterable[int]) -> str:
    low, high = min(values := tuple(values)), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for aspect, words in architecture(report.config).items() if report.config else ():
        table.add_row(aspect, Text(words))
    if report.error:
        table.add_row("runs here", Text("no; the error at the end says why", style="red"))
    else:
        table.add_row("runs here", Text(f"yes, {BACKENDS[report.backend]}"))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _weights(report: Report) -> Table:
    table = _table("weights", "parameters", "size", "dtype")
    for name, part in report.parts.items():
        dtypes = sorted(part.dtypes, key=lambda dtype: -part.dtypes[dtype])
        table.add_row(name, f"{part.parameters:,}", human_bytes(part.nbytes), ", ".join(dtypes))
    if report.config and report.config.tie_word_embeddings and "head" not in report.parts:
        table.add_row("head", "0", "-", "the embeddings")
    table.add_section()
    table.add_row("all", f"{sum(part.parameters for part in report.parts.values()):,}", human_bytes(report.nbytes), "")
    return table


def _cache(report: Report) -> Table:
    cache, config = report.cache, report.config
    assert cache and config
    table = _table("cache of one token", "numbers a layer", f"all layers ({cache.dtype})", "of GQA")
    if config.text.geometry.kind == "m2la":
        table.add_row(
            "latent and rotary key",
            _span(cache.numbers_by_layer),
            human_bytes(cache.bytes_per_token),
            f"{cache.ratio:.0%}",
        )
    table.add_row(
        "keys and values (GQA)", f"{cache.gqa_numbers_by_layer:,}", human_bytes(cache.gqa_bytes_per_token), "100%"
    )
    return table


def _contexts(report: Report) -> Table:
    table = _table("context", "weights", "cache", "working", "together", "here")
    for row in report.contexts:
        sizes = (human_bytes(size) for size in (row.weights, row.cache, row.working, row.total))
        fit = Text(row.fit, style=FIT_STYLE[row.fit])
        table.add_row(f"{row.tokens:,}", *sizes, fit, style="bold" if row.tokens == report.context else "")
    return table


def _memories(memories: Iterable[Memory]) -> str:
    return "; ".join(
        f"{memory.name} {human_bytes(memory.total)}"
        + (f" ({human_bytes(memory.available)} free)" if memory.available is not None else "")
        for memory in memories
    )
