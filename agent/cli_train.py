"""`iv3 train`: a command a stage, and `plot`: their arguments."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agent.cli_options import Backend, Debug, Model


class _TrainCommands(TyperGroup):
    """The commands of `iv3 train`; one that does not exist is told what there is."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            *names, last = self.commands
            ctx.fail(f"iv3 train has no command {args[0]!r}, only {', '.join(names)} and {last}")
        return super().resolve_command(ctx, args)


train = typer.Typer(
    name="train",
    help="Train a LoRA, or all weights, by a recipe; draw the curves of runs.",
    cls=_TrainCommands,
    rich_markup_mode=None,
    epilog="""\b
Examples:
  iv3 train sft --recipe mac16-sft --model ./iv3-4bit --data rows.jsonl --out runs/first
  iv3 train sft --recipe mac16-sft -m ./iv3-4bit --data rows.jsonl --out runs/first --resume
  iv3 train plot runs/first""",
)

STAGES = {
    "cpt": "Continue pretraining: next-token loss on the assistant's words.",
    "sft": "Fine-tune on answers, in phases where a curriculum has them.",
    "rl": "Sample answers and learn from rewards that rules give.",
    "distill": "Sample answers and learn from a teacher's scores of them.",
}


@train.callback(invoke_without_command=True)
def _train(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def _add_stage(stage: str, purpose: str) -> None:
    def run(
        recipe: Annotated[str, typer.Option(help="A TOML file, or the name of a recipe that comes with iv3.")],
        model: Model,
        data: Annotated[str, typer.Option(help="JSONL rows, an upstream meta file, or grounding annotations.")],
        out: Annotated[str, typer.Option(help="The run's folder.")],
        backend: Backend = "auto",
        dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; as stored by default.")] = None,
        held_out: Annotated[
            str | None,
            typer.Option(metavar="FILE", help="Rows to ask and judge, every evaluate_every steps and last."),
        ] = None,
        overrides: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value; may be repeated."),
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
        tensorboard: Annotated[
            bool, typer.Option("--tensorboard", help="Write what TensorBoard shows to RUN/tensorboard.")
        ] = False,
        debug: Debug = False,
    ) -> None:
        from agent.train import train as run_train

        run_train(
            stage, recipe, model, data, out,
            backend=backend, dtype=dtype, overrides=list(overrides or ()), resume=resume, held_out=held_out,
            tensorboard=tensorboard,
        )  # fmt: skip

    examples = f"""\b
Examples:
  iv3 train {stage} --recipe mac16-{stage} --model ./iv3-4bit --data rows.jsonl --out runs/{stage}
  iv3 train {stage} --recipe my.toml -m DIR --data rows.jsonl --out runs/{stage} --set learning_rate.peak=1e-5
  iv3 train {stage} --recipe my.toml -m DIR --data rows.jsonl --out runs/{stage} --resume"""
    train.command(stage, help=purpose, epilog=examples)(run)


for _stage, _purpose in STAGES.items():
    _add_stage(_stage, _purpose)


@train.command(
    epilog="""\b
Examples:
  iv3 train plot runs/first
  iv3 train plot runs/first runs/second runs/third --out compared.png"""
)
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="The picture; RUN/curves.png where there is one run.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw the curves of one or several runs to a PNG."""
    from train.plot import draw

    print(draw(runs, out))
