"""`iv3 chat`: one question after the other in the same context, from a terminal or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress

from agent.act import Options, begin, follow, prepared
from agent.entries import Result
from agent.run_view import lines_of
from ivcore.media_file import readable_file

PROMPT = "> "


def chat(video: str, options: Options, *, trace: str | None = None) -> None:
    """Answer what is asked on stdin, on stdout, until it ends; Ctrl-C stops an answer."""
    path = readable_file(video)
    with prepared(trace) as file:
        run, loop = begin(path, "", options)
        follow([run], file)
        for question in questions():
            try:
                *_, result = follow(loop.ask(question), file)
            except KeyboardInterrupt:
                print("stopped; ask something else, or leave by Ctrl-D.", file=sys.stderr)
            else:
                assert isinstance(result, Result)
                print("\n".join(lines_of(result)), flush=True)


def questions() -> Iterator[str]:
    """What is asked, line by line; with a history and editing on a terminal."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):  # where Python was built without it, lines are read plainly
        import readline  # noqa: F401
    while True:
        try:
            question = input(PROMPT).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nleave by Ctrl-D.")
            continue
        if question:
            yield question
