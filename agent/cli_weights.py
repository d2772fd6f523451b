"""`iv3 convert` and `iv3 verify`: their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from agent.cli_options import Debug

app = typer.Typer()


@app.command(
    epilog="""\b
Examples:
  iv3 convert yanziang/InternVideo3-8B-Instruct ./iv3-4bit --bits 4
  iv3 convert ./release ./iv3-mixed --recipe mixed_4_6 --dry-run
  iv3 convert ./iv3-4bit ./iv3-float --dtype bf16
  iv3 convert ./release ./merged --adapter ./my-lora
  iv3 convert Qwen/Qwen3-VL-8B-Instruct ./m2la --attention m2la --cache-ratio 2
  iv3 convert ./qwen3-vl ./m2la --attention m2la --rank 896 --layout release --calibrate a.mp4 --calibrate b.txt"""
)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, or a Hugging Face id (owner/name@revision).")],
    target: Annotated[str, typer.Argument(metavar="DST", help="The folder to write; both backends load it.")],
    bits: Annotated[int | None, typer.Option(help="Quantise to 4 or 8 bits (MLX's affine form).")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="32, 64 (the default) or 128 columns share a scale and a bias.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; as stored by default. Without --bits it dequantises.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Modules to leave in float, as in lm_head, layers.0 or '*.mlp.*'; may be repeated. The vision tower, "
            "the projector, norms and biases always stay; kv_b_proj gets 8 bits.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Mixed bit widths: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="DIR", help="A LoRA adapter (PEFT's form) to merge.")] = None,
    attention: Annotated[
        str | None, typer.Option(metavar="m2la", help="Turn grouped-query attention into M2LA, which caches a latent.")
    ] = None,
    cache_ratio: Annotated[
        float | None, typer.Option(help="M2LA: how many times smaller the cache is to be, as in 2, 4 or 8.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="M2LA: the latent's width in every layer, instead of a ratio.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="M2LA: norm (the default) keeps q_norm and k_norm; release is the released form.")
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="M2LA: a video, an image or a text to calibrate with; may be repeated. Toy clips and texts otherwise.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="M2LA: toy clips and texts to calibrate with; 64 by default.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="M2LA: what runs SRC: mlx, torch or auto (MLX on Apple silicon, else PyTorch).")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="M2LA: draw what each layer lost.")] = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes in a shard, as in 5GB or 500MB.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a conversion that was stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DST, or start a stopped conversion anew.")] = False,
    debug: Debug = False,
) -> None:
    """Cast, quantise or dequantise weights, merge an adapter, or turn the attention into M2LA, all or nothing."""
    weights = {"bits": bits, "group-size": group_size, "dtype": dtype, "keep": keep, "recipe": recipe}
    latent = {"cache-ratio": cache_ratio, "rank": rank, "layout": layout, "calibrate": calibrate, "samples": samples}
    _check_one_job(attention, weights | {"adapter": adapter}, latent | {"backend": backend, "plot": plot})
    if attention is not None:
        from agent.convert import parse_size
        from agent.convert_attention import convert_attention
        from convert.m2la.options import Options as AttentionOptions

        convert_attention(
            source,
            target,
            AttentionOptions(rank=rank, cache_ratio=cache_ratio, layout=layout or "norm"),
            calibrate=calibrate or (),
            samples=samples,
            backend=backend or "auto",
            shard_bytes=parse_size(shard_size),
            plot=plot,
            dry_run=dry_run,
            resume=resume,
            force=force,
        )
        return
    from agent.convert import convert as run_convert
    from agent.convert import parse_size
    from convert.plan import Options

    options = Options(
        bits=bits,
        group_size=group_size,
        dtype=dtype,
        keep=tuple(keep or ()),
        recipe=recipe,
        adapter=adapter,
        shard_bytes=parse_size(shard_size),
    )
    run_convert(source, target, options, dry_run=dry_run, resume=resume, force=force)


def _check_one_job(attention: str | None, weights: Mapping[str, Any], latent: Mapping[str, Any]) -> None:
    """Either the attention is converted or the weights are; nothing that was given may be for the other."""
    if attention not in (None, "m2la"):
        raise typer.BadParameter(f"--attention {attention} is not known; m2la is what a conversion can make")
    others, instead = (latent, "goes with --attention m2la") if attention is None else (
        weights, "cannot go with --attention m2la; convert to M2LA first, and the result with it then"
    )  # fmt: skip
    if given := [name for name, value in others.items() if value not in (None, [])]:
        raise typer.BadParameter(f"--{given[0]} {instead}")


@app.command(
    epilog="""\b
Examples:
  iv3 verify ./iv3-4bit
  iv3 verify ./iv3-4bit --json | jq .problems"""
)
def verify(
    path: Annotated[str, typer.Argument(metavar="DIR", help="The folder of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one object with all that was found.")] = False,
    debug: Debug = False,
) -> None:
    """Check every shard against its header, the manifest and conversion.json; exit 1 if anything is wrong."""
    from agent.convert import verify as run_verify

    run_verify(path, as_json)
