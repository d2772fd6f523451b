"""Rows of a conversation, read turn by turn."""

from __future__ import annotations

from typing import Any


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer), the question without what stands before it."""
    asked = [message["content"] for message in row["messages"] if message["role"] == "user"]
    asked = [content if isinstance(content, str) else content[-1]["text"] for content in asked]
    answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return [(text.rpartition("\n\n")[2], answer) for text, answer in zip(asked, answers, strict=True)]
