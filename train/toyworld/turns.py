"""Questions and answers as the messages of one conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def messages_of(turns: Iterable[tuple[str, str]], opening: Callable[[str], Any]) -> list[dict[str, Any]]:
    """A message for each question and each answer; `opening` adds to the first question what all of them are about."""
    messages: list[dict[str, Any]] = []
    for asked, answer in turns:
        messages.append({"role": "user", "content": asked if messages else opening(asked)})
        messages.append({"role": "assistant", "content": answer})
    return messages
