"""`make demo`: iv3-tiny is asked about a clip, on every backend that is installed here, and finds something in a film.

Clip, film and truth follow from a seed that nothing was trained on. Exit code 1 where the backends disagree.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from agent.act import Options, agent
from agent.ask import Answer, Request
from agent.phases import Phases
from ivcore.backend import BackendName, Model, load
from ivcore.errors import IvError
from ivcore.hub import PACKAGED, resolve
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from train.toyworld.compose import make_script
from train.toyworld.questions import Question, about, ask
from train.toyworld.render import write_clip
from train.toyworld.score import score, span_text
from train.toyworld.script import Script, random_of

SEED = 2003
"""Of the clip and the film; odd, and so held out."""

FILM_SECONDS = 600.0
REPORT = Path("build/demo.html")

BACKENDS: tuple[BackendName, ...] = ("torch", "mlx")


def main() -> None:
    """Print every question with its answers, the truth and the seconds, then a run; exit 1 where backends disagree."""
    try:
        same = demonstrate()
        act(REPORT)
    except IvError as error:
        sys.exit(f"demo: {error}")
    if not same:
        sys.exit("demo: the backends disagree; please open an issue with what is printed above.")


def demonstrate() -> bool:
    """Whether all backends give the same answers."""
    backends = [name for name in BACKENDS if importlib.util.find_spec(name) is not None]
    folder = resolve(PACKAGED)
    script = make_script(SEED, "order")
    with tempfile.TemporaryDirectory() as scratch:
        clip = Path(scratch) / "clip.mp4"
        write_clip(clip, script)
        print(f"clip      {script.duration:g} s of coloured figures, {clip.stat().st_size:,} bytes of H.264")
        print(f"model     {PACKAGED}, float32, on {' and '.join(backends)}")
        models = {name: load(folder, name, "float32") for name in backends}
        same = True
        for question in questions(script):
            print(f"\nquestion  {question.text}")
            answers = set()
            for name, model in models.items():
                started = time.perf_counter()
                text = answered(model, folder, clip, question.text)
                print(f"{name:<9} {text:<28} {time.perf_counter() - started:.2f} s")
                answers.add(text)
            print(f"truth     {question.answer:<28} {_verdict(question, answers)}")
            same = same and len(answers) == 1
    return same


def act(report: Path) -> None:
    """Run the agent on a film with an event of three seconds in it, and write the run's report."""
    script = make_script(SEED, "rare", FILM_SECONDS)
    question = ask(script)
    with tempfile.TemporaryDirectory() as scratch:
        film = Path(scratch) / "film.mp4"
        write_clip(film, script)
        (key,) = script.keys
        print(f"\nfilm      {FILM_SECONDS / 60:g} minutes, {key.span[1] - key.span[0]:g} seconds of which matter")
        print(f"question  {question.text}\n", flush=True)
        report.parent.mkdir(parents=True, exist_ok=True)
        agent(str(film), question.text, Options(model=PACKAGED, dtype="float32"), report=str(report))
    print(f"\ntruth     {question.answer}, to be seen from {span_text(key.span)}\nreport    {report}")


def questions(script: Script) -> Iterator[Question]:
    """Three about a script of two figures that come one after the other."""
    rng = random_of(script.seed, 6)
    first, second = script.figures[:2]
    yield ask(script)
    yield about(rng, "shape", first)
    yield about(rng, "when", second)


def answered(model: Model, folder: Path, clip: Path, question: str) -> str:
    """What the model says, greedily."""
    request = Request([clip], question, PACKAGED, max_tokens=32)
    answer = Answer(model, Tokenizer.from_dir(folder), build_inputs(folder, request.messages()), request, Phases())
    return "".join(answer)


def _verdict(question: Question, answers: set[str]) -> str:
    """How well the answer fits, where there is one."""
    if len(answers) > 1:
        return "the backends disagree"
    (given,) = answers
    if question.span is not None and not question.choices:
        return f"IoU {score(given, question.answer, question.span):.2f}"
    return "right" if score(given, question.answer) == 1 else "wrong"


if __name__ == "__main__":
    main()
