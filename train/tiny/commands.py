"""Commands of `iv3` as steps: each in a process of its own, or in several that train together."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from ivcore.errors import TrainingError
from train.recipe_file import read_recipe

_TOGETHER = ("torch.distributed.run", "--nproc-per-node")


def run_module(what: str, module: str, *arguments: str, processes: int = 1) -> None:
    """Run a module beside this process: what lies above this package is not imported here.

    what: the step, for the error where the module fails.
    """
    several = ("-m", _TOGETHER[0], _TOGETHER[1], str(processes)) if processes > 1 else ()
    command = [sys.executable, *several, "-m", module, *arguments]
    if code := subprocess.run(command, check=False).returncode:
        raise TrainingError(f"{what} ended with exit code {code}; run it again, it goes on.")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add --processes to a command's options."""
    text = "that train together where a recipe's batch allows"
    parser.add_argument("--processes", type=_at_least_one, default=1, metavar="N", help=text)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of processes; give 1 or more.")
    return int(text)


def processes_for(arguments: Sequence[str], most: int) -> int:
    """How many processes share a command's work: `most` of them where a training's batches can be dealt out evenly."""
    if arguments[0] != "train":
        return 1
    options = list(arguments)
    overrides = [options[place + 1] for place, each in enumerate(options) if each == "--set"]
    recipe = read_recipe(options[options.index("--recipe") + 1], overrides)
    return most if all(phase.batch % most == 0 for phase in recipe.plan()) else 1
